// Attention over a KV cache in int8, in which a token's keys and values of a head have a scale each: see attention.h.
//
// All products are of whole numbers: a query becomes numbers of 16 bits with a scale, and so do, for each tile, a row's
// weights times the values' scales. So products are summed up without any error, are the same with matrix units and
// without, and nothing is unpacked. What is rounded, is by 2^-16 of the largest: less than in bf16.
//
// A block of a head is [block_size, D] codes, as products take bytes, and then [block_size] scales in fp32.

#include "attention.h"

namespace {

constexpr int64_t BYTES = 4 * WIDTH;  // of a register, as many columns
constexpr float LARGEST = 127 * 256;  // of the numbers in 16 bits
constexpr float LEAST = 1e-30;        // the largest of numbers, if they are smaller, as far as their scale goes
constexpr float TO_WHOLE = 0x1.8p23;  // plus a small number: that, rounded to the nearest even, is in the last bits

// The largest size of n numbers.
inline float largest_size(const bf16* x, int64_t n) {
    bf16 largest = 0;
    for (int64_t c = 0; c < n; c++) largest = std::max<bf16>(largest, x[c] & 0x7fff);
    return std::max(to_float(largest), LEAST);
}

// n numbers times the factor, rounded, in two parts; returns their sum.
inline int32_t round_and_split(const float* x, float factor, int64_t n, int8_t* first, int8_t* second) {
    int32_t rounded[MAX_DIM], sum = 0, zero;
    std::memcpy(&zero, &TO_WHOLE, sizeof zero);
    for (int64_t i = 0; i < n; i++) {
        float shifted = x[i] * factor + TO_WHOLE;
        std::memcpy(rounded + i, &shifted, sizeof shifted);
        rounded[i] -= zero;
        sum += rounded[i];
    }
    split(rounded, n, first, second);
    return sum;
}

template <int R>
[[gnu::always_inline]] inline void next_parts(IntRegister (&sums)[R][4]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[r][i] = next_part(sums[r][i]);
}

struct Int8Attention {  // of a task
    using T = uint8_t;

    Rows rows;
    alignas(64) int8_t q[ROWS][2][MAX_DIM];          // in parts
    alignas(64) int8_t weights[2][ROWS][KEYS];       // of a tile
    alignas(64) T values[MAX_DIM / 32][KEYS / 4][128];  // of a tile: four keys of 32 columns in the order of write_row
    float q_scales[ROWS], weight_scales[ROWS];
    int32_t q_excess[ROWS], weight_excess[ROWS];  // what a zero's code adds to their products

    void set_query(int64_t r, const bf16* query, int64_t d) {
        float x[MAX_DIM] = {}, largest = largest_size(query, d);
        for (int64_t c = 0; c < d; c++) x[c] = to_float(query[c]);
        q_excess[r] = ZERO_BYTE * round_and_split(x, LARGEST / largest, padded(d), q[r][0], q[r][1]);
        q_scales[r] = largest / LARGEST * (LOG2_E / std::sqrt(float(d)));
    }

    template <bool WHOLE>
    static IntRegister load_codes(const T* codes, int64_t n) {
        return (IntRegister)load_columns<WHOLE, BitsRegister>((const bf16*)codes, n / 2);
    }

