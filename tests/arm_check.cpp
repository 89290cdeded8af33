// The CPU kernels against loops in double: what tests/arm.py runs where there is no Python for the processor.

#include <cstdio>
#include <random>

static std::mt19937 engine(0);
static int num_wrong = 0;

static void check(bool is_right, const char* what, double error, int a = 0, int b = 0, int c = 0) {
    if (!is_right) printf("WRONG: %s %d %d %d, %g\n", what, a, b, c, error);
    num_wrong += !is_right;
}

static bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static std::vector<bf16> random_values(size_t n, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<bf16> x(n);
    for (auto& value : x) value = to_bf16(normal(engine));
    return x;
}

static double relative_error(const std::vector<bf16>& x, const std::vector<double>& exact) {
    double error = 0, size = 0;
    for (size_t i = 0; i < exact.size(); i++) {
        error += std::pow(to_float(x[i]) - exact[i], 2);
        size += exact[i] * exact[i];
    }
    return std::isfinite(error) ? std::sqrt(error / size) : 1e9;
}

static void check_linear(int m, int n, int k) {
    int rows = (n + 31) / 32 * 32, groups = (k + 127) / 128;
    auto x = random_values(m * k), w = random_values(rows * k), bias = random_values(n);
    std::vector<double> exact(m * n), exact8(m * n);
    for (int r = 0; r < m; r++)
        for (int c = 0; c < n; c++) {
            double sum = 0, sum8 = 0, most = 0;
            for (int i = 0; i < k; i++) most = std::max<double>(most, std::abs(to_float(w[c * k + i])));
            float scale = float(most) / 127;
            for (int g = 0; g < groups; g++) {
                float largest = 0;
                int end = std::min(k, 128 * g + 128);
                for (int i = 128 * g; i < end; i++) largest = std::max(largest, std::abs(to_float(x[r * k + i])));
                for (int i = 128 * g; i < end; i++) {
                    float a = to_float(x[r * k + i]), b = to_float(w[c * k + i]);
                    sum += double(a) * b;
                    sum8 += std::nearbyint(a * (1 / (largest / 127))) * (largest / 127) * std::nearbyint(b / scale) * scale;
                }
            }
            exact[r * n + c] = sum + to_float(bias[c]), exact8[r * n + c] = sum8 + to_float(bias[c]);
        }
    std::vector<int8_t> values(rows * k);
    std::vector<float> scales(rows);
    std::vector<int32_t> compensation(rows * groups);
    pack_int8(w.data(), rows, k, values.data(), scales.data(), compensation.data());
    pack_bf16(w.data(), rows, k);
    std::vector<bf16> out(m * n), out8(m * n), one(n);
    linear_bf16(x.data(), k, w.data(), bias.data(), out.data(), m, n, k);
    linear_int8(x.data(), k, values.data(), scales.data(), compensation.data(), bias.data(), out8.data(), m, n, k);
    double error = relative_error(out, exact), error8 = relative_error(out8, exact8);
    check(error < 0.62 / 256, "bf16 product", error, m, n, k);
    check(error8 < 1.0 / 256, "int8 product", error8, m, n, k);
    for (int r = 0; r < m; r++) {  // bit for bit, by itself
        linear_bf16(&x[r * k], k, w.data(), bias.data(), one.data(), 1, n, k);
        check(!std::memcmp(one.data(), &out[r * n], 2 * n), "bf16 row", r, m, n, k);
        linear_int8(&x[r * k], k, values.data(), scales.data(), compensation.data(), bias.data(), one.data(), 1, n, k);
        check(!std::memcmp(one.data(), &out8[r * n], 2 * n), "int8 row", r, m, n, k);
    }
}

