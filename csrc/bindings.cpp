// The native module `_cpu`: one table of addresses in, numbers out. Nothing of torch is included, so one build serves
// every version of it. Types and meaning: para_ext/_cpu.pyi.
#include "arena.h"
#include "cpu/stages.h"
#include "tables.h"

namespace py = pybind11;

namespace {

using para::Scales;
using para::Table;

const para::Kernels& kernels_named(const std::string& isa) {
    int count;
    const para::Kernels* const* found = para::available_kernels(count);
    for (int i = 0; i < count; ++i) {
        if (isa.empty() || isa == found[i]->isa) return *found[i];
    }
    throw std::invalid_argument("ISA level '" + isa + "' is not built in or not supported by this machine");
}

template <class Stage>
auto run(Stage stage, const Table& table, const Scales& scales, int threads, const std::string& isa) {
    const para::Kernels& kernels = kernels_named(isa);
    const std::vector<para::Problem> problems = para::checked_problems(table, scales);
    py::gil_scoped_release release;
    return stage(problems, kernels, threads);
}

py::array_t<int32_t> as_array(const std::vector<int32_t>& values) {
    return py::array_t<int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<int32_t> run_cores(const Table& table, const Scales& scales, int threads, const std::string& isa) {
    return as_array(run(para::cpu::cores, table, scales, threads, isa));
}

py::array_t<int32_t> run_svd(const Table& table, const Scales& scales, int threads, const std::string& isa) {
    return as_array(run(para::cpu::svd, table, scales, threads, isa));
}

py::array_t<double> run_truncate(const Table& table, const Scales& scales, int threads, const std::string& isa) {
    const std::vector<para::Certificate> certificates = run(para::cpu::truncate, table, scales, threads, isa);
    py::array_t<double> out({static_cast<py::ssize_t>(certificates.size()), py::ssize_t{7}});
    for (size_t i = 0; i < certificates.size(); ++i) {
        const para::Certificate& c = certificates[i];
        double* row = out.mutable_data(static_cast<py::ssize_t>(i), 0);
        row[0] = c.lost;
        row[1] = c.stretch_b;
        row[2] = c.stretch_a;
        row[3] = c.rounding_b;
        row[4] = c.rounding_a;
        row[5] = c.weighted_b;
        row[6] = c.weighted_a;
    }
    return out;
}

py::list isa_levels() {
    py::list names;
    int count;
    const para::Kernels* const* found = para::available_kernels(count);
    for (int i = 0; i < count; ++i) names.append(found[i]->isa);
    return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    py::class_<para::Arena>(module, "Arena", py::buffer_protocol())
        .def(py::init<size_t, int>(), py::arg("bytes"), py::arg("threads"), py::call_guard<py::gil_scoped_release>())
        .def_buffer([](para::Arena& arena) {
            return py::buffer_info(static_cast<uint8_t*>(arena.data()), static_cast<py::ssize_t>(arena.bytes()));
        });
    module.def("core_words", &para::Core::words, py::arg("rank"));
    module.def("cores", &run_cores, py::arg("table"), py::arg("scales"), py::arg("threads"), py::arg("isa") = "");
    module.def("svd", &run_svd, py::arg("table"), py::arg("scales"), py::arg("threads"), py::arg("isa") = "");
    module.def("truncate", &run_truncate, py::arg("table"), py::arg("scales"), py::arg("threads"), py::arg("isa") = "");
    module.def("isa_levels", &isa_levels);
    module.attr("COLUMNS") = static_cast<int64_t>(para::COLUMNS);
}
