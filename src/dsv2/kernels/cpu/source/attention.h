// Attention over a paged latent cache, in both readings (section 2.1, appendix C).
//
// Absorbed: sixteen (token, head) rows share each cached entry, which is key and value at once. Keys are taken in spans, of 64 at the beginning
// of a text and 128 behind them; each span gives a partial result with its own maximum and sum. The four spans of a run are merged in order, and
// then the runs, so it makes no difference which thread computed which: threads share the spans of a short text and the runs of a long one.
// Expanded: per head, keys and values are rebuilt 64 tokens at a time and met by all queries while they are in the cache.
// Either way a query's result depends on its own position and the entries before it, not on the queries computed with it.
//
// NARROW: products of bf16 pairs, as the weights are; otherwise fp32.
#pragma once
#include "layers.h"

const vi COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int SPAN = 2 * BLOCK, RUN = 4;  // keys; spans
constexpr int SHORT_SPANS = 8;            // of one block, at the beginning: two threads get even shares of a text of 150 tokens
constexpr float NOTHING = -1e30f;  // a score that no query sees; finite, so that differences of two stay numbers

INLINE int span_start(int span) { return span < SHORT_SPANS ? span * BLOCK : SHORT_SPANS * BLOCK + (span - SHORT_SPANS) * SPAN; }
// Spans that hold the first `end` keys.
INLINE int spans_for(int end) {
    return end <= SHORT_SPANS * BLOCK ? (end + BLOCK - 1) / BLOCK : SHORT_SPANS + (end - SHORT_SPANS * BLOCK + SPAN - 1) / SPAN;
}
INLINE int rounded(int n) { return (n + LANES - 1) / LANES * LANES; }

// Panels hold the right side of an outer product: row k of sixteen-lane columns; NARROW: a lane holds the pair of rows 2k and 2k + 1.

// acc[i][j] += sum over k of a[i][k] * panel[k][16 j ...]; depth counts steps: pairs if NARROW.
template <bool NARROW, int I, int J>
INLINE void outer(const float* const* a, const float* panel, int stride, int depth, vf (&acc)[I][J]) {
    for (int k = 0; k < depth; k++, panel += stride) {
        vf right[J];
        for (int j = 0; j < J; j++) right[j] = load(panel + j * LANES);
        for (int i = 0; i < I; i++) {
            const vf left = splat(load_as<float>(a[i] + k));
            for (int j = 0; j < J; j++) acc[i][j] = NARROW ? dot2(acc[i][j], (vi)left, (vi)right[j]) : acc[i][j] + left * right[j];
        }
    }
}

// Two rows of fp32 to bf16 pairs, one pair a lane.
INLINE vf pair(vf first, vf second) {
    return (vf)(__builtin_convertvector(narrow(first), vu) | (__builtin_convertvector(narrow(second), vu) << 16));
}

// Sixteen rows of sixteen lanes to columns; a lane is one number or a pair.
INLINE void transpose(vf (&lane)[LANES]) {
    const vi low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int round = 0; round < 4; round++) {
        vf next[LANES];
        for (int i = 0; i < 8; i++) { next[2 * i] = __builtin_shuffle(lane[i], lane[i + 8], low); next[2 * i + 1] = __builtin_shuffle(lane[i], lane[i + 8], high); }
        std::memcpy(lane, next, sizeof lane);
    }
}

// One block of cached entries as rows to compute with: [BLOCK][width] numbers, bf16 if NARROW.
template <bool NARROW>
static const uint8_t* entries(const Model& m, const Cache& cache, const uint8_t* block, int count, int width, float* wide, uint16_t* thin) {
    const int key_at = rounded(m.latent);
    decode(cache, block, count, m.latent, m.rope, key_at, width, wide);
    if (!NARROW) return (const uint8_t*)wide;
    for (int i = 0; i < BLOCK * width; i += LANES) store_bf16(thin + i, load(wide + i));
    return (const uint8_t*)thin;
}

template <bool NARROW>
INLINE bool in_place(const Model& m, const Cache& cache) {
    return m.latent % LANES == 0 && m.rope % LANES == 0 && cache.format == (NARROW ? CACHE_BF16 : CACHE_F32);
}

INLINE int entry_width(const Model& m) { return rounded(m.latent) + rounded(m.rope); }

