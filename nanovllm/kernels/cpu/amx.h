// Products of linear.cpp by the matrix units of newer Xeons (AMX), which take its weights as they are.
//
// Two of their tiles, of 16 rows of 64 bytes, are 32 columns of a panel by 32 values of K in bf16 or 64 in int8, or 32
// rows of activations, in the usual order, by as many values; four are the sums.
//
// Products of bf16 are summed in another order than without these units, if in the same for any number of rows: so a
// weight is multiplied either always here or never. Sums of int8 are exact.

#pragma once

#include "common.h"

#ifdef WITH_AMX

#include <sys/syscall.h>
#include <unistd.h>

#include <array>

namespace amx {

constexpr int64_t ROWS = 32, COLUMNS = 32;  // of a product, computed at a time
constexpr int64_t STEP = 64;                // bytes of a row of activations that are multiplied at a time,
constexpr int64_t PANEL_STEP = 2048;        // and those of a panel of weights
constexpr int64_t BLOCK = 256;              // rows that a thread computes with one panel
constexpr int64_t GROUP = 128;              // activations that share a scale in an int8 product

// What a thread keeps of activations in its L2. Of larger blocks it takes as many bytes of each row at a time, with
// several panels before the next; of many rows, as few as those of a panel that stay in L1 while the rows pass by.
constexpr int64_t CACHE = 1 << 20, SLICE = CACHE / BLOCK, PANELS = 8, MANY = 64, SHORT_SLICE = 512;

// Whether the system lets this process use them; asked for once, for all threads.
inline const bool is_usable = [] {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}();

constexpr float zeros[COLUMNS] = {};

// Not as intrinsics, of which compilers disagree what memory they touch, and which want flags of their own.
template <int TILE>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
enum Kind { BF16, UNSIGNED_BY_SIGNED, SIGNED_BY_UNSIGNED };  // of activations and weights, the latter two of bytes
template <Kind KIND, int SUMS, int X, int W>
inline void multiply() {
    if constexpr (KIND == UNSIGNED_BY_SIGNED)
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(W));
    else if constexpr (KIND == SIGNED_BY_UNSIGNED)
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(W));
    else
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(W));
}

// A thread's tiles: 0 and 1 the sums of the first 16 rows, 2 and 3 of the others, 4 and 5 their activations, 6 and 7
// weights. Other libraries set them up in their own way, so that tasks that follow each other begin and end with them.
class Tiles {
  public:
    ~Tiles() { asm volatile("tilerelease" ::); }

    // For so many rows of activations, of which STEP bytes or fewer are multiplied at a time.
    void configure(int64_t rows, int64_t step = STEP) {
        if (rows == configured) return;
        configured = rows;
        uint8_t first = std::min<int64_t>(rows, 16), second = std::max<int64_t>(rows - 16, 1), weights = step / 4;
        set_rows({first, first, second, second, first, second, weights, weights}, step);
    }

    // The rows of each tile, which are 64 bytes long, or `step` in tiles 4 and 5.
    void set_rows(std::array<uint8_t, 8> rows, int64_t step = STEP) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {};
        } tiles;
        tiles.bytes[4] = tiles.bytes[5] = step;
        std::copy(rows.begin(), rows.end(), tiles.rows);
        asm volatile("ldtilecfg %0" ::"m"(tiles));
    }

  private:
    int64_t configured = 0;
};

enum Cache { L1 = 3, L2 = 2 };  // as __builtin_prefetch names them

// Fetches from memory what is soon worked with.
template <Cache TO>
struct Prefetch {
    const char* next;
    int64_t bytes = 0;  // in a step

    void step() { step(bytes); }
    void step(int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, TO);
        next += bytes;
    }
};

// Adds to the sums the products of activations, rows `stride` bytes apart, and a panel's weights; more than 16 rows if
// HAS_SECOND. Rows of the panel are PITCH bytes apart.
template <Kind KIND, bool HAS_SECOND, bool HAS_RIGHT = true, int64_t PITCH = PANEL_STEP / 16>
inline void multiply_steps(const char* x, int64_t stride, const char* w, int64_t steps, auto& ahead) {
    for (int64_t i = 0; i < steps; i++, x += STEP, w += 16 * PITCH) {
        load_tile<6>(w, PITCH);
        load_tile<4>(x, stride);
        ahead.step();
        multiply<KIND, 0, 4, 6>();
        if constexpr (HAS_RIGHT) {
            load_tile<7>(w + 64, PITCH);
            multiply<KIND, 1, 4, 7>();
        }
        if constexpr (HAS_SECOND) {
            load_tile<5>(x + 16 * stride, stride);
            multiply<KIND, 2, 5, 6>();
            if constexpr (HAS_RIGHT) multiply<KIND, 3, 5, 7>();
        }
    }
}