    // dots[r][j] = q[r] . k[j] of R rows and n keys; up to three more columns are filled with copies of the last.
    template <int R, bool WHOLE>
    static void multiply_keys(const int8_t (*q)[2][MAX_DIM], const Tile<T>& tile, int64_t d, int32_t (*dots)[KEYS]) {
        for (int64_t j = 0; j < tile.n; j += 4) {
            IntRegister sums[R][4] = {};
            fetch(tile.next_v + j * d, d, 4, d);
            const T* keys[4];
            for (int i = 0; i < 4; i++) keys[i] = tile.k + std::min(j + i, tile.n - 1) * d;
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                if (part) next_parts(sums);
                for (int64_t c = 0; c < d; c += BYTES)
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        IntRegister codes = load_codes<WHOLE>(keys[i] + c, d - c);
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++)
                            sums[r][i] = add_part(sums[r][i], codes, get<IntRegister>(q[r][part] + c), part);
                    }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) store_sums(dots[r] + j, sums[r]);
        }
    }

    // A row's products with the keys of a tile into weights.
    void set_weights(int64_t r, const int32_t* dots, const Tile<T>& tile, int64_t d) {
        int64_t n = std::min(tile.n, rows.limits[r] - tile.start);
        Floats x[KEYS / 16], largest = all(LEAST);
        for (int64_t j = 0; j < KEYS; j += 16) {
            Floats products = to_floats(load(dots + j) - all_ints(q_excess[r]));
            x[j / 16] = products * all(q_scales[r]) * load(tile.k_scales + j, n - j);
        }
        soften(x, n, rows, r, d);
        alignas(64) float scaled[KEYS];
        for (int64_t j = 0; j < KEYS; j += 16) {
            Floats weight = x[j / 16] * load(tile.v_scales + j, n - j);
            largest = larger(largest, weight);
            store(scaled + j, weight);
        }
        float most = largest_of(largest);
        weight_excess[r] = ZERO_BYTE * round_and_split(scaled, LARGEST / most, KEYS, weights[0][r], weights[1][r]);
        weight_scales[r] = most / LARGEST;
    }

    template <bool WHOLE>
    void zip_values(const Tile<T>& tile, int64_t d) {
        for (int64_t j = 0; j < tile.n; j += 4)
            for (int64_t c = 0; c < d; c += BYTES) {
                IntRegister v[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    v[i] = load_codes<WHOLE>(tile.v + std::min(j + i, tile.n - 1) * d + c, d - c);
                zip_bytes(v[0], v[1]);
                zip_bytes(v[2], v[3]);
                zip_shorts(v[0], v[2]);
                zip_shorts(v[1], v[3]);
                for (int i = 0; i < 4; i++) put(zipped(c + i * WIDTH, j / 4), v[i % 2 * 2 + i / 2]);
            }
    }

    T* zipped(int64_t column, int64_t quad) { return values[column / 32][quad] + column % 32 * 4; }

    void add_dots(int64_t r, int64_t column, IntRegister dots) {
        float* sums = rows.sums[r] + column;
        auto products = __builtin_convertvector(dots - weight_excess[r], FloatRegister);
        put(sums, multiply_add(get<FloatRegister>(sums), products, weight_scales[r] - FloatRegister{}));
    }

    // sums[r] += weights[r] . v for R rows from `first` on.
    template <int R>
    void add_values(int64_t first, const Tile<T>& tile, int64_t d) {
        int64_t quads = (tile.n + 3) / 4;
        for (int64_t c = 0; c < d; c += BYTES) {
            IntRegister dots[R][4] = {};
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                if (part) next_parts(dots);
                for (int64_t j = 0; j < quads; j++) {
                    if (part == 0) fetch(tile.next_k + c * tile.n + j * 4 * BYTES, 0, 1, 4 * BYTES);
                    IntRegister numbers[R];
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) numbers[r] = broadcast((const Byte*)(weights[part][first + r] + 4 * j));
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        auto codes = get<IntRegister>(zipped(c + i * WIDTH, j));
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++) dots[r][i] = add_part(dots[r][i], codes, numbers[r], part);
                    }
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) add_dots(first + r, c + i * WIDTH, dots[r][i]);
        }
    }

    template <int R, bool WHOLE>
    void attend_rows(int64_t first, const Tile<T>& tile, int64_t d) {
        alignas(64) int32_t dots[R][KEYS];
        multiply_keys<R, WHOLE>(q + first, tile, d, dots);
        for (int r = 0; r < R; r++) set_weights(first + r, dots[r], tile, d);
        add_values<R>(first, tile, d);
    }

