// The table of a batch as Python hands it over, checked. Only this file and the modules' bindings know pybind11.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace para {

using Table = pybind11::array_t<int64_t, pybind11::array::c_style>;  // [modules, COLUMNS]
using Scales = pybind11::array_t<double, pybind11::array::c_style>;  // [modules]

inline std::vector<Problem> checked_problems(const Table& table, const Scales& scales) {
    if (table.ndim() != 2 || table.shape(1) != COLUMNS || scales.ndim() != 1 || scales.shape(0) != table.shape(0)) {
        throw std::invalid_argument("the table must be [modules, " + std::to_string(COLUMNS) +
                                    "] and the scales [modules]");
    }
    std::vector<Problem> problems;
    problems.reserve(static_cast<size_t>(table.shape(0)));
    for (pybind11::ssize_t i = 0; i < table.shape(0); ++i) {
        const int64_t* row = table.data(i, 0);
        if (row[RANK] < 1 || row[B_ROWS] < 1 || row[A_COLS] < 1 || row[NEW_RANK] < 0) {
            throw std::invalid_argument("row " + std::to_string(i) + " of the table has an empty shape");
        }
        for (const Column column : {B_DTYPE, A_DTYPE, NEW_DTYPE}) {
            if (row[column] < 0 || row[column] > 2) {
                throw std::invalid_argument("dtype code " + std::to_string(row[column]) + " is unknown");
            }
        }
        problems.push_back(problem_of(row, scales.data()[i]));
    }
    return problems;
}

}  // namespace para
