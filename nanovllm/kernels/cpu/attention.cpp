// Attention over a KV cache in bf16, and over new keys and values: see attention.h.

#include "attention.h"

namespace {

constexpr int64_t PAIRS = 2 * WIDTH;  // raw bf16 of a register

// scores[r][j] = q[r] . k[j] for n keys; up to three more columns are filled with copies of the last.
template <int R, bool WHOLE>
void multiply_keys(const Operand (*q)[MAX_DIM], const bf16* k, int64_t stride, int64_t n, int64_t d,
                   float (*scores)[KEYS], const bf16* soon, int64_t soon_stride) {
    for (int64_t j = 0; j < n; j += 4) {
        FloatRegister sums[R][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = FloatRegister{};
        fetch(soon + j * soon_stride, soon_stride, 4, d);
        const bf16* keys[4];
        for (int i = 0; i < 4; i++) keys[i] = k + std::min(j + i, n - 1) * stride;
        for (int64_t c = 0; c < d; c += PAIRS)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                auto key = key_of(load_columns<WHOLE, BitsRegister>(keys[i] + c, d - c));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums[r][i] = add_dot(sums[r][i], q[r] + c, key);
            }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) store_sums(scores[r] + j, sums[r]);
    }
}

// The scores of one row and a tile into weights.
inline void soften(const float* scores, const Tile<bf16>& tile, float scale, Rows& rows, int64_t r, int64_t d,
                   Operand* weights) {
    Floats x[KEYS / 16];
    for (int64_t j = 0; j < KEYS; j += 16) x[j / 16] = load(scores + j) * all(scale);
    soften(x, std::min(tile.n, rows.limits[r] - tile.start), rows, r, d);
    for (int64_t j = 0; j < KEYS; j += 16) store_operands(weights + j, x[j / 16]);
}

// sums[r] += weights[r] . v for n keys, two keys and C x 32 columns at a time, of which there are `columns`.
template <int R, bool WHOLE, int C>
void add_values(const Operand (*weights)[KEYS], const bf16* v, int64_t stride, int64_t n, int64_t columns,
                float (*sums)[MAX_DIM], const bf16* soon, int64_t soon_stride) {
    Floats a[R][2 * C];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) a[r][c] = load(sums[r] + 16 * c);
    for (int64_t j = 0; j < n; j += 2, v += 2 * stride) {
        fetch(soon + j * soon_stride, soon_stride, 2, 32 * C);
        const bf16* second = j + 1 < n ? v + stride : v;  // its weight is 0 then
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            Factors factors[BF16_PARTS][2];
            arrange_values(load_columns<WHOLE, Bits>(v + 32 * c, columns - 32 * c),
                           load_columns<WHOLE, Bits>(second + 32 * c, columns - 32 * c), factors);
#pragma GCC unroll 2
            for (int part = 0; part < BF16_PARTS; part++)
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    auto weight = broadcast(weights[r] + j + part);
                    a[r][2 * c] = multiply_add(a[r][2 * c], factors[part][0], weight);
                    a[r][2 * c + 1] = multiply_add(a[r][2 * c + 1], factors[part][1], weight);
                }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) store(sums[r] + 16 * c, a[r][c]);
}

template <int R, bool WHOLE>
void attend_tile(Rows& rows, const Operand (*q)[MAX_DIM], int64_t first, const Tile<bf16>& tile, const Keys<bf16>& keys,
                 int64_t d, float scale) {
    alignas(64) float scores[R][KEYS];
    alignas(64) Operand weights[R][KEYS];
    multiply_keys<R, WHOLE>(q + first, tile.k, keys.k_stride, tile.n, d, scores, tile.v, keys.v_stride);
    for (int r = 0; r < R; r++) soften(scores[r], tile, scale, rows, first + r, d, weights[r]);
    for (int64_t c = 0; c < d; c += VALUE_COLUMNS) {
        auto sums = (float (*)[MAX_DIM])(rows.sums[first] + c);
        auto add = d - c > 32 ? add_values<R, WHOLE, VALUE_COLUMNS / 32> : add_values<R, WHOLE, 1>;
        add(weights, tile.v + c, keys.v_stride, tile.n, d - c, sums, tile.next_k + c, keys.k_stride);
    }
}

