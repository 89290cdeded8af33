// Products of linear.cpp by the matrix units of newer Xeons (AMX), which take its weights as they are.
//
// Two of their tiles, of 16 rows of 64 bytes, are 32 columns of a panel by 32 values of K in bf16 or 64 in int8, or 32
// rows of activations, in the usual order, by as many values; four are the sums.
//
// Products of bf16 are summed in another order than without these units, though in the same for any number of rows: so a
// weight is multiplied either always here or never. Sums of int8 are exact.

#pragma once

#include "common.h"

#if defined(__linux__) && defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)

#include <cpuid.h>
#include <sys/syscall.h>

namespace amx {

constexpr int64_t ROWS = 32, COLUMNS = 32;  // of a product, computed at a time
constexpr int64_t STEP = 64;                // bytes of a row of activations that are multiplied at a time,
constexpr int64_t PANEL_STEP = 2048;        // and those of a panel of weights
constexpr int64_t BLOCK = 256;              // rows that a thread computes with one panel: they then stay in its L2
alignas(64) constexpr float zeros[COLUMNS] = {};
constexpr int64_t GROUP = 128;              // activations that share a scale in an int8 product

// Whether the processor has the units and the system lets this process use them.
inline bool is_possible() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl; for all threads
    constexpr unsigned FEATURES = 1 << 22 | 1 << 24 | 1 << 25;   // bf16, tiles, int8
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & FEATURES) == FEATURES &&
           !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

// Not as intrinsics, of which compilers disagree what memory they touch, and which want flags of their own.
template <int TILE>
inline void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <bool IS_INT8, int SUMS, int X, int W>
inline void multiply() {
    if constexpr (IS_INT8)  // unsigned by signed
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(W));
    else
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(W));
}

// A thread's tiles: 0 and 1 the sums of the first 16 rows, 2 and 3 of the others, 4 and 5 their activations, 6 and 7
// weights. Other libraries set them up in their own way, so that each task begins and ends with them.
class Tiles {
  public:
    ~Tiles() { asm volatile("tilerelease" ::); }

    void configure(int64_t wanted) {
        if (rows == wanted) return;
        rows = wanted;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {};
        } tiles;
        uint8_t first = std::min<int64_t>(rows, 16), second = std::max<int64_t>(rows - 16, 1);
        for (int i : {0, 1, 4}) tiles.rows[i] = first;
        for (int i : {2, 3, 5}) tiles.rows[i] = second;
        tiles.rows[6] = tiles.rows[7] = 16;
        asm volatile("ldtilecfg %0" ::"m"(tiles));
    }

  private:
    int64_t rows = 0;
};

// Fetches weights from memory while others are worked with: one of several tiles of rows its share of the next panel.
struct Prefetch {
    const char* next;
    int64_t bytes;  // in a step

    Prefetch(const char* panel, int64_t panel_bytes, int64_t tile, int64_t tiles)
        : next(panel + (tiles == 1 ? 8192 : panel_bytes + panel_bytes * tile / tiles)), bytes(PANEL_STEP / tiles) {}

    void step() {
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
        next += bytes;
    }
};

// Adds to the sums the products of activations, rows `stride` bytes apart, and a panel's weights; more than 16 rows if
// HAS_SECOND.
template <bool IS_INT8, bool HAS_SECOND>
inline void multiply_steps(const char* x, int64_t stride, const char* w, int64_t steps, Prefetch& ahead) {
    for (int64_t i = 0; i < steps; i++, x += STEP, w += PANEL_STEP) {
        load<6>(w, PANEL_STEP / 16);
        load<4>(x, stride);
        ahead.step();
        multiply<IS_INT8, 0, 4, 6>();
        load<7>(w + 64, PANEL_STEP / 16);
        multiply<IS_INT8, 1, 4, 7>();
        if constexpr (HAS_SECOND) {
            load<5>(x + 16 * stride, stride);
            multiply<IS_INT8, 2, 5, 6>();
            multiply<IS_INT8, 3, 5, 7>();
        }
    }
}

// Sums begin with the same 32 values for each row.
template <bool HAS_SECOND>
inline void load_sums(const void* values) {
    load<0>(values, 0);
    load<1>((const char*)values + 64, 0);
    if constexpr (HAS_SECOND) {
        load<2>(values, 0);
        load<3>((const char*)values + 64, 0);
    }
}

// Sums [rows, COLUMNS], fp32 or int32.
template <bool HAS_SECOND>
inline void store_sums(void* sums) {
    char* to = (char*)sums;
    store<0>(to, 4 * COLUMNS);
    store<1>(to + 64, 4 * COLUMNS);
    if constexpr (HAS_SECOND) {
        store<2>(to + 64 * COLUMNS, 4 * COLUMNS);
        store<3>(to + 64 * COLUMNS + 64, 4 * COLUMNS);
    }
}

