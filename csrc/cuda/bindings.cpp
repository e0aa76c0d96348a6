// The native module `_cuda`: plans made of one table of addresses, and their launches. All memory is the caller's and
// on the device; a stream is its address. Compiled for the emulator this is `_cuda_emulated`, whose device is the CPU.
// Types and meaning: para_ext/_cuda.pyi.
#include <string>

#include "../parallel.h"
#include "../tables.h"
#include "launches.h"
#include "stages.h"

namespace py = pybind11;

namespace {

using para::Scales;
using para::Table;

py::array_t<int64_t> as_array(const std::vector<int64_t>& words) {
    return py::array_t<int64_t>(static_cast<py::ssize_t>(words.size()), words.data());
}

template <class Plan>
void launch(const Plan& plan, int64_t tables, int64_t scratch, int64_t results, int64_t stream) {
    const para::DefaultFloatingPoint environment;  // the emulator computes in this thread
    plan.launch({para::pointer<const int64_t>(tables), para::pointer<double>(scratch), para::pointer<double>(results),
                 para::pointer<void>(stream)});
}

template <class Plan, class... Options>
void def_plan(py::class_<Plan, Options...>& type) {
    type.def_property_readonly("tables", [](const Plan& plan) { return as_array(plan.tables); })
        .def_readonly("scratch", &Plan::scratch)
        .def_readonly("results", &Plan::results)
        .def("launch", &launch<Plan>, py::arg("tables"), py::arg("scratch"), py::arg("results"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(PARA_MODULE, module) {
    using para::cuda::CoresPlan;
    using para::cuda::TruncatePlan;
    py::class_<CoresPlan> cores(module, "CoresPlan", py::module_local());  // `_cuda_emulated` has them too
    cores.def(py::init([](const Table& table, const Scales& scales, int device) {
                  return CoresPlan(para::checked_problems(table, scales), table.data(), scales.data(), device);
              }),
              py::arg("table"), py::arg("scales"), py::arg("device"));
    cores.def_property_readonly("spectra", [](const CoresPlan& plan) { return as_array(plan.spectra); });
    def_plan(cores);
    py::class_<TruncatePlan> truncate(module, "TruncatePlan", py::module_local());
    truncate.def(py::init([](const Table& table, const Scales& scales) {
                     return TruncatePlan(para::checked_problems(table, scales), table.data(), scales.data());
                 }),
                 py::arg("table"), py::arg("scales"));
    truncate.def_property_readonly("sides", [](const TruncatePlan& plan) { return as_array(plan.sides); });
    def_plan(truncate);
    module.def(
        "unusable",
        [](int device) {
            const char* reason = para::cuda::unusable_device(device);
            return std::string(reason ? reason : "");
        },
        py::arg("device"));
    module.def("core_words", &para::Core::words, py::arg("rank"));
    module.attr("COLUMNS") = static_cast<int64_t>(para::COLUMNS);
    module.attr("LARGEST_RANK") = static_cast<int64_t>(para::cuda::LARGEST_RANK);
}