#ifdef WITH_AMX
constexpr int64_t FEW_ROWS = 8;  // whose scores are gathered, out of those by key
constexpr float UNSEEN = -3e38;  // a score whose weight is 0 for any maximum, and takes no longer than others

// sums[r][c] += weights[r] . pairs for 32 columns. If not WIDE, with tiles beside those of scores, of as many rows as
// there are: 1 and 3 of sums, 7 of weights.
template <bool WIDE>
inline void add_pairs(float* sums, const bf16* weights, const bf16* pairs, int64_t halves, auto& ahead) {
    if constexpr (WIDE) {
        amx::load_sums<true>(sums, 4 * MAX_DIM);
        amx::multiply_steps<amx::BF16, true>((const char*)weights, 2 * KEYS, (const char*)pairs, halves, ahead);
        amx::store_sums<true>(sums, 4 * MAX_DIM);
    } else {
        amx::load_tile<1>(sums, 4 * MAX_DIM);
        amx::load_tile<3>(sums + 16, 4 * MAX_DIM);
        for (int64_t i = 0; i < halves; i++, weights += 32, pairs += 16 * 64) {
            amx::load_tile<7>(weights, 2 * KEYS);
            amx::load_tile<4>(pairs, 128);
            ahead.step();
            amx::multiply<amx::BF16, 1, 7, 4>();
            amx::load_tile<5>(pairs + 32, 128);
            amx::multiply<amx::BF16, 3, 7, 5>();
        }
        amx::store_tile<1>(sums, 4 * MAX_DIM);
        amx::store_tile<3>(sums + 16, 4 * MAX_DIM);
    }
}

