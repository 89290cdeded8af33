// Attention over the paged KV cache.
//
// Online softmax over tiles of keys (FlashAttention, Dao et al., 2022, arXiv:2205.14135), for up to 32 query rows of
// one KV head at a time: a row is one token's query of one of the heads that share the KV head, so that a key is read
// once for all of them. Decode is the case of one token.
//
// Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim: at most 256.

#include "amx.h"
#include "common.h"

namespace {

constexpr int64_t KEYS = 64;      // of a tile
constexpr int64_t ROWS = 32;      // query rows of a task
constexpr int64_t MAX_DIM = 256;  // of a head

constexpr int64_t PAIRS = 2 * WIDTH;  // raw bf16 of a register

inline int64_t padded(int64_t d) { return (d + 31) / 32 * 32; }  // columns of registers that hold d of bf16

// As many columns as V holds, of which n may be read if not the WHOLE: masks would cost the usual sizes a tenth of
// their time.
template <bool WHOLE, class V>
inline V load_columns(const bf16* x, int64_t n) {
    return WHOLE ? get<V>(x) : load_first<V>(x, n);
}

struct Tile {  // n keys from `start` on, and the keys of the tile after it
    const bf16 *k, *v, *next_k;
    int64_t start, n;
};

struct Copy {  // of a tile
    bf16 k[KEYS * MAX_DIM], v[KEYS * MAX_DIM];
};

struct Keys {  // of one KV head of one sequence
    const bf16 *k, *v;
    const int32_t* table;  // block ids; nullptr: the keys follow each other
    int64_t block_size, block_stride, k_stride, v_stride;

