// Linear layers over weights of 4 bits, see int4.h.
//
// A block of a panel becomes bytes in the cache, for all rows that are multiplied with it. A segment's products are
// added up in integers, and those of segments in fp32, in their order, for one row as for any other: results depend on
// neither the rows nor the instructions.
//
// Legend: a product is [M, K] activations times the transpose of an [N, K] weight.

#include "amx.h"
#include "int4.h"

namespace int4 {

constexpr int64_t MOST_ROWS = 256;  // that a thread computes with one panel
constexpr int64_t CACHE = 1 << 20;  // what a thread keeps of activations in its L2; of more, one block at a time,
constexpr int64_t SOME_PANELS = 8;  // with so many panels
constexpr int64_t MATRIX_ROWS = 6;  // or more are worth the matrix units' setting up
constexpr int64_t AHEAD = 8192;     // bytes from the weights in use to those that are fetched

// Activations in int8, quantised a block of a row at a time by its largest value.
struct Activations {
    std::vector<Value> buffer;
    Value* values;                    // [K / 128, M, 128]
    std::vector<float> scales, sums;  // [K / 128, M], and of segments [K / segment, M]

    // Of x, [m, k] with rows ldx apart.
    void quantize(const bf16* x, int64_t ldx, int64_t m, int64_t k, const Int4Weight& w) {
        int64_t segments = BLOCK / w.segment;
        buffer.resize(w.blocks * m * BLOCK + 64);
        scales.resize(w.blocks * m);
        sums.resize(w.blocks * m * segments);
        values = buffer.data() + (-(uintptr_t)buffer.data() & 63) / sizeof(Value);
        parallel_for(m, 4, [&](int64_t row) {
            for (int64_t b = 0; b < w.blocks; b++) {
                bf16 from[BLOCK] = {};
                std::copy_n(x + row * ldx + b * BLOCK, std::min(BLOCK, k - b * BLOCK), from);
                uint16_t largest = 0;  // of bf16 without their signs, which order as integers do
                for (int64_t i = 0; i < BLOCK; i++) largest = std::max<uint16_t>(largest, from[i] & 0x7fff);
                float scale = scales[b * m + row] = largest ? to_float(largest) / 127 : 1, inverse = 1 / scale;
                Value* to = values + (b * m + row) * BLOCK;
                for (int64_t i = 0; i < BLOCK; i++)
                    to[place(i)] = Value(int32_t(std::nearbyint(to_float(from[i]) * inverse)));
                for (int64_t s = 0; s < segments; s++, to += w.segment)
                    sums[(b * segments + s) * m + row] = std::accumulate(to, to + w.segment, 0);
            }
        });
    }
};

// The products of a tile's rows and a panel's block, summed up for each segment, by dot-product instructions.
struct Dots {
    static constexpr int64_t ROWS = WIDE_ROWS;  // of a tile
    static constexpr bool TAKES_SIGNED = false;
    using Sums = int32_t[ROWS][PANEL];

    void multiply(const Value* x, int64_t rows, const uint8_t* codes, int64_t segment, Sums* dots) {
        with_rows<ROWS>(rows, [&]<int R>() {
            for (int64_t k = 0; k < BLOCK; k += segment)
                multiply_segment<R>(x + k, codes + k * PANEL, segment, dots[k / segment]);
        });
    }

    template <int R>
    [[gnu::noinline]] static void multiply_segment(const Value* x, const uint8_t* codes, int64_t size,
                                                   int32_t (*dots)[PANEL]) {
        Ints sums[R][2];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = all_ints(0);
        for (int64_t i = 0; i < size; i += 4, codes += 4 * PANEL) {
            Ints w0 = get<Ints>(codes), w1 = get<Ints>(codes + 2 * PANEL);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                sums[r][0] = add_products(sums[r][0], w0, x + r * BLOCK + i);
                sums[r][1] = add_products(sums[r][1], w1, x + r * BLOCK + i);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            store(dots[r], sums[r][0]);
            store(dots[r] + 16, sums[r][1]);
        }
    }
};

#ifdef WITH_AMX

// The same by matrix units.
struct Matrices {
    static constexpr int64_t ROWS = amx::ROWS;
    static constexpr bool TAKES_SIGNED = true;
    using Sums = int32_t[ROWS][PANEL];
    amx::Tiles tiles;

    void multiply(const Value* x, int64_t rows, const uint8_t* codes, int64_t segment, Sums* dots) {
        int64_t step = std::min(segment, amx::STEP);
        tiles.configure(rows, step);
        for (int64_t k = 0; k < BLOCK; k += segment, dots++)
            rows > 16 ? multiply<true>(x + k, codes + k * PANEL, segment, dots)
                      : multiply<false>(x + k, codes + k * PANEL, segment, dots);
    }