// Beside a product of rounded activations with what `rows_int4` makes of the weight, which must be near to it.
static void check_linear_int4(int m, int n, int k, int group) {
    int rows = (n + 31) / 32 * 32, blocks = (k + 127) / 128, groups = rows * blocks * 128 / group;
    auto x = random_values(m * k), w = random_values(rows * k);
    std::vector<uint8_t> codes(rows * blocks * 64), zeros(groups);
    std::vector<uint16_t> scales(groups);
    std::vector<float> factors(rows);
    int4::quantize_int4(w.data(), rows, k, codes.data(), scales.data(), zeros.data(), factors.data(), group);
    std::vector<int64_t> ids(n);
    for (int i = 0; i < n; i++) ids[i] = i;
    std::vector<bf16> known(n * k), out(m * n), one(n);
    int4::rows_int4(codes.data(), scales.data(), zeros.data(), factors.data(), ids.data(), known.data(), n, k, group);
    std::vector<double> given(n * k), exact(m * n);
    for (int i = 0; i < n * k; i++) given[i] = to_float(w[i]);
    double error = relative_error(known, given);
    check(error < 0.12, "int4 weight", error, n, k, group);
    for (int r = 0; r < m; r++)
        for (int i = 0; i < k; i++) {
            float largest = 0;
            for (int j = i / 128 * 128; j < std::min(k, i / 128 * 128 + 128); j++)
                largest = std::max(largest, std::abs(to_float(x[r * k + j])));
            float step = largest / 127;
            double rounded = std::nearbyint(to_float(x[r * k + i]) / step) * step;
            for (int c = 0; c < n; c++) exact[r * n + c] += rounded * to_float(known[c * k + i]);
        }
    auto multiply = [&](const bf16* from, bf16* to, int num) {
        int4::linear_int4(from, k, codes.data(), scales.data(), zeros.data(), factors.data(), nullptr, to, num, n, k,
                          group);
    };
    multiply(x.data(), out.data(), m);
    error = relative_error(out, exact);
    check(error < 1.0 / 256, "int4 product", error, m, n, k);
    for (int r = 0; r < m; r++) {
        multiply(&x[r * k], one.data(), 1);
        check(!std::memcmp(one.data(), &out[r * n], 2 * n), "int4 row", r, m, n, k);
    }
}

static void check_attention(int group, int d, int block_size, int queries) {
    int len = 150, kv_heads = 2, heads = kv_heads * group, blocks = (len + block_size - 1) / block_size;
    std::vector<int32_t> table(blocks), bounds{0, queries}, lens{len};
    for (int i = 0; i < blocks; i++) table[i] = blocks - 1 - i;
    auto q = random_values(queries * heads * d), k = random_values(blocks * kv_heads * block_size * d);
    auto v = random_values(k.size());
    std::vector<bf16> out(q.size()), out8(q.size());
    std::vector<double> exact(q.size());
    auto place = [&](int head, int i) {
        return ((table[i / block_size] * kv_heads + head) * block_size + i % block_size) * d;
    };
    for (int t = 0; t < queries; t++)
        for (int h = 0; h < heads; h++) {
            double total = 0;
            double* sums = &exact[(t * heads + h) * d];
            for (int i = 0; i <= len - queries + t; i++) {
                double score = 0;
                int at = place(h / group, i);
                for (int c = 0; c < d; c++) score += to_float(q[(t * heads + h) * d + c]) * to_float(k[at + c]);
                double weight = std::exp(score / std::sqrt(d));
                total += weight;
                for (int c = 0; c < d; c++) sums[c] += weight * to_float(v[at + c]);
            }
            for (int c = 0; c < d; c++) sums[c] /= total;
        }
    attend(q.data(), k.data(), v.data(), out.data(), bounds.data(), lens.data(), table.data(), blocks, 1, heads,
           kv_heads, d, block_size, 0, 0);
    double error = relative_error(out, exact);
    check(error < 0.01, "attention", error, group, d, queries);
    std::vector<uint8_t> k8(k.size() / d * (d + 4)), v8(k8.size());
    std::vector<bf16> row(kv_heads * d);
    for (int64_t slot = 0; slot < blocks * block_size; slot++)
        for (auto [from, to] : {std::pair(&k, &k8), std::pair(&v, &v8)}) {
            for (int h = 0; h < kv_heads; h++) {
                int at = ((slot / block_size * kv_heads + h) * block_size + slot % block_size) * d;
                std::copy_n(from->data() + at, d, row.data() + h * d);
            }
            store_kv_int8(row.data(), kv_heads * d, to->data(), &slot, 1, kv_heads, block_size, d);
        }
    attend_int8(q.data(), k8.data(), v8.data(), out8.data(), bounds.data(), lens.data(), table.data(), blocks, 1, heads,
                kv_heads, d, block_size);
    double error8 = relative_error(out8, exact);
    check(error8 < 0.02, "attention in int8", error8, group, d, queries);
}

