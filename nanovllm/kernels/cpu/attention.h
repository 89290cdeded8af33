// What attention over the paged KV cache is made of, whatever numbers the cache holds.
//
// Online softmax over tiles of keys (FlashAttention, Dao et al., 2022, arXiv:2205.14135), for up to 32 query rows of
// one KV head at a time: a row is one token's query of one of the heads that share the KV head, so that a key is read
// once for all of them. Decode is the case of one token.
//
// Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim: at most 256.

#pragma once

#include <memory>

#include "amx.h"
#include "common.h"

namespace {

constexpr int64_t KEYS = 64;      // of a tile
constexpr int64_t ROWS = 32;      // query rows of a task
constexpr int64_t SPAN = 2048;    // keys that are summed up by themselves, so that threads can share a row's
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
    int64_t start, n, next_n = 0;  // the last: keys of the tile after it
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

struct Rows {  // of one task, and what is summed up for them
    float sums[ROWS][MAX_DIM];  // of values
    float maxima[ROWS], totals[ROWS];
    int64_t limits[ROWS];  // keys that the row may see

    void clear(int64_t num_rows, int64_t d) {
        for (int64_t r = 0; r < num_rows; r++) {
            maxima[r] = -1e30f;  // finite, for what a row does not see is -infinity
            totals[r] = 0;
            std::fill(sums[r], sums[r] + padded(d), 0.0f);
        }
    }

    // Brings what is summed up to a larger maximum.
    void raise_maximum(int64_t r, float maximum, int64_t d) {
        float factor = std::exp2(maxima[r] - maximum);
        maxima[r] = maximum;
        totals[r] *= factor;
        for (int64_t c = 0; c < padded(d); c++) sums[r][c] *= factor;
    }

