// Weights times rows of activations: y[i][r] = sum_k x[i][k] w[r][k].
//
// A result is the same however many rows are computed with it: the order of additions depends on the weight's type and width alone.
#pragma once
#include <algorithm>
#include "vector.h"

// How a matrix lies in memory.
//   F32, BF16  row after row.
//   I8, I4     tiles of 16 rows x 32 columns, tile after tile along a row of tiles. Byte 64 j + 4 r + b of a tile holds, I8: row r, column
//              4 j + b, plus 128; I4: column 8 j + b in the low, 8 j + 4 + b in the high half, plus 8. Scales: bf16, one for each row of a
//              tile, the sixteen of a tile side by side. Rows are filled up to 16, columns to 32 with zeros.
enum Type : int32_t { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };

struct Matrix {
    int32_t type, rows, cols, reserved;
    const void* data;
    const uint16_t* scales;
};

constexpr int TILE = 16, GROUP = 32;
// Bytes to ask memory for beforehand: with 2 KiB, products of 2 to 8 rows waited for memory and computed by turns (30 against 50 GB/s).
constexpr int AHEAD = 4096;
INLINE int padded(int k) { return (k + GROUP - 1) / GROUP * GROUP; }
// Where the tiles of a row begin; plain weights: where the row does.
INLINE const void* tile_at(const Matrix& w, int row) {
    if (w.type <= BF16) return (const char*)w.data + (size_t)row * w.cols * (w.type == F32 ? 4 : 2);
    return (const char*)w.data + (size_t)((row + TILE - 1) / TILE) * (padded(w.cols) / GROUP) * (w.type == I4 ? 256 : 512);
}
INLINE bool is_quantised(const Matrix& w) { return w.type >= I8; }

// Activation rows in the forms that weights want; row i of each form begins at i * width (groups: i * width / 32).
struct Rows {
    int width;          // columns, filled up to a multiple of 32 with zeros
    float* f32;         // what F32 weights multiply; the other forms are made of it
    uint16_t* bf16;
    int8_t* i8;         // with one scale for each group of 32 columns: x = i8 * scale
    float* scale;
    int32_t* total;     // sum of a group's i8
};

INLINE void quantise_group(const float* x, int8_t* q, float* scale, int32_t* total) {
    vf a = load(x), b = load(x + 16);
    float largest = max_of(vmax(vmax(a, -a), vmax(b, -b)));
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    a = round_even(a * inverse); b = round_even(b * inverse);
    store_bytes(q, a); store_bytes(q + 16, b);
    *scale = largest / 127.0f;
    *total = (int32_t)sum(a + b);  // exact: at most 32 x 127
}

// Make the form that a weight of `type` wants out of row i of x.f32.
inline void prepare(const Rows& x, int i, int32_t type) {
    const float* row = x.f32 + (size_t)i * x.width;
    if (type == BF16) for (int k = 0; k < x.width; k += LANES) store_bf16(x.bf16 + (size_t)i * x.width + k, load(row + k));
    if (type >= I8) for (int g = 0; g < x.width / GROUP; g++) {
        size_t at = (size_t)i * (x.width / GROUP) + g;
        quantise_group(row + g * GROUP, x.i8 + at * GROUP, x.scale + at, x.total + at);
    }
}

// Quantised weights: one tile row (16 results) times M activation rows --------------------------------------------------------------

