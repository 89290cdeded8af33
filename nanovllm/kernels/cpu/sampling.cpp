// From logits to tokens and their log-probabilities; what is computed is said in nanovllm/layers/sampler.py and
// logits_processor.py. A row is one thread's, in fp32, and nothing of it depends on other rows.

#include "common.h"

namespace {

constexpr int64_t CHUNK = 512;  // tokens of the vocabulary whose probabilities are summed up at a time
constexpr int64_t BUNDLE = 64;  // tokens of whose maxima the k-th is a bound for the k-th largest of all

struct Options {  // of O rows: addresses of the arrays of `Options` in logits_processor.py, null for an absent one
    const int64_t *index, *top_k;  // index [rows]: which of the O a row has, or -1
    const double* top_p;
    const float* log_min_p;
    const int64_t* mask_index;
    const uint16_t* masks;
    const int64_t *bias_starts, *bias_cells;
    const float* biases;
    const int64_t *penalty_starts, *penalty_cells;
    const float *factors, *subtrahends;
    const int64_t* processed_index;
    const float* processed;
    bool* is_ignored;
    float* filtered;
};

// Functions of v values take them from load(i), 16 from the i-th on; those past the end do not count.
template <class Load>
float maximum_of(int64_t v, Load load) {
    Floats largest = all(-INFINITY);
    for (int64_t i = 0; i < v; i += 16) largest = select(lanes(v - i), larger(largest, load(i)), largest);
    return largest_of(largest);
}

template <class Load>
int64_t first_of(int64_t v, float wanted, Load load) {
    for (int64_t i = 0; i < v; i += 16)
        if (Lanes found = equal(load(i), all(wanted)) & lanes(v - i)) return i + __builtin_ctz(found);
    return v - 1;
}

// Exponentials of values that are at most 0; 0 for what would have no full precision, which is slow to compute with.
inline Floats weights_of(Floats x) {
    Lanes weighs = at_least(x, all(-87));
    return weighs ? select(weighs, exp_of(select(weighs, x, all(0))), all(0)) : all(0);
}

// Exponentials of the values of a chunk, if `weights` is given; returns their sum.
template <class Load>
double weigh(int64_t chunk, int64_t v, Load load, float* weights = nullptr) {
    Floats sum = all(0);
    for (int64_t i = chunk * CHUNK; i < (chunk + 1) * CHUNK; i += 16) {
        Floats value = select(lanes(v - i), weights_of(load(i)), all(0));
        if (weights) store(weights + i % CHUNK, value);
        sum = sum + value;
    }
    return sum_of(sum);
}

// The token at which the sum of the exponentials reaches its share `uniform`.
template <class Load>
int64_t draw(int64_t v, double uniform, Load load) {
    std::vector<double> sums((v + CHUNK - 1) / CHUNK);
    alignas(64) float weights[CHUNK];
    double total = 0;
    for (size_t chunk = 0; chunk < sums.size(); chunk++) total += sums[chunk] = weigh(chunk, v, load);
    double target = uniform * total;
    size_t chunk = 0;
    while (chunk + 1 < sums.size() && target >= sums[chunk]) target -= sums[chunk++];
    while (chunk > 0 && sums[chunk] == 0) chunk--;  // rounding went past the last that is possible
    weigh(chunk, v, load, weights);
    int64_t last = 0;
    for (int64_t i = 0; i < CHUNK; i++)
        if (weights[i] > 0) {
            last = i;
            if (target < weights[i]) break;
            target -= weights[i];
        }
    return chunk * CHUNK + last;
}

// ---- v values y, at most 0, whose memory goes on with -inf to the next multiple of BUNDLE

int64_t whole_bundles(int64_t v) { return (v + BUNDLE - 1) / BUNDLE * BUNDLE; }

float* scratch(int64_t v) {
    static thread_local std::vector<float> memory;
    memory.resize(whole_bundles(v));
    return memory.data();
}

// The k-th largest maximum of a group: at least k values reach it, and few more if they are in no order.
float reached_by(const float* y, int64_t v, int64_t k) {
    std::vector<float> maxima(whole_bundles(v) / BUNDLE);
    if (k > (int64_t)maxima.size()) return -INFINITY;
    for (size_t g = 0; g < maxima.size(); g++)
        maxima[g] = maximum_of(BUNDLE, [&](int64_t i) { return load(y + g * BUNDLE + i); });
    std::nth_element(maxima.begin(), maxima.begin() + k - 1, maxima.end(), std::greater<float>());
    return maxima[k - 1];
}

// Probabilities times `scale` as integers, whose sums do not depend on their order; without a scale each is 1.
inline void integer_weights(Floats y, float scale, int64_t* weights) {
    store_truncated(weights, scale ? weights_of(y) * all(scale) : all(1));
}

struct Last {
    float value;
    int64_t num_equal;  // of those with this value the first so many
};

// In the order of descending values, lower indices first among equals: up to which one the weights add up to `limit`.
// What is below `bound` is known to come after it. A value's bits, which are ordered as it is, say to which of 2048
// sums it adds; then, of those in the one in which the limit lies, the next bits, and the last.
Last find_last(const float* y, int64_t v, int64_t limit, float scale, float bound) {
    int64_t before = 0, weight = 1;
    uint32_t key = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
        alignas(64) int64_t sums[2][2048] = {}, weights[16];
        alignas(64) int32_t bins[16];
        for (int64_t i = 0; i < v; i += 16) {
            Floats value = load(y + i);
            Ints bits = shift_right(bits_of(absolute(value)), shift);
            Lanes counts = at_least(value, all(bound)) & lanes(v - i);
            if (shift < 20) counts &= equal(shift_right(bits, 10), all_ints(key));
            if (!counts) continue;
            integer_weights(value, scale, weights);
            store(bins, bits & all_ints(shift < 20 ? 1023 : 2047));
            for (int j = 0; j < 16; j++) sums[j % 2][bins[j]] += counts >> j & 1 ? weights[j] : 0;
        }
        uint32_t bin = 0;
        for (; bin < 2047 && before + sums[0][bin] + sums[1][bin] < limit; bin++) before += sums[0][bin] + sums[1][bin];
        key = key << 10 | bin;
    }
    float value;
    std::memcpy(&value, &key, 4);
    if (scale) {
        alignas(64) int64_t weights[16];
        integer_weights(all(-value), scale, weights);
        weight = std::max<int64_t>(weights[0], 1);
    }
    return {-value, (limit - before + weight - 1) / weight};
}

