// Weights into the tiles of matrix.h: 8 bits, or 4 bits with scales searched for the least squared error.
//
// A lane is a row: sixteen rows are worked on together, and nothing is ever summed across lanes. kernels/formats.py defines the same in torch.
#include "matrix.h"

INLINE vi to_bf16(vf x) { return __builtin_convertvector(__builtin_convertvector(narrow(x), vu), vi); }
INLINE vf from_bf16(vi code) { return (vf)(code << 16); }
INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
INLINE vf clamp(vf x, float low, float high) { return vmax(vmin(x, splat(high)), splat(low)); }
INLINE vf inverse_of(vf x) { return select(x == 0.0f, splat(0.0f), 1.0f / x); }

// The least bf16 not below x >= 0, so that no value leaves the range of its scale.
INLINE vf bf16_above(vf x) {
    vi code = to_bf16(x);
    code -= from_bf16(code) < x;  // a true comparison is -1
    return from_bf16(code);
}

static vf scale_8(const vf* x) {
    vf largest = splat(0.0f);
    for (int k = 0; k < GROUP; k++) largest = vmax(largest, vmax(x[k], -x[k]));
    return bf16_above(largest / 127.0f);
}

// Try scales that put the largest magnitude at 6.5 to 9 steps, of either sign (the range -8 .. 7 is not even); for the codes of each take the
// scale of least squared error, and keep the best.
static vf scale_4(const vf* x) {
    vf largest = splat(0.0f), best_gain = splat(0.0f), best = splat(0.0f);
    for (int k = 0; k < GROUP; k++) largest = vmax(largest, vmax(x[k], -x[k]));
    const vf unit = inverse_of(largest);
    for (int sign = -1; sign <= 1; sign += 2) for (float steps = 6.5f; steps < 9.1f; steps += 0.25f) {
        const vf inverse = unit * (sign * steps);
        vf product = splat(0.0f), square = splat(0.0f);
        for (int k = 0; k < GROUP; k++) {
            const vf q = clamp(round_even(x[k] * inverse), -8.0f, 7.0f);
            product += x[k] * q;
            square += q * q;
        }
        const vf scale = product * inverse_of(square), gain = product * scale;  // the squared error is that of x less the gain
        const vi better = gain > best_gain;
        best_gain = select(better, gain, best_gain);
        best = select(better, scale, best);
    }
    return from_bf16(to_bf16(best));
}

// 16 rows x 32 columns, lane by lane; rows and columns that are not there are 0.
static void load_tile(const void* source, int32_t type, int64_t stride, int rows, int columns, vf* x) {
    for (int k = 0; k < GROUP; k++) x[k] = splat(0.0f);
    for (int r = 0; r < rows; r++) for (int k = 0; k < columns; k++)
        x[k][r] = type == F32 ? ((const float*)source)[r * stride + k] : widen(((const uint16_t*)source)[r * stride + k]);
}

extern "C" int32_t dsv2_pack(int32_t type, int32_t rows, int32_t columns, int32_t source_type, const void* source, int64_t stride, uint8_t* data,
                             uint16_t* scales) {
    const int bytes = type == I4 ? 256 : 512, item = source_type == F32 ? 4 : 2;
    for (int row = 0; row < rows; row += TILE) for (int column = 0; column < columns; column += GROUP, data += bytes, scales += TILE) {
        vf x[GROUP];
        load_tile((const char*)source + (row * stride + column) * item, source_type, stride, std::min(TILE, rows - row), std::min(GROUP, columns - column), x);
        vf check = splat(0.0f);
        for (int k = 0; k < GROUP; k++) check += x[k] * 0.0f;
        if (!(sum(check) == 0.0f)) return 1;  // not finite
        const vf scale = type == I4 ? scale_4(x) : scale_8(x), inverse = inverse_of(scale);
        const vh codes = __builtin_convertvector(to_bf16(scale), vh);
        std::memcpy(scales, &codes, sizeof codes);
        uint8_t code[GROUP][TILE];
        for (int k = 0; k < GROUP; k++) {
            const vf q = clamp(round_even(x[k] * inverse), type == I4 ? -8.0f : -127.0f, type == I4 ? 7.0f : 127.0f) + (type == I4 ? 8.0f : 128.0f);
            const vi whole = __builtin_convertvector(q, vi);
            for (int r = 0; r < TILE; r++) code[k][r] = (uint8_t)whole[r];
        }
        for (int j = 0; j < bytes / 64; j++) for (int r = 0; r < TILE; r++) for (int b = 0; b < 4; b++)
            data[64 * j + 4 * r + b] = type == I4 ? code[8 * j + b][r] | code[8 * j + 4 + b][r] << 4 : code[4 * j + b][r];
    }
    return 0;
}
