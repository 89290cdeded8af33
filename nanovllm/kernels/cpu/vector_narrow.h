// Vectors of several registers, whose masks are registers too.

#pragma once

typedef uint16_t HalfRegister __attribute__((vector_size(2 * WIDTH)));

template <class V>
inline Two<V> operator+(Two<V> a, Two<V> b) {
    return {a.low + b.low, a.high + b.high};
}
template <class V>
inline Two<V> operator-(Two<V> a, Two<V> b) {
    return {a.low - b.low, a.high - b.high};
}
template <class V>
inline Two<V> operator*(Two<V> a, Two<V> b) {
    return {a.low * b.low, a.high * b.high};
}
template <class V>
inline Two<V> operator/(Two<V> a, Two<V> b) {
    return {a.low / b.low, a.high / b.high};
}
template <class V>
inline Two<V> operator&(Two<V> a, Two<V> b) {
    return {a.low & b.low, a.high & b.high};
}
template <class V>
inline Two<V> operator-(Two<V> x) {
    return {-x.low, -x.high};
}

// ---- memory

inline Floats all(float x) {
    FloatRegister each = x - FloatRegister{};
    return apply([=](FloatRegister) { return each; }, Floats{});
}
inline Ints all_ints(int32_t x) {
    IntRegister each = x - IntRegister{};
    return apply([=](IntRegister) { return each; }, Ints{});
}
inline Floats load(const float* x) { return get<Floats>(x); }
inline Ints load(const int32_t* x) { return get<Ints>(x); }
inline void store(float* to, Floats x) { put(to, x); }
inline void store(int32_t* to, Ints x) { put(to, x); }
inline Floats load(const float* x, int64_t n) {
    if (n >= 16) return load(x);
    float first[16] = {};
    if (n > 0) std::memcpy(first, x, n * sizeof *x);
    return load(first);
}

template <class V>
inline V widened(const bf16* x) {
    if constexpr (is_register<V>) {
        HalfRegister half;
        std::memcpy(&half, x, sizeof half);
        return (V)(__builtin_convertvector(half, BitsRegister) << 16);
    } else {
        using Half = decltype(V::low);
        return {widened<Half>(x), widened<Half>(x + sizeof(Half) / 4)};
    }
}
template <class V>
inline void put_upper(bf16* to, V bits) {
    if constexpr (is_register<V>) {
        HalfRegister half = __builtin_convertvector(bits >> 16, HalfRegister);
        std::memcpy(to, &half, sizeof half);
    } else {
        put_upper(to, bits.low);
        put_upper(to + sizeof bits.low / 4, bits.high);
    }
}
inline Floats load16(const bf16* x) { return widened<Floats>(x); }
inline Floats load16(const bf16* x, int64_t n) {
    if (n >= 16) return load16(x);
    bf16 first[16] = {};
    if (n > 0) std::memcpy(first, x, n * sizeof *x);
    return load16(first);
}
inline void store16(bf16* to, Floats x) { put_upper(to, round_to_bf16(x)); }
inline void store16(bf16* to, Floats x, int64_t n) {
    if (n >= 16) return store16(to, x);
    bf16 first[16];
    store16(first, x);
    if (n > 0) std::memcpy(to, first, n * sizeof *to);
}
inline Floats rounded(Floats x) {
    return apply([](BitsRegister bits) { return (FloatRegister)bits; }, round_to_bf16(x));
}
inline void fill(bf16* to, Lanes which, bf16 value) {
    for (int i = 0; i < 16; i++)
        if (which >> i & 1) to[i] = value;
}

// ---- arithmetic