    // Keys [from, from + n), which begin and end where they would with any block size, or else sums would depend on
    // it: what is in several blocks is copied.
    Tile tile(int64_t from, int64_t n, int64_t d, Copy& copy) const {
        int64_t block = from / block_size, offset = from % block_size, start = table ? table[block] * block_stride : 0;
        if (n <= block_size - offset)
            return {k + start + offset * k_stride, v + start + offset * v_stride, nullptr, from, n};
        for (int64_t done = 0; done < n; block++, offset = 0) {
            int64_t source = table[block] * block_stride + offset * d, some = std::min(n - done, block_size - offset);
            std::memcpy(copy.k + done * d, k + source, 2 * some * d);
            std::memcpy(copy.v + done * d, v + source, 2 * some * d);
            done += some;
        }
        return {copy.k, copy.v, nullptr, from, n};
    }
};

struct Rows {  // of one task
    float sums[ROWS][MAX_DIM];  // of values; in the order of arrange_values
    float maxima[ROWS], totals[ROWS];
    Operand q[ROWS][MAX_DIM];
    int64_t limits[ROWS];  // keys that the row may see
};

// What is read next is fetched from memory meanwhile: during the keys of a tile its values, then the next tile's keys.
inline void fetch(const bf16* x, int64_t stride, int64_t n, int64_t d) {
    for (int64_t i = 0; i < n; i++, x += stride)
        for (int64_t c = 0; c < d; c += 32) prefetch(x + c);
}

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

// Scores of one row into weights relative to its maximum so far; what it has summed up is brought to the new maximum.
void soften(const float* scores, int64_t n, float scale, Rows& rows, int64_t r, int64_t d, Operand* weights) {
    Floats x[KEYS / 16];
    Floats largest = all(-INFINITY);
    for (int64_t j = 0; j < KEYS; j += 16) {
        x[j / 16] = select(lanes(n - j), load(scores + j) * all(scale), all(-INFINITY));
        largest = larger(largest, x[j / 16]);
    }
    float maximum = std::max(rows.maxima[r], largest_of(largest));
    if (maximum > rows.maxima[r]) {
        float factor = std::exp2(rows.maxima[r] - maximum);
        rows.totals[r] *= factor;
        for (int64_t c = 0; c < padded(d); c++) rows.sums[r][c] *= factor;
        rows.maxima[r] = maximum;
    }
    Floats total = all(0);
    for (int64_t j = 0; j < KEYS; j += 16) {
        x[j / 16] = exp2_of(larger(x[j / 16] - all(maximum), all(-160)));
        total = total + x[j / 16];
        store_operands(weights + j, x[j / 16]);
    }
    rows.totals[r] += sum_of(total);
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
void attend_tile(Rows& rows, int64_t first, const Tile& tile, const Keys& keys, int64_t d, float scale) {
    alignas(64) float scores[R][KEYS];
    alignas(64) Operand weights[R][KEYS];
    multiply_keys<R, WHOLE>(rows.q + first, tile.k, keys.k_stride, tile.n, d, scores, tile.v, keys.v_stride);
    for (int r = 0; r < R; r++)
        soften(scores[r], std::min(tile.n, rows.limits[first + r] - tile.start), scale, rows, first + r, d, weights[r]);
    for (int64_t c = 0; c < d; c += VALUE_COLUMNS) {
        auto sums = (float (*)[MAX_DIM])(rows.sums[first] + c);
        auto add = d - c > 32 ? add_values<R, WHOLE, VALUE_COLUMNS / 32> : add_values<R, WHOLE, 1>;
        add(weights, tile.v + c, keys.v_stride, tile.n, d - c, sums, tile.next_k + c, keys.k_stride);
    }
}

#ifdef WITH_AMX
// What attend_tile does, for all rows of a task and by matrix units; d is a multiple of 32. The keys are multiplied as
// activations with the queries as a panel of weights, [d / 2, ROWS, 2], and then the weights with pairs of values.
template <bool HAS_SECOND>
void attend_tile_amx(amx::Tiles& units, Rows& rows, int64_t num_rows, const bf16 (*queries)[2 * ROWS], const Tile& tile,
                     const Keys& keys, int64_t d, float scale) {
    alignas(64) float by_key[KEYS][ROWS], scores[KEYS];
    alignas(64) bf16 weights[ROWS][KEYS], pairs[KEYS / 2][64], last[32 * MAX_DIM];
    amx::Prefetch values{(const char*)tile.v, 2048}, next{(const char*)tile.next_k, 2048};
    units.configure(32);
    for (int64_t j = 0; j < tile.n; j += 32) {
        const bf16* k = tile.k + j * keys.k_stride;
        int64_t stride = keys.k_stride;
        if (tile.n - j < 32) {  // more may not be read
            for (int64_t i = 0; i < tile.n - j; i++) std::memcpy(last + i * d, k + i * stride, 2 * d);
            k = last, stride = d;
        }
        amx::load_sums<true>(amx::zeros, 0);
        amx::multiply_steps<false, true, HAS_SECOND>((const char*)k, 2 * stride, (const char*)queries, d / 32, values);
        amx::store_sums<true>(by_key[j], 4 * ROWS);
    }
    __m512i lanes16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t r = 0; r < num_rows; r++) {
        for (int64_t j = 0; j < tile.n; j += 16)
            _mm512_store_ps(scores + j, _mm512_i32gather_ps(lanes16 * ROWS, by_key[j] + r, 4));
        soften(scores, std::min(tile.n, rows.limits[r] - tile.start), scale, rows, r, d, weights[r]);
    }
    units.configure(num_rows);
    for (int64_t c = 0; c < d; c += 32) {
        const bf16* v = tile.v + c;
        for (int64_t j = 0; j < KEYS; j += 2, v += 2 * keys.v_stride) {
            Bits first, second, v0 = load_first<Bits>(v, j < tile.n ? 32 : 0);
            zip(v0, load_first<Bits>(v + keys.v_stride, j + 1 < tile.n ? 32 : 0), first, second);
            put(pairs[j / 2], first);
            put(pairs[j / 2] + 32, second);
        }
        amx::load_sums<HAS_SECOND>(rows.sums[0] + c, 4 * MAX_DIM);
        amx::multiply_steps<false, HAS_SECOND>((const char*)weights, 2 * KEYS, (const char*)pairs, KEYS / 32, next);
        amx::store_sums<HAS_SECOND>(rows.sums[0] + c, 4 * MAX_DIM);
    }
}

template <class EachTile>
void attend_amx(Rows& rows, int64_t num_rows, const Keys& keys, int64_t d, float scale, EachTile&& each_tile) {
    alignas(64) bf16 queries[MAX_DIM / 2][2 * ROWS] = {};
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < d; c += 2) std::memcpy(queries[c / 2] + 2 * r, rows.q[r] + c, 4);
    amx::Tiles units;
    auto attend_rows = num_rows > 16 ? attend_tile_amx<true> : attend_tile_amx<false>;
    each_tile([&](const Tile& tile) { attend_rows(units, rows, num_rows, queries, tile, keys, d, scale); });
}
#else
void attend_amx(auto&&...) {}
#endif

void write_row(const float* sums, float total, bf16* out, int64_t d) {
    Floats factor = all(total > 0 ? 1 / total : 0);
    for (int64_t c = 0; c < d; c += 32) store_columns(out + c, load(sums + c) * factor, load(sums + c + 16) * factor, d - c);
}

struct Task {
    int64_t seq, head, first, end;  // rows of the sequence
};

}  // namespace

// Writes [T, KH, D] keys or values (tokens `stride` apart) to their slots of a [blocks, KH, block_size, D] cache.
EXPORT void store_kv(const bf16* x, int64_t stride, bf16* cache, const int64_t* slots, int64_t num_tokens,
                     int64_t num_kv_heads, int64_t block_size, int64_t d) {
    parallel_for(num_tokens, 5, [&](int64_t t) {
        for (int64_t h = 0; h < num_kv_heads && slots[t] >= 0; h++) {
            int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
            std::memcpy(cache + ((block * num_kv_heads + h) * block_size + offset) * d, x + t * stride + h * d, 2 * d);
        }
    });
}