template <int M, int32_t TYPE>
INLINE void tile_product(const Matrix& w, int row0, const Rows& x, const int32_t* const at, float* const* y, const uint8_t* end, const uint8_t* next) {
    const int groups = padded(w.cols) / GROUP, stride = x.width / GROUP;
    constexpr int BYTES = TYPE == I4 ? 256 : 512;
    constexpr int32_t OFFSET = TYPE == I4 ? -8 : -128;
    const uint8_t* data = (const uint8_t*)w.data + (size_t)(row0 / TILE) * groups * BYTES;
    const uint16_t* scales = w.scales + (size_t)(row0 / TILE) * groups * TILE;
    vf acc[M];
    for (int m = 0; m < M; m++) acc[m] = splat(0.0f);
    for (int g = 0; g < groups; g++, data += BYTES, scales += TILE) {
        vi columns[8];
        if (TYPE == I4) {
            for (int j = 0; j < 4; j++) {
                vi both = load_as<vi>(data + 64 * j);
                columns[2 * j] = both & 0x0f0f0f0f;
                columns[2 * j + 1] = (both >> 4) & 0x0f0f0f0f;
            }
        } else {
            for (int j = 0; j < 8; j++) columns[j] = load_as<vi>(data + 64 * j);
        }
        const uint8_t* soon = data + AHEAD;
        soon = soon < end ? soon : next + (soon - end);
        for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(soon + line);
        __builtin_prefetch(scales + AHEAD / BYTES * TILE);
        const vf scale = load_bf16(scales);
        for (int m = 0; m < M; m++) {
            const size_t place = (size_t)at[m] * stride + g;
            const int32_t* four = (const int32_t*)(x.i8 + place * GROUP);
            vi even = splat(OFFSET * x.total[place]), odd = splat(0);
            for (int j = 0; j < 8; j += 2) {
                even = dot4(even, columns[j], splat(four[j]));
                odd = dot4(odd, columns[j + 1], splat(four[j + 1]));
            }
            acc[m] += __builtin_convertvector(even + odd, vf) * (scale * x.scale[place]);
        }
    }
    for (int m = 0; m < M; m++) store(y[m], acc[m]);
}

// Plain weights: R weight rows times M activation rows, R * M = 16 -------------------------------------------------------------------
//
// The same place of the next R rows is asked for on the way: 2 to 16 rows of activations read bf16 weights a quarter to a third faster so.

template <int R, int M, int32_t TYPE>
INLINE void block_product(const Matrix& w, int row0, int rows, const Rows& x, const int32_t* at, float* const* y) {
    const int width = w.cols;
    vf acc[16];
    for (int i = 0; i < 16; i++) acc[i] = splat(0.0f);
    if (TYPE == F32) {
        const float *a[R], *b[M];
        for (int r = 0; r < R; r++) a[r] = (const float*)w.data + (size_t)(row0 + std::min(r, rows - 1)) * width;
        for (int m = 0; m < M; m++) b[m] = x.f32 + (size_t)at[m] * x.width;
        int k = 0;
        for (; k + LANES <= width; k += LANES) {
            vf right[M];
            for (int m = 0; m < M; m++) right[m] = load(b[m] + k);
            for (int r = 0; r < R; r++) __builtin_prefetch(a[r] + k + (size_t)R * width, 0, 2);
            for (int r = 0; r < R; r++) { vf left = load(a[r] + k); for (int m = 0; m < M; m++) acc[r * M + m] += left * right[m]; }
        }
        if (k < width) for (int r = 0; r < R; r++) {
            vf left = load_some(a[r] + k, width - k);
            for (int m = 0; m < M; m++) acc[r * M + m] += left * load(b[m] + k);
        }
    } else {
        const uint16_t *a[R], *b[M];
        for (int r = 0; r < R; r++) a[r] = (const uint16_t*)w.data + (size_t)(row0 + std::min(r, rows - 1)) * width;
        for (int m = 0; m < M; m++) b[m] = x.bf16 + (size_t)at[m] * x.width;
        int k = 0;
        for (; k + 2 * LANES <= width; k += 2 * LANES) {
            vi right[M];
            for (int m = 0; m < M; m++) right[m] = load_as<vi>(b[m] + k);
            for (int r = 0; r < R; r++) __builtin_prefetch(a[r] + k + (size_t)R * width, 0, 2);
            for (int r = 0; r < R; r++) { vi left = load_as<vi>(a[r] + k); for (int m = 0; m < M; m++) acc[r * M + m] = dot2(acc[r * M + m], left, right[m]); }
        }
        if (k < width) for (int r = 0; r < R; r++) {
            vi left = {};
            std::memcpy(&left, a[r] + k, (width - k) * sizeof(uint16_t));
            for (int m = 0; m < M; m++) acc[r * M + m] = dot2(acc[r * M + m], left, load_as<vi>(b[m] + k));
        }
    }
    float out[16];
    store(out, sum_each(acc));
    for (int r = 0; r < R && r < rows; r++) for (int m = 0; m < M; m++) y[m][r] = out[r * M + m];
}