#ifdef WITH_AMX
    // The sum of both parts, which is put into the first's place.
    static IntRegister join(int32_t* first, const int32_t* second) {
        IntRegister sum = next_part(get<IntRegister>(first)) + get<IntRegister>(second);
        put(first, sum);
        return sum;
    }

    // What attend_rows does, for all rows of a task and by matrix units; d is a multiple of 64. The keys are multiplied
    // as activations with the queries as a panel of weights, and then the weights with the values.
    template <bool HAS_SECOND>
    void attend_tile(amx::Tiles& units, int64_t num_rows, const int8_t (*queries)[MAX_DIM / 4][4 * ROWS],
                     const Tile<T>& tile, int64_t d) {
        alignas(64) int32_t by_key[2][KEYS][ROWS], dots[KEYS], sums[2][ROWS][32];
        alignas(64) T last[32 * MAX_DIM];
        amx::Prefetch<amx::L1> next_v{(const char*)tile.next_v, 1024}, next_k{(const char*)tile.next_k, 1024};
        units.configure(32);
        for (int64_t j = 0; j < tile.n; j += 32) {
            const T* k = tile.k + j * d;
            if (tile.n - j < 32) k = (const T*)std::memcpy(last, k, (tile.n - j) * d);  // more may not be read
            for (int part = 0; part < 2; part++) {
                amx::load_sums<true>(amx::zeros, 0);
                amx::multiply_steps<amx::UNSIGNED_BY_SIGNED, true, HAS_SECOND>(
                    (const char*)k, d, (const char*)queries[part], d / 64, next_v);
                amx::store_sums<true>(by_key[part][j], 4 * ROWS);
            }
            for (int64_t i = 0; i < 32 * ROWS; i += 16) join(by_key[0][j] + i, by_key[1][j] + i);
        }
        IntRegister lanes16 = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int64_t r = 0; r < num_rows; r++) {
            for (int64_t j = 0; j < tile.n; j += 16)
                put(dots + j, _mm512_i32gather_epi32((__m512i)(lanes16 * int32_t(ROWS)), by_key[0][j] + r, 4));
            set_weights(r, dots, tile, d);
        }
        units.configure(num_rows);
        for (int64_t c = 0; c < d; c += 32) {
            for (int part = 0; part < 2; part++) {
                amx::load_sums<HAS_SECOND>(amx::zeros, 0);
                amx::multiply_steps<amx::SIGNED_BY_UNSIGNED, HAS_SECOND>(
                    (const char*)weights[part], KEYS, (const char*)values[c / 32], 1, next_k);
                amx::store_sums<HAS_SECOND>(sums[part], 4 * 32);
            }
            for (int64_t r = 0; r < num_rows; r++)
                for (int64_t i = 0; i < 32; i += 16) add_dots(r, c + i, join(sums[0][r] + i, sums[1][r] + i));
        }
    }

    template <class EachTile>
    void attend_amx(int64_t num_rows, int64_t d, EachTile&& each_tile) {
        alignas(64) int8_t queries[2][MAX_DIM / 4][4 * ROWS] = {};
        for (int64_t r = 0; r < num_rows; r++)
            for (int64_t c = 0; c < d; c += 4)
                for (int part = 0; part < 2; part++) std::memcpy(queries[part][c / 4] + 4 * r, q[r][part] + c, 4);
        amx::Tiles units;
        each_tile([&](const Tile<T>& tile) {
            zip_values<true>(tile, d);
            num_rows > 16 ? attend_tile<true>(units, num_rows, queries, tile, d)
                          : attend_tile<false>(units, num_rows, queries, tile, d);
        });
    }
#else
    void attend_amx(auto&&...) {}
#endif

    template <class EachTile>
    void attend(int64_t num_rows, const Keys<T>&, int64_t d, EachTile&& each_tile) {
        if (amx::is_usable && d % 64 == 0 && num_rows > ATTENTION_ROWS) return attend_amx(num_rows, d, each_tile);
        each_tile([&](const Tile<T>& tile) {
            d % BYTES ? zip_values<false>(tile, d) : zip_values<true>(tile, d);
            each_rows(rows, num_rows, tile.start, [&]<int R>(int64_t r) {
                d % BYTES ? attend_rows<R, false>(r, tile, d) : attend_rows<R, true>(r, tile, d);
            });
        });
    }

    static void write_row(const float* zipped, float inverse, bf16* out, int64_t d) {
        float sums[MAX_DIM];  // in the columns' order, which zipping has changed
        for (int64_t c = 0; c < d; c++)
            sums[c] = zipped[c / BYTES * BYTES + c % 16 / 4 * WIDTH + c % BYTES / 16 * 4 + c % 4];
        for (int64_t c = 0; c < d; c += 16) store16(out + c, load(sums + c) * all(inverse), d - c);
    }
};

}  // namespace

// As store_kv, to a [blocks, KH, block_size, D + 4] cache.
EXPORT void store_kv_int8(const bf16* x, int64_t stride, uint8_t* cache, const int64_t* slots, int64_t num_tokens,
                          int64_t num_kv_heads, int64_t block_size, int64_t d) {
    store_rows(x, stride, cache, block_size * (d + 4), slots, num_tokens, num_kv_heads, block_size, d,
               [=](const bf16* row, uint8_t* block, int64_t offset) {
        float largest = largest_size(row, d), scale = largest / 127, factor = 127 / largest;
        uint32_t codes[MAX_DIM];
        for (int64_t c = 0; c < d; c++) {
            float shifted = to_float(row[c]) * factor + (TO_WHOLE + ZERO_BYTE);
            std::memcpy(codes + c, &shifted, sizeof shifted);
        }
        std::copy(codes, codes + d, block + offset * d);  // the last byte of each
        std::memcpy(block + block_size * d + 4 * offset, &scale, sizeof scale);
    });
}

// As attend, with [blocks, KH, block_size, D + 4] caches.
EXPORT void attend_int8(const bf16* q, const uint8_t* k, const uint8_t* v, bf16* out, const int32_t* bounds,
                        const int32_t* lens, const int32_t* tables, int64_t columns, int64_t num_seqs,
                        int64_t num_heads, int64_t num_kv_heads, int64_t d, int64_t block_size) {
    attend_with<Int8Attention, uint8_t>({q, k, v, out, bounds, lens, tables, columns, num_seqs, num_heads,
                                         num_kv_heads, d, block_size, d, d});
}

REPLAYABLE(store_kv_int8)
REPLAYABLE(attend_int8)