// Sixteen vectors of sixteen pairs of bf16, transposed.
inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        int j = i / 2 * 4 + i % 2;
        x[2 * i] = _mm512_unpacklo_epi64(y[j], y[j + 2]);
        x[2 * i + 1] = _mm512_unpackhi_epi64(y[j], y[j + 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        int j = i / 4 * 8 + i % 4;
        y[j] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88);
        y[j + 4] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

// The scores of sixteen rows, of `stride` floats for each key, into weights, exactly as `soften` does for a row: but
// with the rows beside each other in a vector, within which nothing is to be summed up or looked for.
inline void soften_rows(float* scores, int64_t stride, const Tile<bf16>& tile, float scale, Rows& rows, int64_t first,
                        int64_t num_rows, int64_t d, bf16 (*weights)[KEYS]) {
    const __m512i zipped = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    alignas(64) float limits[16], maxima[16];
    for (int64_t r = 0; r < 16; r++)
        limits[r] = r < num_rows ? std::min(tile.n, rows.limits[first + r] - tile.start) : 0;
    Floats limit = load(limits), before = load(rows.maxima + first), maximum = before;
    int64_t n = (tile.n + 31) / 32 * 32;
    for (int64_t j = 0; j < n; j++) {
        Floats score = select(greater(limit, all(j)), load(scores + j * stride) * all(scale), all(UNSEEN));
        store(scores + j * stride, score);
        maximum = larger(maximum, score);
    }
    store(maxima, maximum);
    for (uint32_t changed = greater(maximum, before); changed; changed &= changed - 1)
        rows.raise_maximum(first + __builtin_ctz(changed), maxima[__builtin_ctz(changed)], d);
    Floats totals[16];  // in the order in which the lanes of a row's weights are summed up
    for (Floats& total : totals) total = all(0);
    auto add_weight = [&](int64_t j) {
        Floats weight = exp2_of(load(scores + j * stride) - maximum);
        totals[j % 16] = totals[j % 16] + weight;
        return weight;
    };
    for (int64_t j = 0; j < n; j += 32) {
        __m512i pairs[16];
        for (int64_t i = 0; i < 16; i++) {
            Floats weight = add_weight(j + 2 * i);
            __m512bh both = _mm512_cvtne2ps_pbh(add_weight(j + 2 * i + 1), weight);
            pairs[i] = _mm512_permutexvar_epi16(zipped, (__m512i)both);
        }
        transpose(pairs);
        for (int64_t r = 0; r < 16; r++) put(weights[r] + j, pairs[r]);
    }
    for (int64_t size = 8; size > 0; size /= 2)
        for (int64_t i = 0; i < size; i++) totals[i] = totals[i] + totals[i + size];
    store(rows.totals + first, load(rows.totals + first) + totals[0]);
}

// What attend_tile does, for all rows of a task and by matrix units; d is a multiple of 32. The keys are multiplied as
// activations with the queries as a panel of weights, [d / 2, WIDE ? 32 : 16, 2], and then the weights with pairs of
// values. The next tile is fetched evenly meanwhile: memory, which is what takes the time, hardly waits for a product.
template <bool WIDE>
void attend_tile_amx(Rows& rows, int64_t num_rows, const bf16* queries, const Tile<bf16>& tile, const Keys<bf16>& keys,
                     int64_t d, float scale) {
    constexpr int64_t COLUMNS = WIDE ? 32 : 16, LINE = 64;
    alignas(64) float by_key[KEYS][COLUMNS], scores[KEYS];
    alignas(64) bf16 weights[COLUMNS][KEYS], pairs[KEYS / 2][64], last[32 * MAX_DIM];
    int64_t halves = (tile.n + 31) / 32, steps = halves * d / 32;  // of 32 keys, and of each product
    int64_t bytes = 2 * tile.next_n * d;
    amx::Prefetch<amx::L2> next_k{(const char*)tile.next_k, bytes / steps}, next_v{(const char*)tile.next_v};
    for (int64_t j = 0; j < tile.n; j += 32) {
        const bf16* k = tile.k + j * keys.k_stride;
        int64_t stride = keys.k_stride;
        if (tile.n - j < 32) {  // more may not be read
            for (int64_t i = 0; i < tile.n - j; i++) std::memcpy(last + i * d, k + i * stride, 2 * d);
            k = last, stride = d;
        }
        amx::load_sums<true, WIDE>(amx::zeros, 0);
        amx::multiply_steps<amx::BF16, true, WIDE, 4 * COLUMNS>((const char*)k, 2 * stride, (const char*)queries,
                                                                d / 32, next_k);
        amx::store_sums<true, WIDE>(by_key[j], 4 * COLUMNS);
    }
    if (num_rows <= FEW_ROWS) {
        const __m512i lanes16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int64_t r = 0; r < num_rows; r++) {
            next_v.step(16 * LINE);
            for (int64_t j = 0; j < tile.n; j += 16)
                _mm512_store_ps(scores + j, _mm512_i32gather_ps(lanes16 * int(COLUMNS), by_key[j] + r, 4));
            soften(scores, tile, scale, rows, r, d, weights[r]);
        }
    } else {
        for (int64_t r = 0; r < num_rows; r += 16)
            soften_rows(by_key[0] + r, COLUMNS, tile, scale, rows, r, num_rows - r, d, weights + r);
    }
    int64_t by_pairs = 16 * LINE * steps, left = (const char*)tile.next_v + bytes - next_v.next - by_pairs;
    next_v.bytes = std::max<int64_t>(0, left / steps);
    for (int64_t c = 0; c < d; c += 32) {
        auto zip_rows = [&](int64_t from, int64_t to, auto&& row) {
            for (int64_t j = from; j < to; j += 2) {
                Bits first, second;
                zip(row(j), row(j + 1), first, second);
                put(pairs[j / 2], first);
                put(pairs[j / 2] + 32, second);
                next_v.step(LINE);
            }
        };
        auto row = [&](int64_t j) { return get<Bits>(tile.v + c + j * keys.v_stride); };
        zip_rows(0, tile.n & -2, row);
        zip_rows(tile.n & -2, 32 * halves, [&](int64_t j) { return j < tile.n ? row(j) : Bits{}; });
        add_pairs<WIDE>(rows.sums[0] + c, weights[0], pairs[0], halves, next_v);
    }
}

template <class EachTile>
void attend_amx(Rows& rows, bf16 (*q)[MAX_DIM], int64_t num_rows, const Keys<bf16>& keys, int64_t d, float scale,
                EachTile&& each_tile) {
    bool is_wide = num_rows > 16;
    int64_t columns = is_wide ? 32 : 16;
    alignas(64) bf16 queries[MAX_DIM * ROWS];
    std::fill(q[num_rows], q[columns], 0);
    for (int64_t r = 0; r < columns; r += 16)
        for (int64_t c = 0; c < d; c += 32) {
            __m512i pairs[16];
            for (int64_t i = 0; i < 16; i++) pairs[i] = get<__m512i>(q[r + i] + c);
            transpose(pairs);
            for (int64_t i = 0; i < 16; i++) put(queries + (c + 2 * i) * columns + 2 * r, pairs[i]);
        }
    amx::Tiles units;
    uint8_t n = num_rows;
    if (is_wide) units.configure(32);
    else units.set_rows({16, n, 16, n, 16, 16, 16, n});
    auto attend_rows = is_wide ? attend_tile_amx<true> : attend_tile_amx<false>;
    each_tile([&](const Tile<bf16>& tile) { attend_rows(rows, num_rows, queries, tile, keys, d, scale); });
}
#else
void attend_amx(auto&&...) {}
#endif

