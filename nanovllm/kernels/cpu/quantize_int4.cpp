// Weights of 4 bits made of bf16, reordered from the usual order, and rows of them; see int4.h.

#include "int4.h"

namespace int4 {

// Puts a row's codes of a block to their places: input i is the low half of pairs[i], input 64 + i the high one.
inline void put_pairs(const uint8_t* pairs, int64_t lane, uint8_t* block) {
    for (int64_t i = 0; i < BLOCK / 2; i += 4) std::memcpy(block + i * PANEL + lane * 4, pairs + i, 4);
}

// As _quantize_4 in quantized.py: of some shrunken ranges the scale of the least squared error.
void quantize_group(const bf16* from, int64_t size, float factor, uint8_t* codes, uint16_t& half, uint8_t& zero) {
    Floats w[BLOCK / 16], low = all(0), high = all(0);
    for (int64_t i = 0; i < size / 16; i++) {
        w[i] = load16(from + 16 * i);
        low = smaller(low, w[i]), high = larger(high, w[i]);
    }
    float full = std::max(largest_of(high) + largest_of(all(0) - low), 1e-30f) / 15, least = INFINITY;
    float offset = std::nearbyint(largest_of(all(0) - low) / full), best = full;
    auto code_of = [&](Floats x, float scale) {
        return smaller(larger(nearest(x / all(scale)) + all(offset), all(0)), all(15));
    };
    for (float shrink : {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.7f}) {
        Floats products = all(0), squares = all(0);
        for (int64_t i = 0; i < size / 16; i++) {
            Floats code = code_of(w[i], full * shrink) - all(offset);
            products = multiply_add(products, w[i], code), squares = multiply_add(squares, code, code);
        }
        // The best scale for these codes, and what it saves of the error: |w - s d|^2 = |w|^2 - 2 s wd + s^2 dd.
        float wd = sum_of(products), dd = sum_of(squares);
        float fitted = from_half(to_half(wd / std::max(dd, 1.0f) / factor)) * factor;
        float error = fitted * (fitted * dd - 2 * wd);
        if (error < least && fitted > 0) least = error, best = fitted;
    }
    half = to_half(best / factor), zero = uint8_t(offset);
    for (int64_t i = 0; i < size / 16; i++) {
        float found[16];
        store(found, code_of(w[i], from_half(half) * factor));
        std::copy_n(found, 16, codes + 16 * i);
    }
}

// Reorders [n, blocks * 64] bytes, the low halves of which are the codes of even inputs; n is a multiple of 32.
EXPORT void pack_int4(uint8_t* codes, int64_t n, int64_t blocks) {
    parallel_for(n / PANEL, 2, [&](int64_t panel) {
        uint8_t *to = codes + panel * blocks * BYTES, pairs[BLOCK / 2];
        std::vector<uint8_t> rows(to, to + blocks * BYTES);
        for (int64_t lane = 0; lane < PANEL; lane++)
            for (int64_t b = 0; b < blocks; b++) {
                const uint8_t *low = &rows[(lane * blocks + b) * BLOCK / 2], *high = low + BLOCK / 4;
                for (int64_t i = 0; i < BLOCK / 4; i++) {
                    pairs[2 * i] = (low[i] & 15) | high[i] << 4;
                    pairs[2 * i + 1] = low[i] >> 4 | (high[i] & 0xf0);
                }
                put_pairs(pairs, lane, to + b * BYTES);
            }
    });
}

// Quantises a [n, k] weight into the arrays of an Int4Weight, which are zeros; n likewise, groups divide k and 128.
EXPORT void quantize_int4(const bf16* w, int64_t n, int64_t k, uint8_t* codes, uint16_t* scales, uint8_t* zeros,
                          float* factors, int64_t size) {
    int64_t blocks = ceil_div(k, BLOCK), groups = blocks * BLOCK / size;
    parallel_for(n / PANEL, 2, [&](int64_t panel) {
        for (int64_t row = panel * PANEL; row < (panel + 1) * PANEL; row++) {
            const bf16* from = w + row * k;
            uint16_t largest = 0;
            for (int64_t i = 0; i < k; i++) largest = std::max<uint16_t>(largest, from[i] & 0x7fff);
            int exponent = largest ? std::max(std::ilogb(to_float(largest)), -100) : 0;
            float factor = factors[row] = std::ldexp(1.0f, exponent - 14);
            for (int64_t b = 0; b < blocks; b++) {
                uint8_t found[BLOCK] = {}, pairs[BLOCK / 2];
                for (int64_t i = 0; i < std::min(BLOCK, k - b * BLOCK); i += size) {
                    int64_t at = (panel * groups + (b * BLOCK + i) / size) * PANEL + row % PANEL;
                    quantize_group(from + b * BLOCK + i, size, factor, found + i, scales[at], zeros[at]);
                }
                for (int64_t i = 0; i < BLOCK / 2; i++) pairs[i] = found[i] | found[BLOCK / 2 + i] << 4;
                put_pairs(pairs, row % PANEL, codes + (panel * blocks + b) * BYTES);
            }
        }
    });
}

// Rows ids[t] of a packed weight: out [t, k].
EXPORT void rows_int4(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const float* factors,
                      const int64_t* ids, bf16* out, int64_t num_ids, int64_t k, int64_t group) {
    Int4Weight w{codes, zeros, scales, factors, ceil_div(k, BLOCK), group};
    parallel_for(num_ids, 5, [&](int64_t t) {
        int64_t panel = ids[t] / PANEL, lane = ids[t] % PANEL;
        for (int64_t i = 0; i < k; i++) {
            int64_t j = i % BLOCK, at = w.at(panel, i) + lane;
            uint8_t pair = w.block(panel, i / BLOCK)[(j % (BLOCK / 2) / 4 * PANEL + lane) * 4 + j % 4];
            float value = float((j < BLOCK / 2 ? pair & 15 : pair >> 4) - zeros[at]) * from_half(scales[at]);
            store16(out + t * k + i, all(value * factors[ids[t]]), 1);
        }
    });
}

REPLAYABLE(rows_int4)

}  // namespace int4
