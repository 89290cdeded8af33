// Vectors of sixteen fp32 lanes, on which all kernels are written, whatever the processor's registers.
//
// One of the headers below says what is particular to an instruction set; the rest is written with the compilers' vector
// types. `Floats` and `Ints` are one register where it has sixteen lanes, else halves of halves of registers; `Lanes` is
// a bit for each lane. Reductions have an order of their own on each instruction set, and the same for every caller.

#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;
using Lanes = uint16_t;

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // lanes of a register
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float FloatRegister __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IntRegister __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t BitsRegister __attribute__((vector_size(4 * WIDTH)));
typedef int16_t ShortRegister __attribute__((vector_size(4 * WIDTH)));

template <class V>
struct Two {
    V low, high;
};

template <class V, int LANES>
struct Halves {
    using type = Two<typename Halves<V, LANES / 2>::type>;
};
template <class V>
struct Halves<V, WIDTH> {
    using type = V;
};
template <class V>
using Sixteen = typename Halves<V, 16>::type;  // as many registers as have sixteen lanes of 32 bits

using Floats = Sixteen<FloatRegister>;
using Ints = Sixteen<IntRegister>;
using Bits = Sixteen<BitsRegister>;

template <class V>
constexpr bool is_register = !requires(V x) { x.low; };

// f of each register, or of the registers of several vectors that are in the same place.
template <class F, class... V>
inline auto apply(F f, V... x) {
    return f(x...);
}
template <class F, class... V>
inline auto apply(F f, Two<V>... x) -> Two<decltype(apply(f, x.low...))> {
    return {apply(f, x.low...), apply(f, x.high...)};
}

template <class V>
inline V get(const void* from) {
    if constexpr (is_register<V>) {
        V x;
        std::memcpy(&x, from, sizeof x);
        return x;
    } else {
        using Half = decltype(V::low);
        return {get<Half>(from), get<Half>((const char*)from + sizeof(Half))};
    }
}

template <class V>
inline void put(void* to, V x) {
    if constexpr (is_register<V>) {
        std::memcpy(to, &x, sizeof x);
    } else {
        put(to, x.low);
        put((char*)to + sizeof x.low, x.high);
    }
}

inline Lanes lanes(int64_t n) { return n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0; }  // the first n

// fp32 rounded to bf16, to nearest even, in the upper half of each lane; NaN stays NaN.
template <class V>
inline auto round_to_bf16(V x) {
    return apply(
        [](FloatRegister x) {
            BitsRegister bits = (BitsRegister)x, is_nan = (BitsRegister)(x != x);
            BitsRegister rounded = bits + 0x7fff + (bits >> 16 & 1);
            return ((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) & 0xffff0000;
        },
        x);
}

#if defined(__AVX512F__)
#include "vector_avx512.h"
#elif defined(__AVX2__)
#include "vector_avx2.h"
#include "vector_narrow.h"
#else
#include "vector_neon.h"
#include "vector_narrow.h"
#endif

// 2^x to fp32's precision: a polynomial for the fraction, the exponent set directly.
inline Floats exp2_of(Floats x) {
    Floats whole = nearest(x), f = x - whole;
    Floats p = all(1.535336188319500e-4f);
    p = multiply_add(all(1.339887440266574e-3f), p, f);
    p = multiply_add(all(9.618437357674640e-3f), p, f);
    p = multiply_add(all(5.550332471162809e-2f), p, f);
    p = multiply_add(all(2.402264791363012e-1f), p, f);
    p = multiply_add(all(6.931472028550421e-1f), p, f);
    p = multiply_add(all(1.0f), p, f);
    return scaled(p, whole);
}
inline Floats exp_of(Floats x) { return exp2_of(x * all(1.44269504f)); }