    // Adds what was summed up over the keys that follow. Rows that see none of them have sums of 0.
    void add(const Rows& next, int64_t num_rows, int64_t d) {
        for (int64_t r = 0; r < num_rows; r++) {
            float maximum = std::max(maxima[r], next.maxima[r]);
            float factor = std::exp2(maxima[r] - maximum), next_factor = std::exp2(next.maxima[r] - maximum);
            maxima[r] = maximum;
            totals[r] = totals[r] * factor + next.totals[r] * next_factor;
            for (int64_t c = 0; c < padded(d); c++)
                sums[r][c] = sums[r][c] * factor + next.sums[r][c] * next_factor;
        }
    }
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
    if (maximum > rows.maxima[r]) rows.raise_maximum(r, maximum, d);
    Floats total = all(0);
    for (Floats& weights : x) {
        Floats below = weights - all(maximum);  // results of less than 2^-126 would take long, and count for nothing
        weights = select(at_least(below, all(-126)), exp2_of(larger(below, all(-126))), all(0));
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

// f(row, block, offset) for each of [T, KH, D] keys or values (tokens `stride` apart) that has a slot: its block of a
// [blocks, KH] cache of blocks of so many T, and its place there.
template <class T, class F>
void store_rows(const bf16* x, int64_t stride, T* cache, int64_t block_stride, const int64_t* slots, int64_t num_tokens,
                int64_t num_kv_heads, int64_t block_size, int64_t d, F&& f) {
    parallel_for(num_tokens, 5, [&](int64_t t) {
        for (int64_t h = 0; h < num_kv_heads && slots[t] >= 0; h++) {
            int64_t block = slots[t] / block_size * num_kv_heads + h;
            f(x + t * stride + h * d, cache + block * block_stride, slots[t] % block_size);
        }
    });
}

struct Task {
    int64_t seq, head, first, end;  // rows of the sequence
    int64_t from, to;               // keys that they are multiplied with
};

// What `attend` and `attend_int8` are given.
template <class T>
struct Inputs {
    const bf16* q;
    const T *k, *v;
    bf16* out;
    const int32_t *bounds, *lens, *tables;
    int64_t columns, num_seqs, num_heads, num_kv_heads, d, block_size, k_stride, v_stride;

    int64_t group() const { return num_heads / num_kv_heads; }
    int64_t start(int64_t s) const { return bounds ? bounds[s] : s; }
    int64_t num_queries(int64_t s) const { return bounds ? bounds[s + 1] - bounds[s] : 1; }

    // Where the query of a row is, and its result.
    int64_t place(const Task& task, int64_t row) const {
        return ((start(task.seq) + row / group()) * num_heads + task.head * group() + row % group()) * d;
    }

    // How many keys a row sees.
    int64_t limit(int64_t s, int64_t row) const { return lens[s] - num_queries(s) + row / group() + 1; }

    Keys<T> keys(const Task& task) const {
        if (!tables) {
            int64_t token = start(task.seq), head = task.head * d;
            return {k + token * k_stride + head, v + token * v_stride + head, nullptr, lens[task.seq], 0, k_stride,
                    v_stride};
        }
        int64_t block = block_size * (d + (Keys<T>::HAS_SCALES ? 4 : 0)), head = task.head * block;
        return {k + head, v + head, tables + task.seq * columns, block_size, num_kv_heads * block, d, d};
    }

    std::vector<Task> tasks() const {
        std::vector<Task> found;
        for (int64_t s = 0; s < num_seqs; s++)
            for (int64_t h = 0, rows = num_queries(s) * group(); h < num_kv_heads; h++)
                for (int64_t first = 0, end; first < rows; first = end) {
                    end = std::min(rows, first + ROWS);
                    found.push_back({s, h, first, end, 0, limit(s, end - 1)});
                }
        return found;
    }
};

// A task's sums, in its method's `rows`: of each span by itself, which are then added up, so that they are the same
// whoever computes them. Method has what a task keeps: its rows, and the queries in a form of their own. At the end
// what the `following` task reads first is fetched: of a block at most, so that nothing is copied for that.
template <class Method, class T>
void attend_task(Method& method, const Inputs<T>& in, const Task& task, const Task& following) {
    Keys<T> keys = in.keys(task);
    Rows& rows = method.rows;
    int64_t num_rows = task.end - task.first;
    for (int64_t r = 0; r < num_rows; r++) {
        method.set_query(r, in.q + in.place(task, task.first + r), in.d);
        rows.limits[r] = in.limit(task.seq, task.first + r);
    }
    Copy<T> copies[2];
    bool second = false;
    auto find_tile = [&](const Task& task, int64_t at, int64_t most = KEYS) {
        return in.keys(task).tile(at, std::min(task.to - at, most), in.d, copies[second = !second]);
    };
    auto find_following = [&] { return find_tile(following, following.from, std::min(KEYS, keys.block_size)); };
    Tile<T> tile, next = find_tile(task, task.from);
    std::unique_ptr<Rows> before;
    for (int64_t from = task.from, to; from < task.to; from = to) {
        to = std::min(task.to, from + SPAN);
        rows.clear(num_rows, in.d);
        method.attend(num_rows, keys, in.d, [&](auto&& f) {
            for (int64_t at = from; at < to; at += KEYS) {
                tile = next;
                next = at + KEYS < task.to ? find_tile(task, at + KEYS) : find_following();
                tile.next_k = next.k, tile.next_v = next.v, tile.next_n = next.n;
                f(tile);
            }
        });
        if (before) before->add(rows, num_rows, in.d);
        else if (to < task.to) before.reset(new Rows(rows));
    }
    if (before) rows = *before;
}

// Tasks that are few, for the threads that there are, are cut into one for each span.
template <class Method, class T>
void attend_with(const Inputs<T>& in) {
    std::vector<Task> tasks = in.tasks(), parts;
    std::vector<int64_t> first_part;
    bool is_cut = int64_t(tasks.size()) < 4 * my_threads().count;
    for (Task task : tasks) {
        first_part.push_back(parts.size());
        for (int64_t to = task.to, step = is_cut ? SPAN : to; task.from < to; task.from += step) {
            task.to = std::min(to, task.from + step);
            parts.push_back(task);
        }
    }
    first_part.push_back(parts.size());
    is_cut = parts.size() > tasks.size();
    std::unique_ptr<Rows[]> sums(is_cut ? new Rows[parts.size()] : nullptr);
    auto write = [&](const Task& task, const Rows& rows) {
        for (int64_t r = 0; r < task.end - task.first; r++)
            Method::write_row(rows.sums[r], 1 / rows.totals[r], in.out + in.place(task, task.first + r), in.d);
    };
    parallel_for(parts.size(), 2, [&](int64_t i) {
        alignas(64) Method method;
        attend_task(method, in, parts[i], parts[std::min<int64_t>(i + 1, parts.size() - 1)]);
        if (is_cut) sums[i] = method.rows;
        else write(parts[i], method.rows);
    });
    if (!is_cut) return;
    parallel_for(tasks.size(), 2, [&](int64_t i) {
        Rows& total = sums[first_part[i]];
        for (int64_t part = first_part[i] + 1; part < first_part[i + 1]; part++)
            total.add(sums[part], tasks[i].end - tasks[i].first, in.d);
        write(tasks[i], total);
    });
}

}  // namespace