// Sums [rows, COLUMNS] of fp32 or int32, or, at a stride of 0, the same for each row.
template <bool HAS_SECOND, bool HAS_RIGHT = true>
inline void load_sums(const void* sums, int64_t stride) {
    load_tile<0>((const char*)sums, stride);
    if constexpr (HAS_RIGHT) load_tile<1>((const char*)sums + 64, stride);
    if constexpr (HAS_SECOND) load_tile<2>((const char*)sums + 16 * stride, stride);
    if constexpr (HAS_SECOND && HAS_RIGHT) load_tile<3>((const char*)sums + 16 * stride + 64, stride);
}

template <bool HAS_SECOND, bool HAS_RIGHT = true>
inline void store_sums(void* sums, int64_t stride) {
    store_tile<0>((char*)sums, stride);
    if constexpr (HAS_RIGHT) store_tile<1>((char*)sums + 64, stride);
    if constexpr (HAS_SECOND) store_tile<2>((char*)sums + 16 * stride, stride);
    if constexpr (HAS_SECOND && HAS_RIGHT) store_tile<3>((char*)sums + 16 * stride + 64, stride);
}

// A weight's panels, each of `bytes` bytes for each of its columns, and what becomes of its products.
struct Weight {
    const void* panels;
    int64_t bytes;
    const float* scales;  // [N, padded to panels] or nullptr
    const bf16* bias;     // [N] or nullptr
};