// For each tile of rows and each panel of columns: f(first row, rows, panel, what to fetch), in parallel.
template <class F>
void for_products(int64_t m, int64_t n, const void* w, int64_t panel_bytes, F&& f) {
    int64_t blocks = (m + BLOCK - 1) / BLOCK, size = (m + blocks * ROWS - 1) / (blocks * ROWS) * ROWS;
    int64_t panels = (n + COLUMNS - 1) / COLUMNS;
    parallel_for(blocks * panels, 2, [&](int64_t i) {
        int64_t panel = i % panels, start = i / panels * size, end = std::min(m, start + size);
        const char* values = (const char*)w + panel * panel_bytes;
        Tiles tiles;
        for (int64_t row = start; row < end; row += ROWS) {
            int64_t rows = std::min(ROWS, end - row);
            tiles.configure(rows);
            Prefetch ahead(values, panel_bytes, (row - start) / ROWS, (end - start + ROWS - 1) / ROWS);
            if (rows > 16)
                f.template operator()<true>(row, rows, panel, values, ahead);
            else
                f.template operator()<false>(row, rows, panel, values, ahead);
        }
    });
}

// See linear.cpp; k is a multiple of 32.
inline void linear_bf16(const bf16* x, int64_t ldx, const bf16* w, const bf16* bias, bf16* out, int64_t m, int64_t n,
                        int64_t k) {
    for_products(m, n, w, 2 * COLUMNS * k, [&]<bool HAS_SECOND>(int64_t row, int64_t rows, int64_t panel,
                                                                const char* values, Prefetch& ahead) {
        alignas(64) float sums[ROWS][COLUMNS];
        load_sums<HAS_SECOND>(zeros);
        multiply_steps<false, HAS_SECOND>((const char*)(x + row * ldx), 2 * ldx, values, 2 * k / STEP, ahead);
        store_sums<HAS_SECOND>(sums);
        int64_t column = panel * COLUMNS;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < COLUMNS; i += 16) {
                __m512 sum = _mm512_load_ps(sums[r] + i);
                if (bias) sum = _mm512_add_ps(sum, load16(bias + column + i, n - column - i));
                store16(out + (row + r) * n + column + i, sum, n - column - i);
            }
    });
}

// out [m, n] from quantised activations [m, k] and their scales [m, k / GROUP], both of whose rows follow each other,
// and the arrays of an Int8Weight; k is a multiple of 64.
inline void linear_int8(const uint8_t* x, const float* x_scales, const int8_t* w, const float* scales,
                        const int32_t* compensation, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k) {
    int64_t groups = (k + GROUP - 1) / GROUP;
    for_products(m, n, w, COLUMNS * k, [&]<bool HAS_SECOND>(int64_t row, int64_t rows, int64_t panel,
                                                            const char* values, Prefetch& ahead) {
        alignas(64) int32_t dots[ROWS][COLUMNS];
        alignas(64) float sums[ROWS][COLUMNS] = {};
        const int32_t* start = compensation + panel * COLUMNS * groups;
        const char* from = (const char*)x + row * k;
        for (int64_t g = 0; g < groups; g++, start += COLUMNS, from += GROUP, values += GROUP * COLUMNS) {
            load_sums<HAS_SECOND>(start);
            multiply_steps<true, HAS_SECOND>(from, k, values, std::min(GROUP, k - g * GROUP) / STEP, ahead);
            store_sums<HAS_SECOND>(dots);
            for (int64_t r = 0; r < rows; r++) {
                __m512 scale = _mm512_set1_ps(x_scales[(row + r) * groups + g]);
                for (int64_t i = 0; i < COLUMNS; i += 16) {
                    __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots[r] + i));
                    _mm512_store_ps(sums[r] + i, _mm512_fmadd_ps(dot, scale, _mm512_load_ps(sums[r] + i)));
                }
            }
        }
        int64_t column = panel * COLUMNS;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < COLUMNS; i += 16) {
                __m512 shift = bias ? load16(bias + column + i, n - column - i) : _mm512_setzero_ps();
                __m512 sum = _mm512_fmadd_ps(_mm512_load_ps(sums[r] + i), _mm512_loadu_ps(scales + column + i), shift);
                store16(out + (row + r) * n + column + i, sum, n - column - i);
            }
    });
}

}  // namespace amx

#else

namespace amx {
inline bool is_possible() { return false; }
inline void linear_bf16(auto...) {}
inline void linear_int8(auto...) {}
}  // namespace amx

#endif
