// What attention over the paged KV cache is made of, whatever numbers the cache holds.
//
// Online softmax over tiles of keys (FlashAttention, Dao et al., 2022, arXiv:2205.14135), for up to 32 query rows of
// one KV head at a time: a row is one token's query of one of the heads that share the KV head, so that a key is read
// once for all of them. Decode is the case of one token.
//
// Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim: at most 256.

#pragma once

#include "amx.h"
#include "common.h"

namespace {

constexpr int64_t KEYS = 64;      // of a tile
constexpr int64_t ROWS = 32;      // query rows of a task
constexpr int64_t MAX_DIM = 256;  // of a head
constexpr float LOG2_E = 1.44269504f;

inline int64_t padded(int64_t d) { return (d + 63) / 64 * 64; }  // columns of registers that hold d numbers

// As many columns as V holds, of which n may be read if not the WHOLE: masks would cost the usual sizes a tenth of
// their time.
template <bool WHOLE, class V>
inline V load_columns(const bf16* x, int64_t n) {
    return WHOLE ? get<V>(x) : load_first<V>(x, n);
}

template <class T>
struct Tile {  // n keys from `start` on, their scales if T is a byte, and the keys and values of the tile after it
    const T *k, *v, *next_k, *next_v;
    const float *k_scales, *v_scales;
    int64_t start, n;
};

template <class T>
struct Copy {  // of a tile
    T k[KEYS * MAX_DIM], v[KEYS * MAX_DIM];
    float k_scales[KEYS], v_scales[KEYS];
};

template <class T>
struct Keys {  // of one KV head of one sequence
    const T *k, *v;
    const int32_t* table;  // block ids; nullptr: the keys follow each other
    int64_t block_size, block_stride, k_stride, v_stride;

    static constexpr bool HAS_SCALES = sizeof(T) == 1;  // of a block, after its last token

    // Keys [from, from + n), which begin and end where they would with any block size, or else sums would depend on
    // it: what is in several blocks is copied.
    Tile<T> tile(int64_t from, int64_t n, int64_t d, Copy<T>& copy) const {
        int64_t block = from / block_size, offset = from % block_size, start = table ? table[block] * block_stride : 0;
        auto scales = [&](const T* x) {
            return HAS_SCALES ? (const float*)(x + start + block_size * d) + offset : nullptr;
        };
        if (n <= block_size - offset)
            return {k + start + offset * k_stride, v + start + offset * v_stride, nullptr, nullptr, scales(k),
                    scales(v), from, n};
        for (int64_t done = 0; done < n; block++, offset = 0) {
            start = table[block] * block_stride;
            int64_t source = start + offset * d, some = std::min(n - done, block_size - offset);
            std::memcpy(copy.k + done * d, k + source, sizeof(T) * some * d);
            std::memcpy(copy.v + done * d, v + source, sizeof(T) * some * d);
            if constexpr (HAS_SCALES) {
                std::memcpy(copy.k_scales + done, scales(k), 4 * some);
                std::memcpy(copy.v_scales + done, scales(v), 4 * some);
            }
            done += some;
        }
        return {copy.k, copy.v, nullptr, nullptr, copy.k_scales, copy.v_scales, from, n};
    }
};

struct Rows {  // of one task
    float sums[ROWS][MAX_DIM];  // of values
    float maxima[ROWS], totals[ROWS];
    int64_t limits[ROWS];  // keys that the row may see
};

// What is read next is fetched from memory meanwhile.
template <class T>
inline void fetch(const T* x, int64_t stride, int64_t n, int64_t d) {
    for (int64_t i = 0; i < n; i++, x += stride)
        for (int64_t c = 0; c < d; c += 64 / sizeof(T)) prefetch(x + c);
}

// Scores of one row, times log2(e), of which it sees n, into weights relative to its maximum so far; what it has summed
// up is brought to the new maximum.
inline void soften(Floats (&x)[KEYS / 16], int64_t n, Rows& rows, int64_t r, int64_t d) {
    Floats largest = all(-INFINITY);
    for (int64_t j = 0; j < KEYS; j += 16) {
        x[j / 16] = select(lanes(n - j), x[j / 16], all(-INFINITY));
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
    for (Floats& weights : x) {
        weights = exp2_of(larger(weights - all(maximum), all(-160)));
        total = total + weights;
    }
    rows.totals[r] += sum_of(total);
}

// f<R>(first row) for ATTENTION_ROWS rows at a time, of those that see keys from `start` on.
template <class F>
void each_rows(const Rows& rows, int64_t num_rows, int64_t start, F&& f) {
    for (int64_t r = 0; r < num_rows; r += ATTENTION_ROWS) {
        int64_t num = std::min<int64_t>(ATTENTION_ROWS, num_rows - r);
        if (rows.limits[r + num - 1] > start)
            with_rows<ATTENTION_ROWS>(num, [&]<int R>() { f.template operator()<R>(r); });
    }
}

struct Task {
    int64_t seq, head, first, end;  // rows of the sequence
};

// See `attend` and `attend_int8`. Method has what a task keeps: its rows, the queries in a form of their own, and the
// functions that are called here.
template <class Method, class T>
void attend_with(const bf16* q, const T* k, const T* v, bf16* out, const int32_t* bounds, const int32_t* lens,
                 const int32_t* tables, int64_t columns, int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads,
                 int64_t d, int64_t block_size, int64_t k_stride, int64_t v_stride) {
    int64_t group = num_heads / num_kv_heads;
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
        int64_t block = block_size * (d + (Keys<T>::HAS_SCALES ? 4 : 0));
        Keys<T> keys{k, v, nullptr, lens[s], 0, k_stride, v_stride};
        if (tables) keys = {k, v, tables + s * columns, block_size, num_kv_heads * block, d, d};
        keys.k += tables ? h * block : start * k_stride + h * d;
        keys.v += tables ? h * block : start * v_stride + h * d;
        alignas(64) Method task;
        Rows& rows = task.rows;
        int64_t num_rows = end - first;
        auto place = [&](int64_t r) {  // of a row's query
            return ((start + (first + r) / group) * num_heads + h * group + (first + r) % group) * d;
        };
        for (int64_t r = 0; r < num_rows; r++) {
            task.set_query(r, q + place(r), d);
            rows.limits[r] = lens[s] - num_queries + (first + r) / group + 1;
            rows.maxima[r] = -INFINITY;
            rows.totals[r] = 0;
            std::fill(rows.sums[r], rows.sums[r] + padded(d), 0.0f);
        }
        int64_t limit = rows.limits[num_rows - 1];
        Copy<T> copies[2];
        auto find_tile = [&](int64_t from) {
            return keys.tile(from, std::min(limit - from, KEYS), d, copies[from / KEYS % 2]);
        };
        auto each_tile = [&](auto&& f) {
            Tile<T> tile, next = find_tile(0);
            for (int64_t from = 0; from < limit; from += KEYS) {
                tile = next;
                if (from + KEYS < limit) next = find_tile(from + KEYS);
                tile.next_k = next.k, tile.next_v = next.v;
                f(tile);
            }
        };
        task.attend(num_rows, keys, d, each_tile);
        for (int64_t r = 0; r < num_rows; r++)
            task.write_row(r, rows.totals[r] > 0 ? 1 / rows.totals[r] : 0, out + place(r), d);
    });
}

}  // namespace