struct Attention {  // of a task
    Rows rows;
    Operand q[ROWS][MAX_DIM];

    void set_query(int64_t r, const bf16* query, int64_t d) {
        for (int64_t c = 0; c < d; c += PAIRS) store_query(q[r] + c, load_first<BitsRegister>(query + c, d - c));
    }

    template <class EachTile>
    void attend(int64_t num_rows, const Keys<bf16>& keys, int64_t d, EachTile&& each_tile) {
        float scale = LOG2_E / std::sqrt(float(d));
        if (amx::is_usable && d % 32 == 0) return attend_amx(rows, q, num_rows, keys, d, scale, each_tile);
        each_tile([&](const Tile<bf16>& tile) {
            each_rows(rows, num_rows, tile.start, [&]<int R>(int64_t r) {
                auto attend_rows = d % 32 ? attend_tile<R, false> : attend_tile<R, true>;
                attend_rows(rows, q, r, tile, keys, d, scale);
            });
        });
    }

    static void write_row(const float* sums, float inverse, bf16* out, int64_t d) {
        for (int64_t c = 0; c < d; c += 32)
            store_columns(out + c, load(sums + c) * all(inverse), load(sums + c + 16) * all(inverse), d - c);
    }
};

}  // namespace

// Writes [T, KH, D] keys or values (tokens `stride` apart) to their slots of a [blocks, KH, block_size, D] cache.
EXPORT void store_kv(const bf16* x, int64_t stride, bf16* cache, const int64_t* slots, int64_t num_tokens,
                     int64_t num_kv_heads, int64_t block_size, int64_t d) {
    store_rows(x, stride, cache, block_size * d, slots, num_tokens, num_kv_heads, block_size, d,
               [=](const bf16* row, bf16* block, int64_t offset) { std::memcpy(block + offset * d, row, 2 * d); });
}

// Copies the first slots of blocks of two [blocks, KH, bytes] caches, for each of copies [n, 3] (source block, target
// block, number of slots) in this order: a head's copies are all one thread's. Of a block's bytes the slots have first
// `row_bytes` each and then `scale_bytes` each.
EXPORT void copy_blocks(char* k_cache, char* v_cache, const int64_t* copies, int64_t num_copies, int64_t num_kv_heads,
                        int64_t block_size, int64_t row_bytes, int64_t scale_bytes) {
    parallel_for(2 * num_kv_heads, 2, [&](int64_t i) {
        int64_t size = block_size * (row_bytes + scale_bytes), stride = num_kv_heads * size;
        char* head = (i < num_kv_heads ? k_cache : v_cache) + i % num_kv_heads * size;
        for (const int64_t* copy = copies; copy < copies + 3 * num_copies; copy += 3) {
            char *source = head + copy[0] * stride, *target = head + copy[1] * stride;
            std::memcpy(target, source, copy[2] * row_bytes);
            int64_t scales = block_size * row_bytes;
            std::memcpy(target + scales, source + scales, copy[2] * scale_bytes);
        }
    });
}

// q, out [T, H, D]; bounds [S + 1] of each sequence's queries (nullptr: one each); lens [S] keys, whose last query sees
// all. Keys and values in [blocks, KH, block_size, D] caches through tables [S, columns], or, if tables is nullptr,
// the T new ones, tokens k_stride and v_stride apart.
EXPORT void attend(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int32_t* bounds, const int32_t* lens,
                   const int32_t* tables, int64_t columns, int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads,
                   int64_t d, int64_t block_size, int64_t k_stride, int64_t v_stride) {
    attend_with<Attention, bf16>({q, k, v, out, bounds, lens, tables, columns, num_seqs, num_heads, num_kv_heads, d,
                                  block_size, k_stride, v_stride});
}

REPLAYABLE(store_kv)
REPLAYABLE(attend)