// What one thread needs beside its results.
struct Scratch {
    float *wide, *scores, *panel, *more;
    uint16_t* thin;
};

// Absorbed ---------------------------------------------------------------------------------------------------------------------------

// Sixteen query rows as a panel: lane i is row i. query: [rows][entry_width], already scaled; what lies behind the last row may be read.
template <bool NARROW>
static void pack_queries(const float* query, int rows, int width, float* panel) {
    constexpr int P = NARROW ? 2 : 1;
    for (int k = 0; k < width; k += P * LANES) {
        vf lane[LANES];
        for (int i = 0; i < LANES; i++) {
            const float* at = query + (size_t)i * width + k;
            if (i >= rows) { lane[i] = splat(0.0f); continue; }
            if (!NARROW) { lane[i] = load(at); continue; }
            const vh half[2] = {narrow(load(at)), narrow(load(at + LANES))};
            std::memcpy(&lane[i], half, sizeof half);
        }
        transpose(lane);
        for (int i = 0; i < LANES; i++) store(panel + (size_t)(k / P + i) * LANES, lane[i]);
    }
}

// One span of keys for sixteen query rows. Rows of scores and weights: [keys][16], NARROW weights: pairs of keys.
// last: position of each row; result: [16][latent, rounded], then sixteen maxima and sixteen sums.
// ahead: the blocks of the next span, whose lines are asked for evenly over this one's work: all at once, scores would wait for memory, and
// the second half would leave it idle.
template <bool NARROW>
static void absorbed_span(const Model& m, const Cache& cache, int layer, const int32_t* table, int from, int to, vi last, const float* panel,
                          Scratch& s, const uint8_t* const (&ahead)[SPAN / BLOCK], float* result) {
    const int width = entry_width(m), depth = NARROW ? width / 2 : width, latent = rounded(m.latent), item = NARROW ? 2 : 4;
    const size_t bytes = (size_t)BLOCK * cache.entry_bytes;
    const uint8_t* base = cache.data + (size_t)layer * cache.blocks * bytes;
    vf largest = splat(NOTHING);
    const uint8_t* rows[SPAN / BLOCK];
    const int blocks = (to - from + BLOCK - 1) / BLOCK, lines = cache.entry_bytes, each = lines / (latent / LANES) + 1;  // of 64 bytes, in a block
    for (int b = 0; b < blocks; b++) {
        const uint8_t* block = base + table[from / BLOCK + b] * bytes;
        const int count = std::min(BLOCK, to - from - b * BLOCK);
        const size_t room = (size_t)b * BLOCK * width;
        rows[b] = in_place<NARROW>(m, cache) ? block : entries<NARROW>(m, cache, block, count, width, s.wide + (NARROW ? 0 : room), s.thin + room);
        for (int key = 0; key < count; key += LANES) {
            vf acc[LANES];
            const float* at[LANES];
            for (int i = 0; i < LANES; i++) {
                acc[i] = splat(0.0f);
                at[i] = (const float*)(rows[b] + (size_t)std::min(key + i, count - 1) * width * item);  // what lies behind the last is undefined
            }
            const uint8_t* next = ahead[0] + (size_t)((b * BLOCK + key) / LANES) * (lines / (SPAN / LANES)) * 64;
            for (int k = 0; k < depth; k++) {
                const vf right = load(panel + k * LANES);
                if (k < lines / (SPAN / LANES)) __builtin_prefetch(next + (size_t)k * 64, 0, 2);
                for (int i = 0; i < LANES; i++) acc[i] = NARROW ? dot2(acc[i], splat(load_as<int32_t>(at[i] + k)), (vi)right) : acc[i] + splat(load_as<float>(at[i] + k)) * right;
            }
            for (int i = 0; i < LANES; i++) {
                const int position = from + b * BLOCK + key + i;
                acc[i] = select(last >= position, acc[i], splat(NOTHING));
                largest = vmax(largest, acc[i]);
                store(s.scores + (size_t)(b * BLOCK + key + i) * LANES, acc[i]);
            }
        }
    }
    vf total = splat(0.0f);
    for (int key = 0; from + key < to; key += 2) {  // scores are there for whole sixteens
        const vf seen0 = load(s.scores + (size_t)key * LANES), seen1 = load(s.scores + (size_t)(key + 1) * LANES);
        vf p0 = select(last >= from + key, exp(seen0 - largest), splat(0.0f)), p1 = select(last >= from + key + 1, exp(seen1 - largest), splat(0.0f));
        if (NARROW) { p0 = widen(narrow(p0)); p1 = widen(narrow(p1)); }  // the sum is that of the weights used
        total += p0; total += p1;
        if (NARROW) store(s.scores + (size_t)key / 2 * LANES, pair(p0, p1));
        else { store(s.scores + (size_t)key * LANES, p0); store(s.scores + (size_t)(key + 1) * LANES, p1); }
    }
    for (int c = 0; c < latent; c += LANES) {
        vf acc[LANES];
        for (int i = 0; i < LANES; i++) acc[i] = splat(0.0f);
        for (int b = 0; b < blocks; b++) {
            const int count = std::min(BLOCK, to - from - b * BLOCK);
            if (NARROW) {
                const uint16_t* v = (const uint16_t*)rows[b] + c;
                const float* p = s.scores + (size_t)b * BLOCK / 2 * LANES;
                const uint8_t* next = ahead[1] + (size_t)(c / LANES) * each * 64;
                for (int key = 0; key < count; key += 2, v += 2 * width, p += LANES) {
                    if (key / 2 + b * (BLOCK / 2) < each) __builtin_prefetch(next + (size_t)(key / 2 + b * (BLOCK / 2)) * 64, 0, 2);
                    const uint16_t* second = key + 1 < count ? v + width : v;  // its weight is 0 then
                    const vi both = (vi)(__builtin_convertvector(load_as<vh>(v), vu) | (__builtin_convertvector(load_as<vh>(second), vu) << 16));
                    for (int i = 0; i < LANES; i++) acc[i] = dot2(acc[i], splat(load_as<int32_t>(p + i)), both);
                }
            } else {
                const float* v = (const float*)rows[b] + c;
                const float* p = s.scores + (size_t)b * BLOCK * LANES;
                for (int key = 0; key < count; key++, v += width, p += LANES) {
                    const vf value = load(v);
                    for (int i = 0; i < LANES; i++) acc[i] += splat(p[i]) * value;
                }
            }
        }
        for (int i = 0; i < LANES; i++) store(result + (size_t)i * latent + c, acc[i]);
    }
    store(result + (size_t)LANES * latent, largest);
    store(result + (size_t)LANES * latent + LANES, total);
}

