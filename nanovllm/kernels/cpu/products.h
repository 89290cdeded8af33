// What products are summed up with: instructions for bf16 and int8 where the processor has them, else wider ones.
//
// Left operands are activations, queries and attention weights, right ones weights, keys and values, which stay in bf16
// or int8 in memory. A step takes a pair of bf16 or four int8 of each lane's right operand: at once, or in two parts if
// there is no instruction for that. bf16 become fp32, by shifts; int8 become int16, two products of which an instruction
// adds up, without any error.

#pragma once

#include "vector.h"

#ifdef HAS_BF16_DOT

using Operand = bf16;  // as which left ones are kept
using Factors = Bits;
constexpr int64_t BF16_PARTS = 1;

inline void copy_operands(Operand* to, const bf16* x) { std::memcpy(to, x, 4); }  // STEP of them
inline Factors part_of(Bits pairs, int64_t) { return pairs; }
inline BitsRegister broadcast(const Operand* x) {
    uint32_t pair;
    std::memcpy(&pair, x, 4);
    return pair - BitsRegister{};
}
inline Floats multiply_add(Floats sum, Factors weights, BitsRegister x) {
    return apply([=](FloatRegister sum, BitsRegister weights) { return dot_bf16(sum, weights, x); }, sum, weights);
}

// A register of a key, 2 * WIDTH values of it, and what a query is kept as beside it.
inline BitsRegister key_of(BitsRegister raw) { return raw; }
inline FloatRegister add_dot(FloatRegister sum, const Operand* query, BitsRegister key) {
    return dot_bf16(sum, get<BitsRegister>(query), key);
}
inline void store_query(Operand* to, BitsRegister raw) { put(to, raw); }

// 32 columns of two rows of values, for a sum over rows, the columns of which `store_columns` writes.
inline void arrange_values(Bits v0, Bits v1, Factors (*factors)[2]) { zip(v0, v1, factors[0][0], factors[0][1]); }
inline void store_operands(Operand* to, Floats x) { store16(to, x); }
inline void store_columns(bf16* to, Floats first, Floats second, int64_t n) {
    unzip(first, second);
    store16(to, first, n);
    store16(to + 16, second, n - 16);
}

#else

using Operand = float;
using Factors = Floats;
constexpr int64_t BF16_PARTS = 2;

inline void copy_operands(Operand* to, const bf16* x) {
    uint32_t bits = uint32_t(*x) << 16;
    std::memcpy(to, &bits, 4);
}
inline FloatRegister even(BitsRegister pairs) { return (FloatRegister)(pairs << 16); }
inline FloatRegister odd(BitsRegister pairs) { return (FloatRegister)(pairs & 0xffff0000); }
inline Factors part_of(Bits pairs, int64_t part) {
    return part == 0 ? apply([](BitsRegister x) { return even(x); }, pairs)
                     : apply([](BitsRegister x) { return odd(x); }, pairs);
}
inline FloatRegister broadcast(const Operand* x) { return *x - FloatRegister{}; }
#if !defined(__AVX512F__)
inline Floats multiply_add(Floats sum, Factors weights, FloatRegister x) {
    return apply([=](FloatRegister s, FloatRegister w) { return multiply_add(s, w, x); }, sum, weights);
}
#endif

struct Key {
    FloatRegister even, odd;
};

inline Key key_of(BitsRegister raw) { return {even(raw), odd(raw)}; }
inline FloatRegister add_dot(FloatRegister sum, const Operand* query, Key key) {
    sum = multiply_add(sum, get<FloatRegister>(query), key.even);
    return multiply_add(sum, get<FloatRegister>(query + WIDTH), key.odd);
}
inline void store_query(Operand* to, BitsRegister raw) {
    put(to, even(raw));
    put(to + WIDTH, odd(raw));
}

inline void arrange_values(Bits v0, Bits v1, Factors (*factors)[2]) {
    for (int64_t part = 0; part < 2; part++) {
        factors[0][part] = part_of(v0, part);
        factors[1][part] = part_of(v1, part);
    }
}
inline void store_operands(Operand* to, Floats x) { store(to, x); }
inline void store_columns(bf16* to, Floats first, Floats second, int64_t n) {
    auto join = [](BitsRegister low, BitsRegister high) { return low >> 16 | high; };
    bf16 columns[32];
    put(columns, apply(join, round_to_bf16(first), round_to_bf16(second)));
    if (n > 0) std::memcpy(to, columns, 2 * (n < 32 ? n : 32));
}

#endif

constexpr int64_t STEP = 2 / BF16_PARTS;                 // left operands of bf16 that a part takes
constexpr int64_t INT8_PARTS = sizeof(Byte);             // a Byte is what an activation in 8 bits is kept as
constexpr int64_t BYTE_STEP = 4 / INT8_PARTS;

inline IntRegister broadcast(const Byte* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return four - IntRegister{};
}

// Products of bytes and whole numbers of 16 bits, of at most 127 * 256, are summed up in two parts, between which
// `next_part` is called: the upper and the lower 8 bits of these numbers where bytes are multiplied, else those beside
// the even and the odd bytes. A part of four numbers has four bytes, which `split` fills in for n of them.
#ifdef HAS_INT8_DOT

inline Ints part_of(Ints quads, int64_t) { return quads; }
inline Ints multiply_add(Ints sum, Ints weights, IntRegister x) {
    return apply([=](IntRegister sum, IntRegister weights) { return dot_int8(sum, x, weights); }, sum, weights);
}

inline IntRegister next_part(IntRegister sum) { return sum << 8; }
inline IntRegister add_part(IntRegister sum, IntRegister bytes, IntRegister numbers, int) {
    return dot_int8(sum, bytes, numbers);
}
inline void split(const int32_t* x, int64_t n, int8_t* first, int8_t* second) {
    for (int64_t i = 0; i < n; i++) first[i] = (x[i] + 128) >> 8, second[i] = x[i];
}

#else

inline IntRegister even_bytes(IntRegister x) { return (IntRegister)(ShortRegister(ShortRegister(x) << 8) >> 8); }
inline IntRegister odd_bytes(IntRegister x) { return (IntRegister)((ShortRegister)x >> 8); }
inline Ints part_of(Ints quads, int64_t part) { return part == 0 ? apply(even_bytes, quads) : apply(odd_bytes, quads); }
inline Ints multiply_add(Ints sum, Ints weights, IntRegister x) {
    return apply([=](IntRegister s, IntRegister w) { return dot_int16(s, (ShortRegister)x, (ShortRegister)w); }, sum,
                 weights);
}

inline IntRegister next_part(IntRegister sum) { return sum; }
inline IntRegister add_part(IntRegister sum, IntRegister bytes, IntRegister numbers, int part) {
    return dot_int16(sum, (ShortRegister)(part == 0 ? even_bytes(bytes) : odd_bytes(bytes)), (ShortRegister)numbers);
}
inline void split(const int32_t* x, int64_t n, int8_t* first, int8_t* second) {
    for (int64_t i = 0; i < n / 2; i++) ((int16_t*)first)[i] = x[2 * i], ((int16_t*)second)[i] = x[2 * i + 1];
}

#endif
