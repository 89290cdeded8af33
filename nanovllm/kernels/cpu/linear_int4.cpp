// Linear layers over weights of 4 bits: w = (code - zero) * scale * factor, with a scale and a zero point for each group
// of inputs of an output, and a factor, a power of two, for each output, which makes fp16 wide enough for the scales.
//
// A weight [N, K] is kept as panels of 32 rows by blocks of 128 inputs, [N / 32, K / 128, 16, 32, 4] bytes: their low
// halves are the codes of a block's first 64 inputs, in quadruples along K as the dot-product instructions take them, the
// high ones those of the others. Activations are quantised to int8 here, each block of a row by its largest value.
//
// The inputs that share all scales are a segment, a divisor of 128. Its products are added up in integers, and those of
// the segments in fp32, in their order, one row as any other: results depend on neither the rows nor the instructions.
//
// Legend: a product is [M, K] activations times the transpose of an [N, K] weight. Weights are filled up with zeros to
// whole panels and blocks, activations to whole blocks. Groups are of a multiple of 16 inputs.

#include <numeric>

#include "amx.h"
#include "common.h"

namespace {

constexpr int64_t PANEL = 32, BLOCK = 128, BYTES = PANEL * BLOCK / 2;  // of a panel's block
constexpr int64_t MOST_ROWS = 256;                                     // that a thread computes with one panel
constexpr int64_t CACHE = 1 << 20;   // what a thread keeps of activations in its L2; of more, one block at a time
constexpr int64_t SOME_PANELS = 8;   // and the block's products with so many panels
constexpr int64_t MATRIX_ROWS = 13;  // or more are worth the matrix units' setting up
constexpr int64_t AHEAD = 4096;      // bytes from the weights in use to those that are fetched

using Floats = __m512;
using Ints = __m512i;

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats multiply_add(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats load_bytes(const uint8_t* x) { return to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128((__m128i*)x))); }
inline Floats load_halves(const uint16_t* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
inline void store_bytes(uint8_t* to, Floats x) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline uint16_t to_half(float x) { return _mm256_extract_epi16(_mm512_cvtps_ph(all(x), 8), 0); }
inline float from_half(uint16_t x) { return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(x))); }
inline Ints dot(Ints sum, Ints codes, Ints x) { return _mm512_dpbusd_epi32(sum, codes, x); }
inline Ints load_quads(const uint8_t* x) { return _mm512_loadu_si512(x); }
inline Ints broadcast_quad(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Int4Weight {
    const uint8_t *codes, *zeros;  // zeros and scales: [N / 32, G, 32]
    const uint16_t* scales;        // fp16
    const float* factors;          // [N]
    int64_t blocks, group, segment = std::gcd(BLOCK, group), groups = ceil_div(blocks * BLOCK, group);

    const uint8_t* block(int64_t panel, int64_t b) const { return codes + (panel * blocks + b) * BYTES; }
    int64_t at(int64_t panel, int64_t k) const { return (panel * groups + k / group) * PANEL; }  // in zeros and scales
};

// B = K / 128 blocks of [M, 128], each row of them 64 bytes after 64 of another.
struct Activations {
    std::vector<int8_t> buffer;
    std::vector<float> scales, sums;  // [B, M] and [B, 128 / segment, M]
    int8_t* values;

    // Of x, [m, k] with rows ldx apart.
    void quantize(const bf16* x, int64_t ldx, int64_t m, int64_t k, const Int4Weight& w) {
        int64_t segments = BLOCK / w.segment;
        buffer.resize(w.blocks * m * BLOCK + 64);
        scales.resize(w.blocks * m);
        sums.resize(w.blocks * m * segments);
        values = buffer.data() + (-(uintptr_t)buffer.data() & 63);
        parallel_for(m, 4, [&](int64_t row) {
            for (int64_t b = 0; b < w.blocks; b++) {
                bf16 from[BLOCK] = {};
                std::copy_n(x + row * ldx + b * BLOCK, std::min(BLOCK, k - b * BLOCK), from);
                uint16_t largest = 0;  // of bf16 without their signs, which order as integers do
                for (int64_t i = 0; i < BLOCK; i++) largest = std::max<uint16_t>(largest, from[i] & 0x7fff);
                float scale = scales[b * m + row] = largest ? to_float(largest) / 127 : 1, inverse = 1 / scale;
                int8_t* to = values + (b * m + row) * BLOCK;
                for (int64_t i = 0; i < BLOCK; i++) to[i] = int8_t(int32_t(std::nearbyint(to_float(from[i]) * inverse)));
                for (int64_t s = 0; s < segments; s++)
                    sums[(b * segments + s) * m + row] = std::accumulate(to + s * w.segment, to + (s + 1) * w.segment, 0);
            }
        });
    }
};

// The sums of a segment's products by dot-product instructions.
struct Dots {
    static constexpr int64_t ROWS = 12;  // of a tile: their sums leave registers for the operands
    static constexpr bool TAKES_SIGNED = false;

    void multiply(const int8_t* x, int64_t rows, const uint8_t* codes, int64_t size, int32_t (*dots)[PANEL]) {
        with_rows<ROWS>(rows, [&]<int R>() {
            Ints sums[R][2] = {};
            for (int64_t i = 0; i < size; i += 4, codes += 4 * PANEL) {
                Ints w0 = load_quads(codes), w1 = load_quads(codes + 2 * PANEL);
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    Ints a = broadcast_quad(x + r * BLOCK + i);
                    sums[r][0] = dot(sums[r][0], w0, a);
                    sums[r][1] = dot(sums[r][1], w1, a);
                }
            }
            std::memcpy(dots, sums, sizeof sums);
        });
    }
};