    template <bool HAS_SECOND>
    void multiply(const Value* x, const uint8_t* codes, int64_t size, Sums* dots) {
        asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
        for (int64_t i = 0; i < size; i += amx::STEP, codes += amx::PANEL_STEP) {
            amx::load_tile<6>(codes, 4 * PANEL);
            amx::load_tile<4>(x + i, BLOCK);
            asm volatile("tdpbssd %%tmm6, %%tmm4, %%tmm0" ::);
            amx::load_tile<7>(codes + 2 * PANEL, 4 * PANEL);
            asm volatile("tdpbssd %%tmm7, %%tmm4, %%tmm1" ::);
            if constexpr (HAS_SECOND) {
                amx::load_tile<5>(x + 16 * BLOCK + i, BLOCK);
                asm volatile("tdpbssd %%tmm6, %%tmm5, %%tmm2" ::);
                asm volatile("tdpbssd %%tmm7, %%tmm5, %%tmm3" ::);
            }
        }
        amx::store_sums<HAS_SECOND>(dots, 4 * PANEL);
    }
};

#endif

// The 4096 codes of a panel's block, in bytes, less their zero points if SIGNED; what comes soon is fetched.
template <bool SIGNED>
void unpack(const Int4Weight& w, int64_t panel, int64_t b, uint8_t* to) {
    const uint8_t* from = w.block(panel, b);
    int64_t step = std::min(w.segment, BLOCK / 2);
    for (int64_t k = 0; k < BLOCK / 2; k += step)
        for (int64_t half = 0; half < 4 * PANEL; half += 64) {
            const uint8_t* zeros = w.zeros + half / 4;
            Ints low_zero = all_ints(0), high_zero = low_zero;
            if constexpr (SIGNED) {
                low_zero = repeat_bytes(zeros + w.at(panel, b * BLOCK + k));
                high_zero = repeat_bytes(zeros + w.at(panel, b * BLOCK + BLOCK / 2 + k));
            }
            for (int64_t i = k * PANEL + half; i < (k + step) * PANEL; i += 4 * PANEL) {
                prefetch(from + AHEAD + i);
                Ints pairs = get<Ints>(from + i);
                put(to + i, subtract_bytes(low_halves(pairs), low_zero));
                put(to + BYTES + i, subtract_bytes(high_halves(pairs), high_zero));
            }
        }
}

// Adds a block's products, of some rows and a panel; x_scales and x_sums are those of the first row of m.
template <class Unit, int SEGMENTS>
void add_block(const typename Unit::Sums* dots, const Int4Weight& w, int64_t panel, int64_t b, const float* x_scales,
               const float* x_sums, int64_t rows, int64_t m, float (*sums)[PANEL]) {
    for (int64_t i = 0; i < PANEL; i += 16) {
        Floats scale[SEGMENTS], zero[SEGMENTS];
        for (int s = 0; s < SEGMENTS; s++) {
            int64_t at = w.at(panel, b * BLOCK + s * w.segment) + i;
            scale[s] = load_halves(w.scales + at), zero[s] = widened<Floats>(w.zeros + at);
        }
        for (int64_t r = 0; r < rows; r++) {
            Floats total = all(0);
#pragma GCC unroll 8
            for (int s = 0; s < SEGMENTS; s++) {
                Floats product = to_floats(load(dots[s][r] + i));
                if constexpr (!Unit::TAKES_SIGNED)  // still an integer, and exact
                    product = multiply_add(product, zero[s], all(-x_sums[s * m + r]));
                total = multiply_add(total, product, scale[s]);
            }
            store(sums[r] + i, multiply_add(load(sums[r] + i), total, all(x_scales[r])));
        }
    }
}

void write_rows(const float (*sums)[PANEL], int64_t rows, const Int4Weight& w, const bf16* bias, int64_t column,
                bf16* out, int64_t n) {
    for (int64_t i = column; i < std::min(n, column + PANEL); i += 16) {
        Floats factor = load(w.factors + i), shift = bias ? load16(bias + i, n - i) : all(0);
        for (int64_t r = 0; r < rows; r++)
            store16(out + r * n + i, multiply_add(shift, load(sums[r] + i - column), factor), n - i);
    }
}

// f<SEGMENTS>() for as many segments as a block has.
template <class F>
auto with_segments(int64_t segments, F&& f) {
    return segments == 1   ? f.template operator()<1>()
           : segments == 2 ? f.template operator()<2>()
           : segments == 4 ? f.template operator()<4>()
                           : f.template operator()<8>();
}

// The products of one row and a panel, by the same sums without bytes in between.
template <int SEGMENTS>
[[gnu::noinline]] void multiply_row(const Activations& x, const Int4Weight& w, int64_t panel, float* sums) {
    constexpr int HALF = SEGMENTS > 1 ? SEGMENTS / 2 : 1;  // segments of a half of a block, if not of both
    Floats totals[2] = {all(0), all(0)};
    for (int64_t b = 0; b < w.blocks; b++) {
        const uint8_t* codes = w.block(panel, b);
        const Value* values = x.values + b * BLOCK;
        Ints dots[2 * HALF][2];
#pragma GCC unroll 8
        for (int s = 0; s < HALF; s++) {
            Ints low[2] = {all_ints(0), all_ints(0)}, high[2] = {all_ints(0), all_ints(0)};
            for (int64_t i = 0; i < BLOCK / 2 / HALF; i += 4, codes += 4 * PANEL, values += 4)
#pragma GCC unroll 2
                for (int64_t c = 0; c < 2; c++) {
                    prefetch(codes + AHEAD + 64 * c);
                    Ints pairs = get<Ints>(codes + 64 * c);
                    low[c] = add_products(low[c], low_halves(pairs), values);
                    high[c] = add_products(high[c], high_halves(pairs), values + BLOCK / 2);
                }
            for (int c = 0; c < 2; c++) dots[s][c] = low[c], dots[HALF + s][c] = high[c];
        }
        for (int c = 0; c < 2; c++) {
            Floats total = all(0);
            if constexpr (SEGMENTS == 1) dots[0][c] = dots[0][c] + dots[1][c];
#pragma GCC unroll 8
            for (int s = 0; s < SEGMENTS; s++) {
                int64_t at = w.at(panel, b * BLOCK + s * w.segment) + 16 * c;
                Floats product = multiply_add(to_floats(dots[s][c]), widened<Floats>(w.zeros + at),
                                              all(-x.sums[b * SEGMENTS + s]));
                total = multiply_add(total, product, load_halves(w.scales + at));
            }
            totals[c] = multiply_add(totals[c], total, all(x.scales[b]));
        }
    }
    store(sums, totals[0]);
    store(sums + 16, totals[1]);
}

void multiply_row(const Activations& x, const Int4Weight& w, const bf16* bias, bf16* out, int64_t n) {
    parallel_for(ceil_div(n, PANEL), 2, [&](int64_t panel) {
        alignas(64) float sums[1][PANEL];
        with_segments(BLOCK / w.segment, [&]<int SEGMENTS>() { multiply_row<SEGMENTS>(x, w, panel, sums[0]); });
        write_rows(sums, 1, w, bias, panel * PANEL, out, n);
    });
}

template <class Unit>
void multiply(const Activations& x, const Int4Weight& w, const bf16* bias, bf16* out, int64_t m, int64_t n) {
    int64_t parts = ceil_div(m, MOST_ROWS), panels = ceil_div(n, PANEL);
    int64_t some = ceil_div(m, parts) * w.blocks * BLOCK <= CACHE ? 1 : SOME_PANELS, tasks = ceil_div(panels, some);
    parallel_for(parts * tasks, 2, [&](int64_t task) {
        static thread_local std::vector<float> buffer(SOME_PANELS * MOST_ROWS * PANEL);
        alignas(64) typename Unit::Sums dots[2][BLOCK / 16];
        alignas(64) uint8_t codes[2 * BYTES];
        int64_t start = task / tasks * m / parts, rows = (task / tasks + 1) * m / parts - start;
        int64_t first = task % tasks * some, last = std::min(panels, first + some);
        int64_t tiles = ceil_div(rows, Unit::ROWS), segments = BLOCK / w.segment;
        auto sums = (float (*)[PANEL])buffer.data();  // [panels, rows, PANEL]
        std::fill(sums[0], sums[(last - first) * rows], 0.0f);
        auto add = with_segments(segments, []<int SEGMENTS>() { return add_block<Unit, SEGMENTS>; });
        Unit unit;
        for (int64_t b = 0; b < w.blocks; b++)
            for (int64_t panel = first; panel < last; panel++) {
                unpack<Unit::TAKES_SIGNED>(w, panel, b, codes);
                for (int64_t tile = 0, row = 0, end; tile <= tiles; tile++) {  // added after the next is multiplied
                    int64_t before = row;
                    row = tile * rows / tiles, end = (tile + 1) * rows / tiles;
                    const Value* values = x.values + (b * m + start + row) * BLOCK;
                    if (tile < tiles) unit.multiply(values, end - row, codes, w.segment, dots[tile % 2]);
                    if (tile > 0)
                        add(dots[(tile + 1) % 2], w, panel, b, &x.scales[b * m + start + before],
                                        &x.sums[b * segments * m + start + before], row - before, m,
                                        sums + (panel - first) * rows + before);
                }
            }
        for (int64_t panel = first; panel < last; panel++, sums += rows)
            write_rows(sums, rows, w, bias, panel * PANEL, out + start * n, n);
    });
}

// out [m, n] = x [m, k] (rows ldx apart) times a packed weight's transpose, plus bias [n] if there is one.
EXPORT void linear_int4(const bf16* x, int64_t ldx, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros,
                        const float* factors, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k,
                        int64_t group) {
    static thread_local Activations activations;
    Int4Weight w{codes, zeros, scales, factors, ceil_div(k, BLOCK), group};
    activations.quantize(x, ldx, m, k, w);
    if (m == 1) return multiply_row(activations, w, bias, out, n);
#ifdef WITH_AMX
    if (amx::is_usable && m >= MATRIX_ROWS) return multiply<Matrices>(activations, w, bias, out, m, n);
#endif
    multiply<Dots>(activations, w, bias, out, m, n);
}

REPLAYABLE(linear_int4)

}  // namespace int4
