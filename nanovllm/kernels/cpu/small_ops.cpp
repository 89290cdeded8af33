// The operations between the products: norms, rotary embedding, SwiGLU's gate.
// Each rounds to bf16 where the plain PyTorch code does. Rows may have any length. A few tokens are done before other
// threads would wake up.

#include "common.h"

namespace {

constexpr int64_t FEW = 5;  // fewer tokens are done by one thread

// The factor that makes the mean square of n values 1.
inline Floats inverse_rms(const bf16* x, int64_t n, float eps) {
    Floats sum = all(0);
    for (int64_t i = 0; i < n; i += 16) {
        Floats value = load16(x + i, n - i);
        sum = multiply_add(sum, value, value);
    }
    return all(1 / std::sqrt(sum_of(sum) / n + eps));
}

// Values times the factor and, if there are any, the weights; without weights they stay as they are.
inline Floats normed(const bf16* x, const bf16* weight, Floats factor, int64_t left) {
    Floats value = load16(x, left);
    if (!weight) return value;
    return rounded(rounded(value * factor) * load16(weight, left));
}

// Norm and rotation of `heads` heads of one token, in halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
void norm_rope_token(const bf16* x, const bf16* weight, float eps, const float* cos, const float* sin, bf16* out,
                     int64_t heads, int64_t d) {
    for (int64_t h = 0; h < heads; h++, x += d, out += d) {
        Floats factor = weight ? inverse_rms(x, d, eps) : all(0);
        for (int64_t i = 0; i < d / 2; i += 16) {
            int64_t j = i + d / 2, left = d / 2 - i;
            Floats x1 = normed(x + i, weight ? weight + i : nullptr, factor, left);
            Floats x2 = normed(x + j, weight ? weight + j : nullptr, factor, left);
            Floats c = load(cos + i, left), s = load(sin + i, left);
            store16(out + i, multiply_add(-(x2 * s), x1, c), left);
            store16(out + j, multiply_add(x1 * s, x2, c), left);
        }
    }
}

}  // namespace

// sum [t, n] = x + residual (x if there is none), out = its norm times the weight.
EXPORT void add_rms_norm(const bf16* x, const bf16* residual, const bf16* weight, float eps, bf16* sum, bf16* out,
                         int64_t num_tokens, int64_t n) {
    parallel_for(num_tokens, FEW, [&](int64_t t) {
        const bf16* row = x + t * n;
        if (residual) {
            const bf16* other = residual + t * n;
            for (int64_t i = 0; i < n; i += 16)
                store16(sum + t * n + i, load16(row + i, n - i) + load16(other + i, n - i), n - i);
            row = sum + t * n;
        }
        Floats factor = inverse_rms(row, n, eps);
        for (int64_t i = 0; i < n; i += 16)
            store16(out + t * n + i, normed(row + i, weight + i, factor, n - i), n - i);
    });
}

// q [T, H, D] and k [T, KH, D], tokens q_stride and k_stride apart, to contiguous ones; cos, sin [positions, D / 2].
EXPORT void norm_rope(const bf16* q, int64_t q_stride, const bf16* k, int64_t k_stride, const bf16* q_weight,
                      const bf16* k_weight, float eps, const float* cos, const float* sin, const int64_t* positions,
                      bf16* q_out, bf16* k_out, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                      int64_t d) {
    parallel_for(num_tokens, FEW, [&](int64_t t) {
        const float *c = cos + positions[t] * d / 2, *s = sin + positions[t] * d / 2;
        norm_rope_token(q + t * q_stride, q_weight, eps, c, s, q_out + t * num_heads * d, num_heads, d);
        norm_rope_token(k + t * k_stride, k_weight, eps, c, s, k_out + t * num_kv_heads * d, num_kv_heads, d);
    });
}

// out [t, n] = silu(gate) * up, both with rows `stride` apart.
EXPORT void silu_and_mul(const bf16* gate, const bf16* up, int64_t stride, bf16* out, int64_t num_tokens, int64_t n) {
    parallel_for(num_tokens, FEW, [&](int64_t t) {
        for (int64_t i = 0; i < n; i += 16) {
            Floats g = load16(gate + t * stride + i, n - i);
            // exp(200) is infinite already, exp(-200) 0; beyond them the polynomial would be of infinities
            Floats e = exp_of(larger(smaller(all(0) - g, all(200)), all(-200)));
            Floats silu = g / (e + all(1));
            store16(out + t * n + i, rounded(silu) * load16(up + t * stride + i, n - i), n - i);
        }
    });
}

REPLAYABLE(add_rms_norm)
REPLAYABLE(norm_rope)
REPLAYABLE(silu_and_mul)