#ifdef HAS_AMX

// The same by matrix units.
struct Matrices {
    static constexpr int64_t ROWS = amx::ROWS;
    static constexpr bool TAKES_SIGNED = true;
    amx::Tiles tiles;

    void multiply(const int8_t* x, int64_t rows, const uint8_t* codes, int64_t size, int32_t (*dots)[PANEL]) {
        tiles.configure(rows, std::min(size, amx::STEP));
        rows > 16 ? multiply<true>(x, codes, size, dots) : multiply<false>(x, codes, size, dots);
    }

    template <bool HAS_SECOND>
    void multiply(const int8_t* x, const uint8_t* codes, int64_t size, int32_t (*dots)[PANEL]) {
        asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
        for (int64_t i = 0; i < size; i += amx::STEP, codes += amx::PANEL_STEP) {
            amx::load<6>(codes, 4 * PANEL);
            amx::load<4>(x + i, BLOCK);
            asm volatile("tdpbssd %%tmm6, %%tmm4, %%tmm0" ::);
            amx::load<7>(codes + 2 * PANEL, 4 * PANEL);
            asm volatile("tdpbssd %%tmm7, %%tmm4, %%tmm1" ::);
            if constexpr (HAS_SECOND) {
                amx::load<5>(x + 16 * BLOCK + i, BLOCK);
                asm volatile("tdpbssd %%tmm6, %%tmm5, %%tmm2" ::);
                asm volatile("tdpbssd %%tmm7, %%tmm5, %%tmm3" ::);
            }
        }
        amx::store_sums<HAS_SECOND>(dots);
    }
};

#endif

// The 4096 codes of a panel's block, in bytes, less their zero points if SIGNED; what comes soon is fetched.
template <bool SIGNED>
void unpack(const Int4Weight& w, int64_t panel, int64_t b, uint8_t* to) {
    const uint8_t* from = w.block(panel, b);
    for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch(from + AHEAD + i, 0, 2);
    for (int64_t i = 0; i < BYTES; i++) to[i] = from[i] & 15;
    for (int64_t i = 0; i < BYTES; i++) to[BYTES + i] = from[i] >> 4;
    if constexpr (SIGNED)
        for (int64_t k = 0; k < BLOCK; k += w.segment) {
            uint8_t zeros[4 * PANEL];
            for (int64_t i = 0; i < 4 * PANEL; i++) zeros[i] = w.zeros[w.at(panel, b * BLOCK + k) + i / 4];
            for (int64_t j = k; j < k + w.segment; j += 4)
                for (int64_t i = 0; i < 4 * PANEL; i++) to[j * PANEL + i] -= zeros[i];
        }
}

