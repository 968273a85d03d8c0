// Norms, rotation, routing, and what the cache stores: small things done per token, all in fp32.
#pragma once
#include <cmath>
#include "model.h"

INLINE vf vector_part(const Vector& v, int i) {
    const int count = std::min(LANES, v.size - i);
    if (v.type == F32) return count == LANES ? load((const float*)v.data + i) : load_some((const float*)v.data + i, count);
    return count == LANES ? load_bf16((const uint16_t*)v.data + i) : load_bf16_some((const uint16_t*)v.data + i, count);
}

// out = x / rms(x) * gain; x and out hold multiples of 16 numbers, zeros behind `gain.size`.
static void rms_norm(const float* x, const Vector& gain, float eps, float* out) {
    vf squares = splat(0.0f);
    for (int i = 0; i < gain.size; i += LANES) {
        vf v = gain.size - i >= LANES ? load(x + i) : load_some(x + i, gain.size - i);
        squares += v * v;
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / gain.size + eps);
    for (int i = 0; i < gain.size; i += LANES) {
        vf v = gain.size - i >= LANES ? load(x + i) : load_some(x + i, gain.size - i);
        store(out + i, v * (vector_part(gain, i) * factor));
    }
}

// Turn interleaved pairs in place (spec 1.4).
static void rotate(float* x, int rope, const float* cosine, const float* sine) {
    for (int j = 0; j < rope / 2; j++) {
        const float a = x[2 * j], b = x[2 * j + 1];
        x[2 * j] = a * cosine[j] - b * sine[j];
        x[2 * j + 1] = b * cosine[j] + a * sine[j];
    }
}

// Eight rows of a plain matrix times x in fp32, whatever its type: bf16 products would flip near-ties between experts.
template <int32_t TYPE>
static void eight_dots(const Matrix& w, int row, const float* x, float* out) {
    constexpr int ROWS = 8;
    vf acc[16] = {};
    const int rows = std::min(ROWS, w.rows - row);
    const size_t stride = (size_t)w.cols;
    int k = 0;
    for (; k + LANES <= w.cols; k += LANES) {
        const vf right = load(x + k);
        for (int r = 0; r < ROWS; r++) {
            const size_t at = (row + std::min(r, rows - 1)) * stride + k;
            acc[r] += (TYPE == F32 ? load((const float*)w.data + at) : load_bf16((const uint16_t*)w.data + at)) * right;
        }
    }
    for (int r = 0; r < rows && k < w.cols; r++) {
        const size_t at = (row + r) * stride + k;
        acc[r] += (TYPE == F32 ? load_some((const float*)w.data + at, w.cols - k) : load_bf16_some((const uint16_t*)w.data + at, w.cols - k)) * load(x + k);
    }
    float sums[16];
    store(sums, sum_each(acc));
    std::memcpy(out, sums, rows * sizeof(float));
}

// Choose a token's experts (eq 20-22, section 2.2.2) by its logits, which become affinities; equal ones go to the lower index.
static void route(const Model& m, float* affinity, int32_t* experts, float* gates, float* candidate) {
    float largest = -INFINITY, total = 0;
    for (int e = 0; e < m.experts; e++) largest = std::max(largest, affinity[e]);
    for (int e = 0; e < m.experts; e++) total += affinity[e] = std::exp(affinity[e] - largest);
    for (int e = 0; e < m.experts; e++) candidate[e] = affinity[e] /= total;
    if (m.reachable < m.groups) {
        const int width = m.experts / m.groups;
        float* best = candidate + m.experts;  // [groups]
        for (int g = 0; g < m.groups; g++) best[g] = *std::max_element(affinity + g * width, affinity + (g + 1) * width);
        for (int g = 0; g < m.groups; g++) {
            int ahead = 0;
            for (int other = 0; other < m.groups; other++) ahead += best[other] > best[g] || (best[other] == best[g] && other < g);
            if (ahead >= m.reachable) std::fill(candidate + g * width, candidate + (g + 1) * width, -1.0f);
        }
    }
    float sum_of_gates = 0;
    for (int k = 0; k < m.chosen; k++) {
        int best = 0;
        for (int e = 1; e < m.experts; e++) if (candidate[e] > candidate[best]) best = e;
        experts[k] = best;
        sum_of_gates += gates[k] = affinity[best];
        candidate[best] = -2.0f;
    }
    for (int k = 0; k < m.chosen; k++) gates[k] = (m.renormalise ? gates[k] / sum_of_gates : gates[k]) * m.gate_scale;
}

