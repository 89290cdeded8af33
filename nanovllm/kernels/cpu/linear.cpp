// Linear layers over weights that were reordered once, in bf16 or int8.
//
// A weight [N, K] is kept as panels of 32 rows; in a panel the rows' pairs of bf16 (or quadruples of int8) along K
// follow each other, as the dot-product instructions take them: [N / 32, K / 2, 32, 2]. A panel fills exactly the
// memory of its rows, so that bf16 weights are reordered in place. Activations get the same order within a tile.
//
// Legend: a product is [M, K] activations times the transpose of an [N, K] weight. K is a multiple of 4; if N is none of
// 32, rows of zeros fill the weight's last panel, and there are no outputs for them.

#include "amx.h"
#include "common.h"

namespace {

constexpr int64_t PANEL = 32;       // columns of a product that a tile computes: two registers of fp32
constexpr int64_t TILE_ROWS = 12;   // rows of a tile: 12 x 2 sums leave registers for the operands
constexpr int64_t TASK_TILES = 20;  // tiles that a thread computes with one panel: their rows then stay in its L2
constexpr int64_t GROUP = 128;      // activations that share a scale in an int8 product

// Fetches weights from memory while others are worked with: a tile that has its panel to itself those that it comes to
// soon, several tiles of one panel each its share of the next panel. Every step is 128 bytes of the tile's own panel.
struct Prefetch {
    const char* next;
    int64_t pace;

    Prefetch(const void* panel, int64_t bytes, int64_t row, int64_t rows, int64_t m)
        : next((const char*)panel + (rows == m ? 4096 : bytes + bytes * row / m)), pace(128 * rows / m) {}

    void step() {
        _mm_prefetch(next, _MM_HINT_T1);
        _mm_prefetch(next + 64, _MM_HINT_T1);
        next += pace;
    }
};

inline int64_t first_row(int64_t tile, int64_t tiles, int64_t m) { return tile * m / tiles; }

template <int R>
void tile_bf16(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int64_t n, int64_t columns, int64_t k,
               Prefetch ahead) {
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        sums[r][0] = bias ? load16(bias, columns) : _mm512_setzero_ps();
        sums[r][1] = bias ? load16(bias + 16, columns - 16) : _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL, x += 2 * R) {
        ahead.step();
        __m512bh w0 = load32(w), w1 = load32(w + PANEL);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            __m512bh a = broadcast_pair(x + 2 * r);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], w0, a);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], w1, a);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        __m512i row = (__m512i)_mm512_cvtne2ps_pbh(sums[r][1], sums[r][0]);
        _mm512_mask_storeu_epi16(out + r * n, lanes32(columns), row);
    }
}

struct Int8Weight {
    const int8_t* values;         // [N / 32, K / 4, 32, 4]
    const float* scales;          // [N]
    const int32_t* compensation;  // [N / 32, K / GROUP, 32]: -128 times the sum of a group's values
};

// The exact sums of one group, by themselves: together with the fp32 sums they would not fit the registers.
template <int R>
[[gnu::noinline]] void group_int8(const uint8_t* x, const int8_t* values, const int32_t* start, int64_t size,
                                  int32_t (*dots)[PANEL], Prefetch& ahead) {
    __m512i sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        sums[r][0] = _mm512_loadu_si512(start);
        sums[r][1] = _mm512_loadu_si512(start + 16);
    }
    for (int64_t i = 0; i < size; i += 4, values += 4 * PANEL, x += 4 * R) {
        ahead.step();
        __m512i w0 = _mm512_loadu_si512(values), w1 = _mm512_loadu_si512(values + 2 * PANEL);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t four;
            std::memcpy(&four, x + 4 * r, 4);
            __m512i a = _mm512_set1_epi32(four);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], a, w0);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], a, w1);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        _mm512_storeu_si512(dots[r], sums[r][0]);
        _mm512_storeu_si512(dots[r] + 16, sums[r][1]);
    }
}