// Dispatch over sizes ----------------------------------------------------------------------------------------------------------------

template <int32_t TYPE>
static void multiply_tiles(const Matrix& w, int row0, int rows, const Rows& x, const int32_t* at, int count, float* y, size_t stride, const void* then) {
    const uint8_t *end = (const uint8_t*)tile_at(w, row0 + rows), *next = then ? (const uint8_t*)then : end;
    for (int r = 0; r < rows; r += TILE)
        for (int i = 0; i < count;) {
            float* out[8];
            const int left = std::min(8, count - i);
            for (int m = 0; m < left; m++) out[m] = y + (size_t)(i + m) * stride + r;
            switch (left) {
                case 8: tile_product<8, TYPE>(w, row0 + r, x, at + i, out, end, next); break;
                case 7: tile_product<7, TYPE>(w, row0 + r, x, at + i, out, end, next); break;
                case 6: tile_product<6, TYPE>(w, row0 + r, x, at + i, out, end, next); break;
                case 5: tile_product<5, TYPE>(w, row0 + r, x, at + i, out, end, next); break;
                case 4: tile_product<4, TYPE>(w, row0 + r, x, at + i, out, end, next); break;
                case 3: tile_product<3, TYPE>(w, row0 + r, x, at + i, out, end, next); break;
                case 2: tile_product<2, TYPE>(w, row0 + r, x, at + i, out, end, next); break;
                default: tile_product<1, TYPE>(w, row0 + r, x, at + i, out, end, next);
            }
            i += left;
        }
}

template <int32_t TYPE>
static void multiply_plain(const Matrix& w, int row0, int rows, const Rows& x, const int32_t* at, int count, float* y, size_t stride) {
    // activation rows in chunks that stay in the second-level cache while weight rows pass
    const int chunk = std::max(4, (int)(192 * 1024 / ((size_t)x.width * (TYPE == F32 ? 4 : 2))) / 4 * 4);
    for (int from = 0; from < count; from += chunk) {
        const int to = std::min(count, from + chunk);
        int i = from;
        const int step = to - from >= 3 ? 4 : to - from == 2 ? 8 : 16;
        for (int r = 0; r < rows; r += step) for (i = from; i < to; i += 16 / step) {
            float spare[16], *out[4];
            int32_t place[4];
            for (int m = 0; m < 16 / step; m++) {
                const bool real = i + m < to;
                place[m] = at[real ? i + m : to - 1];
                out[m] = real ? y + (size_t)(i + m) * stride + r : spare;
            }
            if (step == 4) block_product<4, 4, TYPE>(w, row0 + r, rows - r, x, place, out);
            else if (step == 8) block_product<8, 2, TYPE>(w, row0 + r, rows - r, x, place, out);
            else block_product<16, 1, TYPE>(w, row0 + r, rows - r, x, place, out);
        }
    }
}

// y[i * stride + r] = product of weight row row0 + r and activation row at[i], for r < rows and i < count.
// Quantised weights: row0 is a multiple of 16, rows are rounded up to one, and y has room for them. then: the weights that will be read
// next, if they are not those behind these.
inline void multiply(const Matrix& w, int row0, int rows, const Rows& x, const int32_t* at, int count, float* y, size_t stride,
                     const void* then = nullptr) {
    switch (w.type) {
        case F32: multiply_plain<F32>(w, row0, rows, x, at, count, y, stride); break;
        case BF16: multiply_plain<BF16>(w, row0, rows, x, at, count, y, stride); break;
        case I8: multiply_tiles<I8>(w, row0, rows, x, at, count, y, stride, then); break;
        default: multiply_tiles<I4>(w, row0, rows, x, at, count, y, stride, then);
    }
}
