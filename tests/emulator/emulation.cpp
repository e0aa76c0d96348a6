// The Python module `emulation`, in every library of build.py: what the kernels in that library did, and in which order
// it runs their threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"

namespace py = pybind11;
using para::emulator::Launch;

namespace {

py::tuple shape(dim3 size) {
    return py::make_tuple(size.x, size.y, size.z);
}

}  // namespace

PYBIND11_MODULE(emulation, m) {
    py::class_<Launch>(m, "Launch")
        .def_readonly("kernel", &Launch::kernel)
        .def_property_readonly("grid", [](const Launch& x) { return shape(x.grid); })
        .def_property_readonly("block", [](const Launch& x) { return shape(x.block); })
        .def_readonly("shared", &Launch::shared)
        .def_readonly("read", &Launch::read)
        .def_readonly("written", &Launch::written)
        .def_readonly("block_barriers", &Launch::block_barriers)
        .def_readonly("warp_barriers", &Launch::warp_barriers);
    m.def("launches", [] { return para::emulator::launches(); });
    m.def("reset", &para::emulator::reset);
    m.def("set_seed", &para::emulator::set_seed, py::arg("seed"));
    m.def("set_shared_limit", &para::emulator::set_shared_limit, py::arg("bytes"));
}
