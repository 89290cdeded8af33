// The operations between the products: norms, rotary embedding, SwiGLU's gate.
// Each rounds to bf16 where the plain PyTorch code does. Rows may have any length. A few tokens are done before other
// threads would wake up.

#include "common.h"

namespace {

constexpr int64_t FEW = 5;  // fewer tokens are done by one thread

// The factor that makes the mean square of n values 1.
inline __m512 inverse_rms(const bf16* x, int64_t n, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        __m512 value = load16(x + i, n - i);
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(sum) / n + eps));
}

// Values times the factor and, if there are any, the weights; without weights they stay as they are.
inline __m512 normed(const bf16* x, const bf16* weight, __m512 factor, int64_t left) {
    __m512 value = load16(x, left);
    if (!weight) return value;
    return rounded(_mm512_mul_ps(rounded(_mm512_mul_ps(value, factor)), load16(weight, left)));
}

// Norm and rotation of `heads` heads of one token, in halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
void norm_rope_token(const bf16* x, const bf16* weight, float eps, const float* cos, const float* sin, bf16* out,
                     int64_t heads, int64_t d) {
    for (int64_t h = 0; h < heads; h++, x += d, out += d) {
        __m512 factor = weight ? inverse_rms(x, d, eps) : _mm512_setzero_ps();
        for (int64_t i = 0; i < d / 2; i += 16) {
            int64_t j = i + d / 2, left = d / 2 - i;
            __m512 x1 = normed(x + i, weight ? weight + i : nullptr, factor, left);
            __m512 x2 = normed(x + j, weight ? weight + j : nullptr, factor, left);
            __m512 c = _mm512_maskz_loadu_ps(lanes(left), cos + i), s = _mm512_maskz_loadu_ps(lanes(left), sin + i);
            store16(out + i, _mm512_fmsub_ps(x1, c, _mm512_mul_ps(x2, s)), left);
            store16(out + j, _mm512_fmadd_ps(x2, c, _mm512_mul_ps(x1, s)), left);
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
                store16(sum + t * n + i, _mm512_add_ps(load16(row + i, n - i), load16(other + i, n - i)), n - i);
            row = sum + t * n;
        }
        __m512 factor = inverse_rms(row, n, eps);
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
            __m512 g = load16(gate + t * stride + i, n - i);
            // exp(200) is infinite already, and so silu(g) 0; beyond it the polynomial would be of infinities
            __m512 e = exp_of(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), _mm512_set1_ps(200)));
            __m512 silu = _mm512_div_ps(g, _mm512_add_ps(e, _mm512_set1_ps(1)));
            store16(out + t * n + i, _mm512_mul_ps(rounded(silu), load16(up + t * stride + i, n - i)), n - i);
        }
    });
}

REPLAYABLE(add_rms_norm)
REPLAYABLE(norm_rope)
REPLAYABLE(silu_and_mul)