template <int R>
void tile_int8(const uint8_t* x, const float* x_scales, const Int8Weight& w, int64_t panel, const bf16* bias,
               bf16* out, int64_t n, int64_t k, Prefetch ahead) {
    int64_t groups = (k + GROUP - 1) / GROUP;
    const int8_t* values = w.values + panel * PANEL * k;
    const int32_t* start = w.compensation + panel * PANEL * groups;
    alignas(64) int32_t dots[R][PANEL];
    alignas(64) float sums[R][PANEL] = {};
    for (int64_t g = 0; g < groups; g++, start += PANEL) {
        int64_t size = std::min(GROUP, k - g * GROUP);
        group_int8<R>(x + g * GROUP * R, values + g * GROUP * PANEL, start, size, dots, ahead);
        for (int r = 0; r < R; r++)
            for (int i = 0; i < PANEL; i++) sums[r][i] = std::fma(float(dots[r][i]), x_scales[g * R + r], sums[r][i]);
    }
    for (int r = 0; r < R; r++)
        for (int64_t i = 0; i < PANEL; i += 16) {
            __m512 scale = _mm512_loadu_ps(w.scales + panel * PANEL + i);
            int64_t column = panel * PANEL + i;
            __m512 shift = bias ? load16(bias + column, n - column) : _mm512_setzero_ps();
            store16(out + r * n + i, _mm512_fmadd_ps(_mm512_load_ps(sums[r] + i), scale, shift), n - column);
        }
}

// For each tile of at most `most` rows: f(its first row, its number of rows), in parallel.
template <class F>
void for_tiles(int64_t m, int64_t most, F&& f) {
    int64_t tiles = (m + most - 1) / most;
    parallel_for(tiles, 4, [&](int64_t t) {
        f(first_row(t, tiles, m), first_row(t + 1, tiles, m) - first_row(t, tiles, m));
    });
}

// For each tile of rows and each panel of columns: f(first row, rows, panel), in parallel.
template <class F>
void for_products(int64_t m, int64_t n, F&& f) {
    int64_t tiles = (m + TILE_ROWS - 1) / TILE_ROWS, blocks = (tiles + TASK_TILES - 1) / TASK_TILES;
    int64_t panels = (n + PANEL - 1) / PANEL;
    parallel_for(blocks * panels, 2, [&](int64_t i) {
        int64_t block = i / panels;
        for (int64_t t = first_row(block, blocks, tiles); t < first_row(block + 1, blocks, tiles); t++) {
            int64_t row = first_row(t, tiles, m);
            f(row, first_row(t + 1, tiles, m) - row, i % panels);
        }
    });
}

}  // namespace

// Whether products are computed by AMX where the processor has it.
EXPORT void set_amx(int64_t is_wanted) { has_amx = is_wanted && amx::is_possible(); }

// Reorders a [n, k] weight in place; here n is a multiple of 32.
EXPORT void pack_bf16(bf16* w, int64_t n, int64_t k) {
    parallel_for(n / PANEL, 2, [&](int64_t panel) {
        bf16* to = w + panel * PANEL * k;
        std::vector<bf16> rows(to, to + PANEL * k);
        for (int64_t i = 0; i < k; i += 2)
            for (int64_t row = 0; row < PANEL; row++, to += 2) std::memcpy(to, &rows[row * k + i], 4);
    });
}

// Quantises a [n, k] weight, each row by its largest value, into the arrays of an Int8Weight; n likewise.
EXPORT void pack_int8(const bf16* w, int64_t n, int64_t k, int8_t* values, float* scales, int32_t* compensation) {
    int64_t groups = (k + GROUP - 1) / GROUP;
    parallel_for(n, 2, [&](int64_t row) {
        int64_t panel = row / PANEL, lane = row % PANEL;
        float largest = 0;
        for (int64_t i = 0; i < k; i++) largest = std::max(largest, std::abs(to_float(w[row * k + i])));
        float scale = scales[row] = largest > 0 ? largest / 127 : 1;
        for (int64_t g = 0; g < groups; g++) {
            int32_t sum = 0;
            for (int64_t i = g * GROUP; i < std::min(k, (g + 1) * GROUP); i++) {
                int8_t value = int8_t(std::nearbyint(to_float(w[row * k + i]) / scale));
                values[panel * PANEL * k + (i / 4 * PANEL + lane) * 4 + i % 4] = value;
                sum += value;
            }
            compensation[(panel * groups + g) * PANEL + lane] = -128 * sum;
        }
    });
}