// Add a span's result to what came before it. One that no row sees changes no bit.
static void merge_span(const float* span, int latent, float* merged) {
    const size_t tail = (size_t)LANES * latent;
    const vf a = load(merged + tail), b = load(span + tail), both = vmax(a, b), old_part = exp(a - both), new_part = exp(b - both);
    for (int i = 0; i < LANES; i++) for (int c = 0; c < latent; c += LANES) {
        float* at = merged + (size_t)i * latent + c;
        store(at, load(at) * old_part[i] + load(span + (size_t)i * latent + c) * new_part[i]);
    }
    store(merged + tail, both);
    store(merged + tail + LANES, load(merged + tail + LANES) * old_part + load(span + tail + LANES) * new_part);
}

// Expanded ---------------------------------------------------------------------------------------------------------------------------

struct Expanded {
    const Model* m;
    const Cache* cache;
    const Layer* weights;
    const Segment* segment;
    int layer, head;
    const float* query;           // [rows][query_stride], of this head, scaled: nope, then the rotated part
    size_t query_stride;
    float* out;                   // [rows][out_stride], of this head
    size_t out_stride;
};

// W^UV of a head, transposed to a panel [latent][value].
template <bool NARROW>
static void pack_values(const Model& m, const Matrix& up, int head, int columns, float* panel) {
    const size_t first = ((size_t)head * (m.nope + m.value) + m.nope) * m.latent;
    for (int l = 0; l < m.latent; l += NARROW ? 2 : 1) for (int c = 0; c < columns; c++) {
        const size_t at = first + (size_t)c * m.latent + l;
        if (!NARROW) { panel[(size_t)l * columns + c] = c < m.value ? ((const float*)up.data)[at] : 0.0f; continue; }
        uint16_t* two = (uint16_t*)(panel + (size_t)l / 2 * columns + c);
        two[0] = c < m.value ? ((const uint16_t*)up.data)[at] : 0;
        two[1] = c < m.value && l + 1 < m.latent ? ((const uint16_t*)up.data)[at + 1] : 0;
    }
}