static void check_small(int n) {
    auto x = random_values(3 * n, 5), y = random_values(3 * n), weight = random_values(n);
    std::vector<bf16> sum(3 * n), out(3 * n), gated(3 * n);
    std::vector<double> normed(3 * n), silu(3 * n);
    add_rms_norm(x.data(), y.data(), weight.data(), 1e-6f, sum.data(), out.data(), 3, n);
    silu_and_mul(x.data(), y.data(), n, gated.data(), 3, n);
    for (int t = 0; t < 3; t++) {
        double squares = 0;
        for (int i = t * n; i < t * n + n; i++) {
            bf16 expected = to_bf16(to_float(x[i]) + to_float(y[i]));
            check(sum[i] == expected, "sum", sum[i], n, t, i);
            squares += std::pow(to_float(sum[i]), 2);
            silu[i] = to_float(x[i]) / (1 + std::exp(-double(to_float(x[i])))) * to_float(y[i]);
        }
        for (int i = 0; i < n; i++)
            normed[t * n + i] = to_float(sum[t * n + i]) / std::sqrt(squares / n + 1e-6) * to_float(weight[i]);
    }
    double error = relative_error(out, normed), gate_error = relative_error(gated, silu);
    check(error < 0.01, "norm", error, n);
    check(gate_error < 0.01, "gate", gate_error, n);
}

static void check_sampling(int v) {
    auto logits = random_values(4 * v, 2);
    std::vector<float> temperatures{0, 1, 1, 1};
    std::vector<double> uniforms{0.5, 0.001, 0.5, 0.999};
    std::vector<int64_t> tokens(4), rows{0, 1, 2, 3}, ranks(4), num_top(4, 3), top(12);
    std::vector<float> logprobs(4), top_logprobs(12);
    sample(logits.data(), v, temperatures.data(), uniforms.data(), nullptr, tokens.data(), 4, v);
    token_logprobs(logits.data(), v, rows.data(), tokens.data(), num_top.data(), logprobs.data(), ranks.data(),
                   top.data(), top_logprobs.data(), 3, 4, v);
    for (int r = 0; r < 4; r++) {
        auto value = [&](int i) { return double(to_float(logits[r * v + i])); };
        double total = 0, before = 0, rank = 1;
        for (int i = 0; i < v; i++) {
            total += std::exp(value(i));
            before += i < tokens[r] ? std::exp(value(i)) : 0;
            rank += value(i) > value(tokens[r]);
        }
        double share = before / total, chosen = std::exp(value(tokens[r])) / total, u = uniforms[r];
        bool is_drawn = temperatures[r] == 0 ? rank == 1 : share < u + 1e-4 && share + chosen > u - 1e-4;
        check(is_drawn && ranks[r] == rank, "sampled", tokens[r], v, r);
        check(std::abs(std::log(chosen) - logprobs[r]) < 1e-4, "log-probability", logprobs[r], v, r);
        bool is_top = value(top[3 * r]) >= value(top[3 * r + 1]) && value(top[3 * r + 1]) >= value(top[3 * r + 2]);
        int above = 0;
        for (int i = 0; i < v; i++) above += value(i) > value(top[3 * r + 2]);
        check(is_top && above <= 2, "top tokens", above, v, r);
    }
    std::vector<uint16_t> mask((v + 31) / 32 * 2, 0x5a5a);
    auto masked = logits;
    mask_logits(masked.data(), v, rows.data(), mask.data(), 1, v);
    for (int i = 0; i < 4 * v; i++) {
        bool is_forbidden = i < v && !(0x5a5a >> i % 16 & 1);
        check(masked[i] == (is_forbidden ? 0xff80 : logits[i]), "mask", i, v);
    }
}

int main() {
    set_default_threads(2);
    for (int m : {1, 2, 3, 4, 5, 6, 7, 12, 13})
        for (int n : {32, 45})
            for (int k : {4, 132, 512}) check_linear(m, n, k);
    for (int m : {1, 2, 5, 13})
        for (int group : {16, 32, 128})
            for (int k : {128, 384}) check_linear_int4(m, 45, k, group);
    for (int d : {16, 40, 64, 80, 128, 256})
        for (int group : {1, 2, 3})
            for (int queries : {1, 37}) check_attention(group, d, d == 64 ? 24 : 16, queries);
    for (int n : {1, 20, 64, 1000}) check_small(n);
    for (int v : {3, 16, 70, 1000, 5000}) check_sampling(v);
    printf(num_wrong ? "%d wrong\n" : "all right\n", num_wrong);
    return num_wrong > 0;
}