// Copies the first slots of blocks of two [blocks, KH, block_size, D] caches, for each of copies [n, 3] (source block,
// target block, number of slots) in this order: a head's copies are all one thread's.
EXPORT void copy_blocks(bf16* k_cache, bf16* v_cache, const int64_t* copies, int64_t num_copies, int64_t num_kv_heads,
                        int64_t block_size, int64_t d) {
    parallel_for(2 * num_kv_heads, 2, [&](int64_t i) {
        bf16* head = (i < num_kv_heads ? k_cache : v_cache) + i % num_kv_heads * block_size * d;
        int64_t stride = num_kv_heads * block_size * d;
        for (const int64_t* copy = copies; copy < copies + 3 * num_copies; copy += 3)
            std::memcpy(head + copy[1] * stride, head + copy[0] * stride, 2 * copy[2] * d);
    });
}

// q, out [T, H, D]; bounds [S + 1] of each sequence's queries (nullptr: one each); lens [S] keys, whose last query sees
// all. Keys and values in [blocks, KH, block_size, D] caches through tables [S, columns], or, if tables is nullptr,
// the T new ones, tokens k_stride and v_stride apart.
EXPORT void attend(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int32_t* bounds, const int32_t* lens,
                   const int32_t* tables, int64_t columns, int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads,
                   int64_t d, int64_t block_size, int64_t k_stride, int64_t v_stride) {
    int64_t group = num_heads / num_kv_heads;
    float scale = 1.44269504f / std::sqrt(float(d));
    std::vector<Task> tasks;
    for (int64_t s = 0; s < num_seqs; s++) {
        int64_t rows = (bounds ? bounds[s + 1] - bounds[s] : 1) * group;
        for (int64_t h = 0; h < num_kv_heads; h++)
            for (int64_t first = 0; first < rows; first += ROWS)
                tasks.push_back({s, h, first, std::min(rows, first + ROWS)});
    }
    parallel_for(tasks.size(), 2, [&](int64_t i) {
        auto [s, h, first, end] = tasks[i];
        int64_t start = bounds ? bounds[s] : s, num_queries = bounds ? bounds[s + 1] - start : 1;
        int64_t block = block_size * d;
        Keys keys{k, v, nullptr, lens[s], 0, k_stride, v_stride};
        if (tables) keys = {k, v, tables + s * columns, block_size, num_kv_heads * block, d, d};
        keys.k += tables ? h * block : start * k_stride + h * d;
        keys.v += tables ? h * block : start * v_stride + h * d;
        alignas(64) Rows rows;
        int64_t num_rows = end - first;
        for (int64_t r = 0; r < num_rows; r++) {
            int64_t token = (first + r) / group, head = h * group + (first + r) % group;
            const bf16* query = q + ((start + token) * num_heads + head) * d;
            for (int64_t c = 0; c < d; c += PAIRS) store_query(rows.q[r] + c, load_first<BitsRegister>(query + c, d - c));
            rows.limits[r] = lens[s] - num_queries + token + 1;
            rows.maxima[r] = -INFINITY;
            rows.totals[r] = 0;
            std::fill(rows.sums[r], rows.sums[r] + padded(d), 0.0f);
        }
        int64_t limit = rows.limits[num_rows - 1];
        Copy copies[2];
        auto find_tile = [&](int64_t from) {
            return keys.tile(from, std::min(limit - from, KEYS), d, copies[from / KEYS % 2]);
        };
        auto each_tile = [&](auto&& f) {
            Tile tile, next = find_tile(0);
            for (int64_t from = 0; from < limit; from += KEYS) {
                tile = next;
                if (from + KEYS < limit) next = find_tile(from + KEYS);
                tile.next_k = next.k;
                f(tile);
            }
        };
        if (amx::is_usable && d % 32 == 0)
            attend_amx(rows, num_rows, keys, d, scale, each_tile);
        else
            each_tile([&](const Tile& tile) {
                for (int64_t r = 0; r < num_rows; r += ATTENTION_ROWS) {
                    int64_t num = std::min<int64_t>(ATTENTION_ROWS, num_rows - r);
                    if (rows.limits[r + num - 1] <= tile.start) continue;
                    with_rows<ATTENTION_ROWS>(num, [&]<int R>() {
                        auto attend_rows = d % 32 ? attend_tile<R, false> : attend_tile<R, true>;
                        attend_rows(rows, r, tile, keys, d, scale);
                    });
                }
            });
        for (int64_t r = 0; r < num_rows; r++) {
            int64_t token = (first + r) / group, head = h * group + (first + r) % group;
            write_row(rows.sums[r], rows.totals[r], out + ((start + token) * num_heads + head) * d, d);
        }
    });
}

REPLAYABLE(store_kv)
REPLAYABLE(attend)