// Calls f(i, mask) for the values up to the last one, 16 at a time.
template <class F>
void for_each_kept(const float* y, int64_t v, Last last, F f) {
    for (int64_t i = 0; i < v; i += 16) {
        Floats value = load(y + i);
        Lanes kept = greater(value, all(last.value)), same = equal(value, all(last.value)) & lanes(v - i);
        for (; same && last.num_equal > 0; same &= same - 1, last.num_equal--) kept |= same & -same;
        f(i, kept);
    }
}

void cut(float* y, int64_t v, Last last) {
    for_each_kept(y, v, last, [&](int64_t i, Lanes kept) { store(y + i, all(-INFINITY), ~kept); });
}

// ---- a row with options

void load_row(const bf16* x, const uint16_t* mask, float* y, int64_t v) {
    for (int64_t i = 0; i < whole_bundles(v); i += 16) {
        Lanes allowed = lanes(v - i) & (mask && i < v ? mask[i / 16] : 0xffff);
        store(y + i, select(allowed, load16(x + i, v - i), all(-INFINITY)));
    }
}

void edit(const Options& options, int64_t o, const bf16* x, float* y, int64_t v) {
    int64_t mask = options.masks ? options.mask_index[o] : -1, words = (v + 31) / 32;
    int64_t processed = options.processed ? options.processed_index[o] : -1;
    load_row(x, mask < 0 ? nullptr : options.masks + 2 * words * mask, y, v);
    if (processed >= 0) std::memcpy(y, options.processed + processed * v, v * sizeof(float));
    if (options.biases)
        for (int64_t i = options.bias_starts[o]; i < options.bias_starts[o + 1]; i++)
            y[options.bias_cells[i] - o * v] += options.biases[i];
    if (options.factors)
        for (int64_t i = options.penalty_starts[o]; i < options.penalty_starts[o + 1]; i++) {
            float& value = y[options.penalty_cells[i] - o * v];
            value = (value > 0 ? value / options.factors[i] : value * options.factors[i]) - options.subtrahends[i];
        }
}

void filter(const Options& options, int64_t o, float* y, int64_t v) {
    int64_t top_k = options.top_k ? options.top_k[o] : v;
    double top_p = options.top_p ? options.top_p[o] : 1;
    if (top_k < v) cut(y, v, find_last(y, v, top_k, 0, reached_by(y, v, top_k)));
    if (top_p < 1) {
        float scale = std::ldexp(1.0f, 62 - (64 - __builtin_clzll(v)));  // with which the sum of a row is below 2^63
        int64_t sum = 0;
        alignas(64) int64_t weights[16];
        for (int64_t i = 0; i < v; i += 16) {
            integer_weights(load(y + i), scale, weights);
            for (int j = 0; j < 16; j++) sum += weights[j];
        }
        double total = sum;
        // All tokens below this together weigh less than half of what may be left out.
        float bound = std::log((1 - top_p) * total / scale / v / 2) - 1e-3f;
        cut(y, v, find_last(y, v, std::ceil(top_p * total), scale, bound));
    }
}

