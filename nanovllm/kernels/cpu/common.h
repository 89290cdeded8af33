// What the CPU's kernels share. All are plain C functions over raw pointers, which __init__.py compiles, checks the
// arguments of, and calls. They are written on the vectors of vector.h, for any of the instruction sets of targets.py;
// products are of bf16 (or int8) values, sums in fp32 (or int32).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "products.h"
#include "threads.h"
#include "vector.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void prefetch(const void* x) { __builtin_prefetch(x, 0, 2); }  // into the second cache

// Calls f.template operator()<R>() with R = rows, which is 1 to MOST.
template <int MOST, class F>
void with_rows(int64_t rows, F&& f) {
    if constexpr (MOST > 0) {
        if (rows == MOST)
            f.template operator()<MOST>();
        else
            with_rows<MOST - 1>(rows, f);
    }
}

// For each function a second one, call_NAME, that takes its arguments as an array of 64-bit integers (a pointer, an
// integer or the bits of a float), so that a recorded sequence of calls can be run by a loop: see replay.cpp.
template <class T>
T argument(int64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class... T, size_t... I>
void call_with(void (*function)(T...), const int64_t* arguments, std::index_sequence<I...>) {
    function(argument<T>(arguments[I])...);
}

template <class... T>
void call_with(void (*function)(T...), const int64_t* arguments) {
    call_with(function, arguments, std::index_sequence_for<T...>());
}

#define REPLAYABLE(function) \
    EXPORT void call_##function(const int64_t* arguments) { call_with(function, arguments); }