template <class V>
inline Two<V> multiply_add(Two<V> sum, Two<V> a, Two<V> b) {
    return {multiply_add(sum.low, a.low, b.low), multiply_add(sum.high, a.high, b.high)};
}
template <class V>
inline Two<V> larger(Two<V> a, Two<V> b) {
    return {larger(a.low, b.low), larger(a.high, b.high)};
}
template <class V>
inline Two<V> smaller(Two<V> a, Two<V> b) {
    return {smaller(a.low, b.low), smaller(a.high, b.high)};
}
inline Floats nearest(Floats x) {
    return apply([](FloatRegister x) { return nearest(x); }, x);
}
inline Floats absolute(Floats x) {
    return apply([](FloatRegister x) { return (FloatRegister)((IntRegister)x & 0x7fffffff); }, x);
}
// In two steps, each by a power that fp32 has: beyond 2^-252 and 2^254 nothing is left, or infinite, anyway.
inline Floats scaled(Floats x, Floats power) {
    power = larger(smaller(power, all(254.0f)), all(-252.0f));
    auto scale = [](FloatRegister x, FloatRegister power) {
        IntRegister whole = __builtin_convertvector(power, IntRegister), half = whole >> 1;
        return x * (FloatRegister)((half + 127) << 23) * (FloatRegister)((whole - half + 127) << 23);
    };
    return apply(scale, x, power);
}
template <class V>
inline float sum_of(V x) {
    if constexpr (is_register<V>) {
        float sums[WIDTH];
        put(sums, x);
        for (int n = WIDTH / 2; n > 0; n /= 2)
            for (int i = 0; i < n; i++) sums[i] += sums[i + n];
        return sums[0];
    } else {
        return sum_of(x.low + x.high);
    }
}
template <class V>
inline float largest_of(V x) {
    if constexpr (is_register<V>) {
        float values[WIDTH];
        put(values, x);
        for (int i = 1; i < WIDTH; i++) values[0] = values[i] > values[0] ? values[i] : values[0];
        return values[0];
    } else {
        return largest_of(larger(x.low, x.high));
    }
}

// ---- masks

template <class V>
inline Lanes lanes_of(Two<V> mask) {
    return lanes_of(mask.low) | lanes_of(mask.high) << sizeof(V) / 4;
}
template <class V>
inline V mask_of(Lanes which) {
    if constexpr (is_register<V>) {
        IntRegister bits = {};
        for (int i = 0; i < WIDTH; i++) bits[i] = 1 << i;
        return (int32_t(which) - IntRegister{} & bits) != 0;
    } else {
        using Half = decltype(V::low);
        return {mask_of<Half>(which), mask_of<Half>(which >> sizeof(Half) / 4)};
    }
}
inline Lanes greater(Floats a, Floats b) {
    return lanes_of(apply([](FloatRegister a, FloatRegister b) { return a > b; }, a, b));
}
inline Lanes at_least(Floats a, Floats b) {
    return lanes_of(apply([](FloatRegister a, FloatRegister b) { return a >= b; }, a, b));
}
inline Lanes equal(Floats a, Floats b) {
    return lanes_of(apply([](FloatRegister a, FloatRegister b) { return a == b; }, a, b));
}
inline Lanes equal(Ints a, Ints b) {
    return lanes_of(apply([](IntRegister a, IntRegister b) { return a == b; }, a, b));
}
inline Floats select(Lanes which, Floats a, Floats b) {
    auto choose = [](IntRegister mask, FloatRegister a, FloatRegister b) {
        return (FloatRegister)(((IntRegister)a & mask) | ((IntRegister)b & ~mask));
    };
    return apply(choose, mask_of<Ints>(which), a, b);
}
inline void store(float* to, Floats x, Lanes which) { store(to, select(which, x, load(to))); }

// ---- integers

inline Ints bits_of(Floats x) {
    return apply([](FloatRegister x) { return (IntRegister)x; }, x);
}
inline Ints shift_right(Ints x, int by) {
    return apply([=](IntRegister x) { return (IntRegister)((BitsRegister)x >> by); }, x);
}
inline Floats to_floats(Ints x) {
    return apply([](IntRegister x) { return __builtin_convertvector(x, FloatRegister); }, x);
}
inline void store_truncated(int64_t* to, Floats x) {
    float values[16];
    store(values, x);
    for (int i = 0; i < 16; i++) to[i] = int64_t(values[i]);
}

// The first n of as many raw bf16 as V holds, then zeros.
template <class V>
inline V load_first(const bf16* x, int64_t n) {
    constexpr int64_t ALL = sizeof(V) / sizeof *x;
    if (n >= ALL) return get<V>(x);
    bf16 first[ALL] = {};
    if (n > 0) std::memcpy(first, x, n * sizeof *x);
    return get<V>(first);
}