// Rows of sixteen keys turned into a panel [width][BLOCK].
template <bool NARROW>
static void pack_entries(const void* rows, int width, float* panel) {
    for (int key = 0; key < BLOCK; key += LANES) for (int k = 0; k < width; k += NARROW ? 2 * LANES : LANES) {
        vf lane[LANES];
        for (int i = 0; i < LANES; i++) lane[i] = load_as<vf>((const char*)rows + ((size_t)(key + i) * width + k) * (NARROW ? 2 : 4));
        transpose(lane);
        for (int i = 0; i < LANES; i++) store(panel + (size_t)(k / (NARROW ? 2 : 1) + i) * BLOCK + key, lane[i]);
    }
}

// Floats that expanded_head needs in Scratch.more.
INLINE size_t expanded_floats(const Model& m, int rows) {
    const size_t columns = rounded(m.value), depth = rounded(m.nope) + rounded(m.rope);
    return (size_t)(entry_width(m) + 2 * LANES) * BLOCK + m.latent * columns + depth * BLOCK + BLOCK * columns + 4 * BLOCK + rows * (depth + columns + 2) + 64;
}

// Sixteen-lane columns of results, as many side by side as there are registers for.
template <bool NARROW, class Done>
INLINE void all_columns(const float* const* a, const float* panel, int columns, int depth, Done done) {
    int c = 0;
    for (; c + 64 <= columns; c += 64) { vf acc[4][4]; done(c, acc, true); outer<NARROW>(a, panel + c, columns, depth, acc); done(c, acc, false); }
    for (; c < columns; c += LANES) { vf acc[4][1]; done(c, acc, true); outer<NARROW>(a, panel + c, columns, depth, acc); done(c, acc, false); }
}

// Keys and values of one block of entries, for one head, as panels [nope, then key][BLOCK] and [BLOCK][value].
template <bool NARROW>
static void expand_block(const Model& m, const Matrix& up, int head, const void* rows, const float* value_weights, float* latents, float* keys, float* values) {
    constexpr int P = NARROW ? 2 : 1;
    const int width = entry_width(m), columns = rounded(m.value), depth = (m.latent + P - 1) / P;
    const size_t item = NARROW ? 2 : 4;
    pack_entries<NARROW>(rows, width, latents);
    for (int channel = 0; channel < rounded(m.nope); channel += 4) {
        const float* a[4];
        for (int i = 0; i < 4; i++)
            a[i] = (const float*)((const char*)up.data + ((size_t)head * (m.nope + m.value) + std::min(channel + i, m.nope - 1)) * m.latent * item);
        vf acc[4][4] = {};
        outer<NARROW>(a, latents, BLOCK, depth, acc);
        for (int j = 0; j < 4; j++) for (int i = 0; i < 4; i += P)
            store(keys + (size_t)(channel + i) / P * BLOCK + j * LANES, NARROW ? pair(acc[i][j], acc[i + P - 1][j]) : acc[i][j]);
    }
    std::memcpy(keys + (size_t)rounded(m.nope) / P * BLOCK, latents + (size_t)rounded(m.latent) / P * BLOCK, (size_t)rounded(m.rope) / P * BLOCK * sizeof(float));
    for (int key = 0; key < BLOCK; key += 4) {
        const float* a[4];
        for (int i = 0; i < 4; i++) a[i] = (const float*)((const char*)rows + (size_t)(key + i) * width * item);
        all_columns<NARROW>(a, value_weights, columns, depth, [&](int c, auto& acc, bool before) {
            for (int j = 0; j < (int)(sizeof acc[0] / sizeof(vf)); j++) for (int i = 0; i < 4; i++) {
                if (before) acc[i][j] = splat(0.0f);
                else if (i % P == 0) store(values + (size_t)(key + i) / P * columns + c + j * LANES, NARROW ? pair(acc[i][j], acc[i + P - 1][j]) : acc[i][j]);
            }
        });
    }
}