// out [m, n] = x [m, k] (rows ldx apart) times a packed weight's transpose, plus bias [n] if there is one.
EXPORT void linear_bf16(const bf16* x, int64_t ldx, const bf16* w, const bf16* bias, bf16* out, int64_t m, int64_t n,
                        int64_t k) {
    if (has_amx && k % 32 == 0) return amx::linear_bf16(x, ldx, w, bias, out, m, n, k);
    static thread_local std::vector<bf16> buffer;
    buffer.resize(m * k);
    bf16* packed = buffer.data();
    for_tiles(m, TILE_ROWS, [&](int64_t row, int64_t rows) {
        bf16* to = packed + row * k;
        for (int64_t i = 0; i < k; i += 2)
            for (int64_t r = 0; r < rows; r++, to += 2) std::memcpy(to, x + (row + r) * ldx + i, 4);
    });
    for_products(m, n, [&](int64_t row, int64_t rows, int64_t panel) {
        const bf16 *values = w + panel * PANEL * k, *shift = bias ? bias + panel * PANEL : nullptr;
        Prefetch ahead(values, 2 * PANEL * k, row, rows, m);
        with_rows<TILE_ROWS>(rows, [&]<int R>() {
            int64_t column = panel * PANEL;
            tile_bf16<R>(packed + row * k, values, shift, out + row * n + column, n, n - column, k, ahead);
        });
    });
}

// The same with an int8 weight; activations are quantised here, each group of a row by its largest value.
EXPORT void linear_int8(const bf16* x, int64_t ldx, const int8_t* values, const float* scales,
                        const int32_t* compensation, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k) {
    static thread_local std::vector<uint8_t> buffer;
    static thread_local std::vector<float> scale_buffer;
    int64_t groups = (k + GROUP - 1) / GROUP;
    buffer.resize(m * k);
    scale_buffer.resize(m * groups);
    uint8_t* packed = buffer.data();
    float* x_scales = scale_buffer.data();
    Int8Weight w{values, scales, compensation};
    bool use_amx = has_amx && k % 64 == 0;
    for_tiles(m, use_amx ? 1 : TILE_ROWS, [&](int64_t row, int64_t rows) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < groups; g++) {
                const bf16* from = x + (row + r) * ldx + g * GROUP;
                int64_t size = std::min(GROUP, k - g * GROUP);
                uint16_t largest = 0;  // of bf16 without their signs, which order as integers do
                for (int64_t i = 0; i < size; i++) largest = std::max<uint16_t>(largest, from[i] & 0x7fff);
                float scale = largest ? to_float(largest) / 127 : 1;
                x_scales[row * groups + g * rows + r] = scale;
                float inverse = 1 / scale;
                uint8_t* to = packed + row * k + g * GROUP * rows + 4 * r;
                for (int64_t i = 0; i < size; i += 4, to += 4 * rows)
                    for (int64_t j = 0; j < 4; j++)
                        to[j] = uint8_t(int32_t(std::nearbyint(to_float(from[i + j]) * inverse)) + 128);
            }
    });
    if (use_amx) return amx::linear_int8(packed, x_scales, values, scales, compensation, bias, out, m, n, k);
    for_products(m, n, [&](int64_t row, int64_t rows, int64_t panel) {
        Prefetch ahead(values + panel * PANEL * k, PANEL * k, row, rows, m);
        with_rows<TILE_ROWS>(rows, [&]<int R>() {
            tile_int8<R>(packed + row * k, x_scales + row * groups, w, panel, bias,
                         out + row * n + panel * PANEL, n, k, ahead);
        });
    });
}

// Rows ids[t] of a packed [*, k] bf16 weight: out [t, k].
EXPORT void rows_bf16(const bf16* w, const int64_t* ids, bf16* out, int64_t num_ids, int64_t k) {
    parallel_for(num_ids, 5, [&](int64_t t) {
        const bf16* from = w + ids[t] / PANEL * PANEL * k + ids[t] % PANEL * 2;
        for (int64_t i = 0; i < k; i += 2) std::memcpy(out + t * k + i, from + i * PANEL, 4);
    });
}

EXPORT void rows_int8(const int8_t* values, const float* scales, const int64_t* ids, bf16* out, int64_t num_ids,
                      int64_t k) {
    parallel_for(num_ids, 5, [&](int64_t t) {
        const int8_t* from = values + ids[t] / PANEL * PANEL * k + ids[t] % PANEL * 4;
        for (int64_t i = 0; i < k; i++) {
            __m512 value = _mm512_set1_ps(scales[ids[t]] * from[i / 4 * PANEL * 4 + i % 4]);
            out[t * k + i] = bf16(_mm256_extract_epi16(narrow(value), 0));
        }
    });
}

REPLAYABLE(linear_bf16)
REPLAYABLE(linear_int8)
REPLAYABLE(rows_bf16)
REPLAYABLE(rows_int8)