int64_t sample_with(const Options& options, int64_t o, const bf16* x, float temperature, double uniform, int64_t v) {
    float* y = scratch(v);
    auto values = [&](int64_t i) { return load(y + i, v - i); };
    edit(options, o, x, y, v);
    float maximum = maximum_of(v, values);
    options.is_ignored[o] = maximum == -INFINITY;
    if (maximum == -INFINITY) {
        load_row(x, nullptr, y, v);
        maximum = maximum_of(v, values);
    }
    if (temperature == 0) return first_of(v, maximum, values);
    Floats least = all(options.log_min_p ? options.log_min_p[o] : -INFINITY);
    for (int64_t i = 0; i < v; i += 16) {
        Floats value = (load(y + i) - all(maximum)) / all(temperature);
        store(y + i, select(greater(least, value), all(-INFINITY), value));
    }
    filter(options, o, y, v);
    if (options.filtered) std::memcpy(options.filtered + o * v, y, v * sizeof(float));
    return draw(v, uniform, values);
}

int64_t sample_plainly(const bf16* x, float temperature, double uniform, int64_t v) {
    auto values = [&](int64_t i) { return load16(x + i, v - i); };
    float maximum = maximum_of(v, values);
    if (temperature == 0) return first_of(v, maximum, values);
    return draw(v, uniform, [&](int64_t i) { return (values(i) - all(maximum)) / all(temperature); });
}

}  // namespace

// One token a row of [rows, v] logits by inverse CDF; temperature 0 takes the largest.
EXPORT void sample(const bf16* logits, int64_t stride, const float* temperatures, const double* uniforms,
                   const Options* options, int64_t* tokens, int64_t num_rows, int64_t v) {
    parallel_for(num_rows, 2, [&](int64_t row) {
        float temperature = temperatures ? temperatures[row] : 0;
        double uniform = uniforms ? uniforms[row] : 0;
        const bf16* x = logits + row * stride;
        int64_t o = options ? options->index[row] : -1;
        tokens[row] = o < 0 ? sample_plainly(x, temperature, uniform, v)
                            : sample_with(*options, o, x, temperature, uniform, v);
    });
}

// For each of n tokens, of one of the rows of logits each: its log-probability, its rank, and the likeliest tokens with
// theirs, num_top[i] of the [n, most]; of equally likely ones those of lower ids come first.
EXPORT void token_logprobs(const bf16* logits, int64_t stride, const int64_t* rows, const int64_t* tokens,
                           const int64_t* num_top, float* logprobs, int64_t* ranks, int64_t* top_ids,
                           float* top_logprobs, int64_t most, int64_t n, int64_t v) {
    parallel_for(n, 2, [&](int64_t i) {
        float* y = scratch(v);
        load_row(logits + rows[i] * stride, nullptr, y, v);
        auto values = [&](int64_t j) { return load(y + j, v - j); };
        float maximum = maximum_of(v, values);
        double sum = 0;
        for (int64_t j = 0; j < v; j += 16) store(y + j, load(y + j) - all(maximum));
        for (int64_t chunk = 0; chunk * CHUNK < v; chunk++) sum += weigh(chunk, v, values);
        float log_sum = std::log(sum), chosen = y[tokens[i]];
        int64_t rank = 1;
        for (int64_t j = 0; j < v; j += 16)
            rank += __builtin_popcount(greater(values(j), all(chosen)) & lanes(v - j));
        logprobs[i] = chosen - log_sum, ranks[i] = rank;
        int64_t k = std::min(num_top[i], v);
        if (k == 0) return;
        std::vector<std::pair<float, int64_t>> top;
        for_each_kept(y, v, find_last(y, v, k, 0, reached_by(y, v, k)), [&](int64_t j, Lanes kept) {
            for (; kept; kept &= kept - 1) top.emplace_back(-y[j + __builtin_ctz(kept)], j + __builtin_ctz(kept));
        });
        std::sort(top.begin(), top.end());
        for (size_t j = 0; j < top.size(); j++)
            top_ids[i * most + j] = top[j].second, top_logprobs[i * most + j] = -top[j].first - log_sum;
    });
}

// Makes -inf of the tokens of rows of logits whose bit in a mask is 0.
EXPORT void mask_logits(bf16* logits, int64_t stride, const int64_t* rows, const uint16_t* masks, int64_t num_rows,
                        int64_t v) {
    parallel_for(num_rows, 2, [&](int64_t row) {
        bf16* x = logits + rows[row] * stride;
        const uint16_t* mask = masks + row * ((v + 31) / 32 * 2);
        for (int64_t i = 0; i < v; i += 16)
            if (Lanes forbidden = ~mask[i / 16] & lanes(v - i)) fill(x + i, forbidden, 0xff80);
    });
}

REPLAYABLE(sample)