// Row of an embedding, widened; `out` has room for a multiple of 32.
static void embed(const Matrix& w, int row, float* out) {
    if (w.type == F32) { std::memcpy(out, (const float*)w.data + (size_t)row * w.cols, w.cols * sizeof(float)); return; }
    if (w.type == BF16) { for (int k = 0; k < w.cols; k++) out[k] = widen(((const uint16_t*)w.data)[(size_t)row * w.cols + k]); return; }
    const int groups = padded(w.cols) / GROUP, lane = row % TILE;
    for (int k = 0; k < w.cols; k++) {
        const size_t tile = (size_t)(row / TILE) * groups + k / GROUP;
        const int c = k % GROUP;
        const float scale = widen(w.scales[tile * TILE + lane]);
        if (w.type == I8) out[k] = ((int)((const uint8_t*)w.data)[tile * 512 + c / 4 * 64 + lane * 4 + c % 4] - 128) * scale;
        else {
            const int byte = ((const uint8_t*)w.data)[tile * 256 + c / 8 * 64 + lane * 4 + c % 4];
            out[k] = ((c % 8 < 4 ? byte & 15 : byte >> 4) - 8) * scale;
        }
    }
}

// The latent cache ------------------------------------------------------------------------------------------------------------------
//
// One entry: the latent after its norm, then the shared key after its rotation.
//   F32, BF16  as they are.
//   8          latent int8 in groups of 64, then the groups' bf16 scales, then the key in bf16.
//   6          latent in 4 bits, groups of 32: nibbles (even index low), then fp16 scales, then 8-bit zeros, then the key in bf16 (spec 7).