template <bool NARROW>
static void expanded_head(const Expanded& e, Scratch& s) {
    constexpr int P = NARROW ? 2 : 1;
    const Model& m = *e.m;
    const int width = entry_width(m), columns = rounded(m.value), rows = e.segment->rows, depth = (rounded(m.nope) + rounded(m.rope)) / P;
    float* latents = s.more;
    float* value_weights = latents + (size_t)(width + 2 * LANES) * BLOCK;
    float* keys = value_weights + (size_t)m.latent * columns;
    float* values = keys + (size_t)depth * P * BLOCK;
    float* weights = values + (size_t)BLOCK * columns;  // [4][BLOCK]
    float* query = weights + 4 * BLOCK;                 // [rows][depth]
    float* sums = query + (size_t)rows * depth * P;     // [rows][columns]
    float* largest = sums + (size_t)rows * columns;
    float* total = largest + rows;
    pack_values<NARROW>(m, e.weights->up, e.head, columns, value_weights);
    for (int i = 0; i < rows; i++) {
        largest[i] = NOTHING; total[i] = 0;
        float line[4096] = {};  // nope, rope <= 2048 each (library.py refuses more)
        const float* q = e.query + i * e.query_stride;
        std::memcpy(line, q, m.nope * sizeof(float));
        std::memcpy(line + rounded(m.nope), q + m.nope, m.rope * sizeof(float));
        for (int k = 0; k < depth; k += LANES / P) {
            if (NARROW) store_bf16((uint16_t*)(query + (size_t)i * depth) + k * 2, load(line + k * 2));
            else store(query + (size_t)i * depth + k, load(line + k));
        }
    }
    std::memset(sums, 0, (size_t)rows * columns * sizeof(float));
    const size_t bytes = (size_t)BLOCK * e.cache->entry_bytes;
    const int end = e.segment->position + rows;
    for (int key = 0; key < end; key += BLOCK) {
        const int count = std::min(BLOCK, end - key);
        const uint8_t* block = e.cache->data + ((size_t)e.layer * e.cache->blocks + e.segment->table[key / BLOCK]) * bytes;
        const void* entry = count == BLOCK && in_place<NARROW>(m, *e.cache) ? block : entries<NARROW>(m, *e.cache, block, count, width, s.wide, s.thin);
        expand_block<NARROW>(m, e.weights->up, e.head, entry, value_weights, latents, keys, values);
        for (int row = std::max(0, key - e.segment->position) / 4 * 4; row < rows; row += 4) {
            const int real = std::min(4, rows - row);
            const float *q[4], *p[4];
            for (int i = 0; i < 4; i++) { q[i] = query + (size_t)(row + std::min(i, real - 1)) * depth; p[i] = weights + i * (BLOCK / P); }
            vf score[4][4] = {}, shrink[4];
            outer<NARROW>(q, keys, BLOCK, depth, score);
            for (int i = 0; i < real; i++) {
                const int position = e.segment->position + row + i;
                vf best = splat(NOTHING), sum_of = splat(0.0f);
                for (int j = 0; j < 4; j++) {
                    score[i][j] = select(key + j * LANES + COUNT <= position, score[i][j], splat(NOTHING));
                    best = vmax(best, score[i][j]);
                }
                const float now = std::max(largest[row + i], max_of(best));
                for (int j = 0; j < 4; j++) {
                    vf w = select(key + j * LANES + COUNT <= position, exp(score[i][j] - now), splat(0.0f));
                    if (NARROW) { store_bf16((uint16_t*)p[i] + j * LANES, w); w = widen(narrow(w)); }
                    else store((float*)p[i] + j * LANES, w);
                    sum_of += w;
                }
                shrink[i] = exp(splat(largest[row + i] - now));
                total[row + i] = total[row + i] * shrink[i][0] + sum(sum_of);
                largest[row + i] = now;
            }
            all_columns<NARROW>(p, values, columns, BLOCK / P, [&](int c, auto& acc, bool before) {
                for (int i = 0; i < 4; i++) for (int j = 0; j < (int)(sizeof acc[0] / sizeof(vf)); j++) {
                    float* at = sums + (size_t)(row + std::min(i, real - 1)) * columns + c + j * LANES;
                    if (before) acc[i][j] = i < real ? load(at) * shrink[i] : splat(0.0f);
                    else if (i < real) store(at, acc[i][j]);
                }
            });
        }
    }
    for (int i = 0; i < rows; i++) for (int c = 0; c < m.value; c++) e.out[i * e.out_stride + c] = sums[(size_t)i * columns + c] / total[i];
}