// Adds a segment's products, of some rows and a panel.
template <bool SIGNED>
void add_segment(const int32_t (*dots)[PANEL], const uint16_t* scales, const uint8_t* zeros, const float* x_scales,
                 const float* x_sums, int64_t rows, float (*sums)[PANEL]) {
    for (int64_t i = 0; i < PANEL; i += 16) {
        Floats scale = load_halves(scales + i), zero = load_bytes(zeros + i);
        for (int64_t r = 0; r < rows; r++) {
            Floats total = to_floats(_mm512_loadu_si512(dots[r] + i));
            if constexpr (!SIGNED) total = multiply_add(total, zero, all(-x_sums[r]));  // still an integer, and exact
            store(sums[r] + i, multiply_add(load(sums[r] + i), total * scale, all(x_scales[r])));
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

template <class Unit>
void multiply(const Activations& x, const Int4Weight& w, const bf16* bias, bf16* out, int64_t m, int64_t n) {
    int64_t parts = ceil_div(m, MOST_ROWS), panels = ceil_div(n, PANEL);
    int64_t some = ceil_div(m, parts) * w.blocks * BLOCK <= CACHE ? 1 : SOME_PANELS, tasks = ceil_div(panels, some);
    parallel_for(parts * tasks, 2, [&](int64_t task) {
        static thread_local std::vector<float> buffer(SOME_PANELS * MOST_ROWS * PANEL);
        alignas(64) int32_t dots[Unit::ROWS][PANEL];
        alignas(64) uint8_t codes[2 * BYTES];
        int64_t start = task / tasks * m / parts, rows = (task / tasks + 1) * m / parts - start;
        int64_t first = task % tasks * some, last = std::min(panels, first + some);
        int64_t tiles = ceil_div(rows, Unit::ROWS), segments = BLOCK / w.segment;
        auto sums = (float (*)[PANEL])buffer.data();  // [panels, rows, PANEL]
        std::fill(sums[0], sums[(last - first) * rows], 0.0f);
        Unit unit;
        for (int64_t b = 0; b < w.blocks; b++)
            for (int64_t panel = first; panel < last; panel++) {
                unpack<Unit::TAKES_SIGNED>(w, panel, b, codes);
                for (int64_t tile = 0; tile < tiles; tile++) {
                    int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
                    const int8_t* values = x.values + (b * m + start + row) * BLOCK;
                    const float* x_scales = &x.scales[b * m + start + row];
                    for (int64_t s = 0; s < segments; s++) {
                        int64_t k = s * w.segment, at = w.at(panel, b * BLOCK + k);
                        unit.multiply(values + k, count, codes + k * PANEL, w.segment, dots);
                        add_segment<Unit::TAKES_SIGNED>(dots, w.scales + at, w.zeros + at, x_scales,
                                                        &x.sums[(b * segments + s) * m + start + row], count,
                                                        sums + (panel - first) * rows + row);
                    }
                }
            }
        for (int64_t panel = first; panel < last; panel++, sums += rows)
            write_rows(sums, rows, w, bias, panel * PANEL, out + start * n, n);
    });
}

// Puts a row's codes of a block to their places: input i is the low half of pairs[i], input 64 + i the high one.
inline void put_pairs(const uint8_t* pairs, int64_t lane, uint8_t* block) {
    for (int64_t i = 0; i < BLOCK / 2; i += 4) std::memcpy(block + i * PANEL + lane * 4, pairs + i, 4);
}

// As _quantize_4 in quantized.py: of some shrunken ranges the scale of the least squared error.
void quantize_group(const bf16* from, int64_t size, float factor, uint8_t* codes, uint16_t& half, uint8_t& zero) {
    Floats w[BLOCK / 16], low = all(0), high = all(0);
    for (int64_t i = 0; i < size / 16; i++) {
        w[i] = load16(from + 16 * i);
        low = smaller(low, w[i]), high = larger(high, w[i]);
    }
    float full = std::max(largest_of(high) + largest_of(all(0) - low), 1e-30f) / 15, least = INFINITY;
    float offset = std::nearbyint(largest_of(all(0) - low) / full), best = full;
    auto code_of = [&](Floats x, float scale) { return smaller(larger(nearest(x / all(scale)) + all(offset), all(0)), all(15)); };
    for (float shrink : {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.7f}) {
        Floats products = all(0), squares = all(0);
        for (int64_t i = 0; i < size / 16; i++) {
            Floats code = code_of(w[i], full * shrink) - all(offset);
            products = multiply_add(products, w[i], code), squares = multiply_add(squares, code, code);
        }
        // The best scale for these codes, and what it saves of the error: |w - s d|^2 = |w|^2 - 2 s wd + s^2 dd.
        float wd = sum_of(products), dd = sum_of(squares);
        float fitted = from_half(to_half(wd / std::max(dd, 1.0f) / factor)) * factor, error = fitted * (fitted * dd - 2 * wd);
        if (error < least && fitted > 0) least = error, best = fitted;
    }
    half = to_half(best / factor), zero = uint8_t(offset);
    for (int64_t i = 0; i < size / 16; i++) store_bytes(codes + 16 * i, code_of(w[i], from_half(half) * factor));
}

}  // namespace

// Reorders [n, blocks * 64] bytes, the low halves of which are the codes of even inputs; n is a multiple of 32.
EXPORT void pack_int4(uint8_t* codes, int64_t n, int64_t blocks) {
    parallel_for(n / PANEL, 2, [&](int64_t panel) {
        uint8_t *to = codes + panel * blocks * BYTES, pairs[BLOCK / 2];
        std::vector<uint8_t> rows(to, to + blocks * BYTES);
        for (int64_t lane = 0; lane < PANEL; lane++)
            for (int64_t b = 0; b < blocks; b++) {
                const uint8_t *low = &rows[(lane * blocks + b) * BLOCK / 2], *high = low + BLOCK / 4;
                for (int64_t i = 0; i < BLOCK / 4; i++) {
                    pairs[2 * i] = (low[i] & 15) | high[i] << 4;
                    pairs[2 * i + 1] = low[i] >> 4 | (high[i] & 0xf0);
                }
                put_pairs(pairs, lane, to + b * BYTES);
            }
    });
}

// Quantises a [n, k] weight into the arrays of an Int4Weight, which are zeros; n likewise, groups divide k and 128.
EXPORT void quantize_int4(const bf16* w, int64_t n, int64_t k, uint8_t* codes, uint16_t* scales, uint8_t* zeros,
                          float* factors, int64_t size) {
    int64_t blocks = ceil_div(k, BLOCK), groups = blocks * BLOCK / size;
    parallel_for(n / PANEL, 2, [&](int64_t panel) {
        for (int64_t row = panel * PANEL; row < (panel + 1) * PANEL; row++) {
            const bf16* from = w + row * k;
            uint16_t largest = 0;
            for (int64_t i = 0; i < k; i++) largest = std::max<uint16_t>(largest, from[i] & 0x7fff);
            float factor = factors[row] = std::ldexp(1.0f, std::max(-100, largest ? std::ilogb(to_float(largest)) : 0) - 14);
            for (int64_t b = 0; b < blocks; b++) {
                uint8_t found[BLOCK] = {}, pairs[BLOCK / 2];
                for (int64_t i = 0; i < std::min(BLOCK, k - b * BLOCK); i += size) {
                    int64_t at = (panel * groups + (b * BLOCK + i) / size) * PANEL + row % PANEL;
                    quantize_group(from + b * BLOCK + i, size, factor, found + i, scales[at], zeros[at]);
                }
                for (int64_t i = 0; i < BLOCK / 2; i++) pairs[i] = found[i] | found[BLOCK / 2 + i] << 4;
                put_pairs(pairs, row % PANEL, codes + (panel * blocks + b) * BYTES);
            }
        }
    });
}

// out [m, n] = x [m, k] (rows ldx apart) times a packed weight's transpose, plus bias [n] if there is one.
EXPORT void linear_int4(const bf16* x, int64_t ldx, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros,
                        const float* factors, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k,
                        int64_t group) {
    static thread_local Activations activations;
    Int4Weight w{codes, zeros, scales, factors, ceil_div(k, BLOCK), group};
    activations.quantize(x, ldx, m, k, w);
#ifdef HAS_AMX
    if (has_amx && m >= MATRIX_ROWS) return multiply<Matrices>(activations, w, bias, out, m, n);
#endif
    multiply<Dots>(activations, w, bias, out, m, n);
}

// Rows ids[t] of a packed weight: out [t, k].
EXPORT void rows_int4(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const float* factors,
                      const int64_t* ids, bf16* out, int64_t num_ids, int64_t k, int64_t group) {
    Int4Weight w{codes, zeros, scales, factors, ceil_div(k, BLOCK), group};
    parallel_for(num_ids, 5, [&](int64_t t) {
        int64_t panel = ids[t] / PANEL, lane = ids[t] % PANEL;
        for (int64_t i = 0; i < k; i++) {
            int64_t j = i % BLOCK, at = w.at(panel, i) + lane;
            uint8_t pair = w.block(panel, i / BLOCK)[(j % (BLOCK / 2) / 4 * PANEL + lane) * 4 + j % 4];
            float value = float((j < BLOCK / 2 ? pair & 15 : pair >> 4) - zeros[at]) * from_half(scales[at]);
            out[t * k + i] = bf16(_mm256_extract_epi16(narrow(all(value * factors[ids[t]])), 0));
        }
    });
}

REPLAYABLE(linear_int4)
REPLAYABLE(rows_int4)