INLINE float from_half(uint16_t h) { _Float16 x; std::memcpy(&x, &h, 2); return (float)x; }
INLINE uint16_t to_half(float f) { _Float16 x = (_Float16)f; uint16_t h; std::memcpy(&h, &x, 2); return h; }
INLINE uint16_t narrow(float x) {
    uint32_t u; std::memcpy(&u, &x, 4);
    return x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
constexpr int GROUP_8 = 64, GROUP_6 = 32;

// An entry of 8 or 6 bits may have an odd number of bytes, so a scale may lie at any address.
INLINE void put_half(uint8_t* at, uint16_t h) { std::memcpy(at, &h, 2); }

static void encode(const Cache& cache, uint8_t* entry, const float* latent, int size, const float* key, int rope) {
    if (cache.format == CACHE_F32) {
        std::memcpy(entry, latent, size * 4);
        std::memcpy(entry + size * 4, key, rope * 4);
        return;
    }
    uint8_t* tail;
    if (cache.format == CACHE_BF16) {
        for (int i = 0; i < size; i++) ((uint16_t*)entry)[i] = narrow(latent[i]);
        tail = entry + size * 2;
    } else if (cache.format == CACHE_8) {
        const int groups = (size + GROUP_8 - 1) / GROUP_8;
        uint8_t* scales = entry + size;
        for (int g = 0; g < groups; g++) {
            const int from = g * GROUP_8, to = std::min(size, from + GROUP_8);
            float largest = 0;
            for (int i = from; i < to; i++) largest = std::max(largest, std::fabs(latent[i]));
            uint16_t code = narrow(largest / 127.0f);
            if (widen(code) * 127.0f < largest) code++;  // rounded up, so that no value leaves the range
            put_half(scales + 2 * g, code);
            const float inverse = largest > 0 ? 1.0f / widen(code) : 0.0f;
            for (int i = from; i < to; i++) ((int8_t*)entry)[i] = (int8_t)std::nearbyint(latent[i] * inverse);
        }
        tail = scales + 2 * groups;
    } else {
        const int groups = size / GROUP_6;
        uint8_t *scales = entry + size / 2, *zeros = scales + 2 * groups;
        for (int g = 0; g < groups; g++) {
            const float* x = latent + g * GROUP_6;
            const float low = std::min(0.0f, *std::min_element(x, x + GROUP_6)), high = std::max(0.0f, *std::max_element(x, x + GROUP_6));
            // zero in sixteenths of a step; value = scale * (code - zero / 16)
            const uint16_t code_of_scale = to_half((high - low) / 15.0f);
            put_half(scales + 2 * g, code_of_scale);
            const float scale = from_half(code_of_scale), inverse = scale > 0 ? 1.0f / scale : 0.0f;
            const float zero = std::min(255.0f, std::nearbyint(-low * inverse * 16.0f));
            zeros[g] = (uint8_t)zero;
            for (int i = 0; i < GROUP_6; i += 2) {
                int code[2];
                for (int b = 0; b < 2; b++) code[b] = (int)std::min(15.0f, std::max(0.0f, std::nearbyint(x[i + b] * inverse + zero / 16.0f)));
                entry[(g * GROUP_6 + i) / 2] = (uint8_t)(code[0] | code[1] << 4);
            }
        }
        tail = zeros + groups;
    }
    for (int i = 0; i < rope; i++) put_half(tail + 2 * i, narrow(key[i]));
}

// Widen or copy the first `count` entries of a block into rows of `width` numbers: the latent, then the key from `key_at` on.
// Rows that are not there become zeros: a number that memory held before could be a NaN, which a masked weight of 0 would not stop.
static void decode(const Cache& cache, const uint8_t* block, int count, int size, int rope, int key_at, int width, float* out) {
    std::memset(out, 0, (size_t)BLOCK * width * sizeof(float));
    for (int t = 0; t < count; t++, out += width) {
        const uint8_t* entry = block + (size_t)t * cache.entry_bytes;
        const uint8_t* tail;
        if (cache.format == CACHE_F32) {
            std::memcpy(out, entry, size * 4);
            std::memcpy(out + key_at, entry + size * 4, rope * 4);
            continue;
        }
        if (cache.format == CACHE_BF16) {
            for (int i = 0; i < size; i++) out[i] = widen(((const uint16_t*)entry)[i]);
            tail = entry + size * 2;
        } else if (cache.format == CACHE_8) {
            const int groups = (size + GROUP_8 - 1) / GROUP_8;
            for (int i = 0; i < size; i++) out[i] = ((const int8_t*)entry)[i] * widen(load_as<uint16_t>(entry + size + i / GROUP_8 * 2));
            tail = entry + size + 2 * groups;
        } else {
            const int groups = size / GROUP_6;
            const uint8_t *scales = entry + size / 2, *zeros = scales + 2 * groups;
            for (int g = 0; g < groups; g++) {
                const float scale = from_half(load_as<uint16_t>(scales + 2 * g)), shift = zeros[g] / 16.0f * scale;
                for (int i = 0; i < GROUP_6; i += 2) {
                    const int both = entry[(g * GROUP_6 + i) / 2];
                    out[g * GROUP_6 + i] = (both & 15) * scale - shift;
                    out[g * GROUP_6 + i + 1] = (both >> 4) * scale - shift;
                }
            }
            tail = zeros + groups;
        }
        for (int i = 0; i < rope; i++) out[key_at + i] = widen(load_as<uint16_t>(tail + 2 * i));
    }
}