// If `streams`, past the caches: lines that are overwritten as a whole need not be fetched first.
inline void write_rows(const float (*sums)[COLUMNS], int64_t rows, const Weight& w, int64_t column, bf16* out,
                       int64_t n, bool streams) {
    streams = streams && column + COLUMNS <= n && (uintptr_t(out) | 2 * n) % 64 == 0;
    for (int64_t r = 0; r < rows; r++, out += n) {
        Floats x[2];
        for (int64_t half = 0; half < 2; half++) {
            int64_t i = column + 16 * half;
            Floats sum = load(sums[r] + 16 * half), scale = w.scales ? load(w.scales + i) : all(1);
            x[half] = multiply_add(w.bias ? load16(w.bias + i, n - i) : all(0), sum, scale);
            if (!streams) store16(out + i, x[half], n - i);
        }
        if (streams) _mm512_stream_si512((__m512i*)(out + column), (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
    }
}

// out [m, n], in parallel, of what `add` adds up: add<HAS_SECOND>(first row, rows, panel, its weights, first byte and
// number of bytes of the rows that are multiplied with them, sums [rows, COLUMNS] so far if that byte is not 0, what to
// fetch).
template <class Add>
void for_products(const Weight& w, bf16* out, int64_t m, int64_t n, Add&& add) {
    int64_t blocks = (m + BLOCK - 1) / BLOCK, size = (m + blocks * ROWS - 1) / (blocks * ROWS) * ROWS;
    int64_t panels = (n + COLUMNS - 1) / COLUMNS, enough = 8 * my_threads().count;  // tasks
    bool is_whole = m < MANY && m * w.bytes <= CACHE;
    int64_t some = is_whole ? 1 : std::clamp<int64_t>(blocks * panels / enough, 1, PANELS);
    bool is_short = m >= MANY && some >= 4;  // enough panels for rows that come from L2 again for each slice
    int64_t slice = is_whole ? w.bytes : is_short ? SHORT_SLICE : SLICE;
    int64_t groups = (panels + some - 1) / some;
    bool streams = n * w.bytes > CACHE;  // weights, so that results do not stay in a cache anyway
    auto multiply_task = [&](Tiles& units, int64_t i) {
        static thread_local std::vector<float> buffer(PANELS * BLOCK * COLUMNS);
        int64_t start = i / groups * size, end = std::min(m, start + size), tiles = (end - start + ROWS - 1) / ROWS;
        for (int64_t byte = 0; byte < w.bytes; byte += slice) {
            auto sums = (float (*)[COLUMNS])buffer.data();
            int64_t bytes = std::min(slice, w.bytes - byte);
            for (int64_t panel = i % groups * some; panel < std::min(panels, (i % groups + 1) * some); panel++) {
                const char* values = (const char*)w.panels + (panel * w.bytes + byte) * COLUMNS;
                for (int64_t row = start; row < end; row += ROWS, sums += ROWS) {
                    int64_t rows = std::min(ROWS, end - row);
                    units.configure(rows);
                    const char* share = values + COLUMNS * (w.bytes + bytes * ((row - start) / ROWS) / tiles);
                    Prefetch<L2> ahead{tiles == 1 ? values + 4096 : share, PANEL_STEP / tiles};  // of the next panel
                    if (rows > 16)
                        add.template operator()<true>(row, rows, panel, values, byte, bytes, sums, ahead);
                    else
                        add.template operator()<false>(row, rows, panel, values, byte, bytes, sums, ahead);
                    if (byte + bytes == w.bytes)
                        write_rows(sums, rows, w, panel * COLUMNS, out + row * n, n, streams);
                }
            }
        }
    };
    parallel_ranges(blocks * groups, 2, [&](int64_t begin, int64_t end) {
        Tiles units;
        for (int64_t i = begin; i < end; i++) multiply_task(units, i);
        _mm_sfence();  // or others could read results before they are there
    });
}

// See linear.cpp; k is a multiple of 32.
inline void linear_bf16(const bf16* x, int64_t ldx, const bf16* w, const bf16* bias, bf16* out, int64_t m, int64_t n,
                        int64_t k) {
    for_products({w, 2 * k, nullptr, bias}, out, m, n,
                 [&]<bool HAS_SECOND>(int64_t row, int64_t, int64_t, const char* values, int64_t byte, int64_t bytes,
                                      float (*sums)[COLUMNS], auto& ahead) {
        load_sums<HAS_SECOND>(byte ? sums[0] : zeros, byte ? 4 * COLUMNS : 0);
        multiply_steps<BF16, HAS_SECOND>((const char*)(x + row * ldx) + byte, 2 * ldx, values, bytes / STEP, ahead);
        store_sums<HAS_SECOND>(sums, 4 * COLUMNS);
    });
}

// out [m, n] from quantised activations [m, k] and their scales [m, k / GROUP], both of whose rows follow each other,
// and the arrays of an Int8Weight; k is a multiple of 64.
inline void linear_int8(const uint8_t* x, const float* x_scales, const int8_t* w, const float* scales,
                        const int32_t* compensation, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k) {
    int64_t groups = (k + GROUP - 1) / GROUP;
    for_products({w, k, scales, bias}, out, m, n,
                 [&]<bool HAS_SECOND>(int64_t row, int64_t rows, int64_t panel, const char* values, int64_t byte,
                                      int64_t bytes, float (*sums)[COLUMNS], auto& ahead) {
        alignas(64) int32_t dots[2][ROWS][COLUMNS];
        if (byte == 0) std::fill(sums[0], sums[rows], 0.0f);
        auto add_group = [&](int64_t group) {
            for (int64_t r = 0; r < rows; r++) {
                Floats scale = all(x_scales[(row + r) * groups + group]);
                for (int64_t i = 0; i < COLUMNS; i += 16) {
                    Floats dot = to_floats(load(dots[group % 2][r] + i));
                    store(sums[r] + i, multiply_add(load(sums[r] + i), dot, scale));
                }
            }
        };
        for (int64_t from = byte; from < byte + bytes; from += GROUP, values += GROUP * COLUMNS) {
            int64_t group = from / GROUP, size = std::min(GROUP, byte + bytes - from);
            load_sums<HAS_SECOND>(compensation + (panel * groups + group) * COLUMNS, 0);
            multiply_steps<UNSIGNED_BY_SIGNED, HAS_SECOND>((const char*)x + row * k + from, k, values, size / STEP,
                                                           ahead);
            store_sums<HAS_SECOND>(dots[group % 2], 4 * COLUMNS);
            if (from > byte) add_group(group - 1);
        }
        add_group((byte + bytes - 1) / GROUP);
    });
}

}  // namespace amx

#else

namespace amx {
constexpr bool is_usable = false;
inline void linear_bf16(auto...) {}
inline void linear_int8(auto...) {}
}  // namespace amx

#endif
