// Sixteen lanes at a time, whatever the processor: GCC's vector types, with the three instructions that they cannot express.
//
// One file is compiled for one instruction set; what the compiler defines (__AVX512VNNI__, __AVX512BF16__, __AVX2__) decides here and
// nowhere else.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));  // sixteen halves of a word
typedef int8_t vb __attribute__((vector_size(16)));
constexpr int LANES = 16;

template <class V, class T> INLINE V load_as(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
INLINE vf load(const float* p) { return load_as<vf>(p); }
INLINE vi load(const int32_t* p) { return load_as<vi>(p); }
INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE vi splat(int32_t x) { return vi{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }

// The first `count` of sixteen values, the others 0.
INLINE vf load_some(const float* p, int count) { vf v = {}; std::memcpy(&v, p, count * sizeof(float)); return v; }

// bf16 -----------------------------------------------------------------------------------------------------------------------------

INLINE vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
INLINE vf load_bf16(const uint16_t* p) { return widen(load_as<vh>(p)); }
INLINE vf load_bf16_some(const uint16_t* p, int count) { vh h = {}; std::memcpy(&h, p, count * sizeof(uint16_t)); return widen(h); }
INLINE float widen(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; std::memcpy(&f, &u, 4); return f; }

// Round to nearest, ties to even; a NaN stays one.
INLINE vh narrow(vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = (u >> 16) | 0x40;
    vi is_nan = x != x;
    return __builtin_convertvector(((vu)is_nan & nan) | (~(vu)is_nan & rounded), vh);
}
INLINE void store_bf16(uint16_t* p, vf v) { vh h = narrow(v); std::memcpy(p, &h, sizeof h); }

// acc + the products of sixteen pairs of bf16, the first of a pair in the low half of its lane.
INLINE vf dot2(vf acc, vi a, vi b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
    acc += (vf)(a << 16) * (vf)(b << 16);
    return acc + (vf)(a & (int32_t)0xffff0000) * (vf)(b & (int32_t)0xffff0000);
#endif
}

// 8 bits ---------------------------------------------------------------------------------------------------------------------------

// acc + the products of sixteen times four bytes, unsigned times signed; exact.
INLINE vi dot4(vi acc, vi bytes, vi signed_bytes) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)bytes, (__m512i)signed_bytes);
#elif defined(__AVX2__)
    // not maddubs: two products of 255 x 127 would saturate 16 bits
    __m256i a[2], b[2], c[2];
    std::memcpy(a, &bytes, 64); std::memcpy(b, &signed_bytes, 64); std::memcpy(c, &acc, 64);
    for (int i = 0; i < 2; i++) {
        __m256i even = _mm256_madd_epi16(_mm256_and_si256(a[i], _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b[i], 8), 8));
        __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a[i], 8), _mm256_srai_epi16(b[i], 8));
        c[i] = _mm256_add_epi32(c[i], _mm256_add_epi32(even, odd));
    }
    vi out; std::memcpy(&out, c, 64); return out;
#else
    for (int shift = 0; shift < 32; shift += 8) acc += ((bytes >> shift) & 255) * ((signed_bytes << (24 - shift)) >> 24);
    return acc;
#endif
}

INLINE vf round_even(vf x) { const vf magic = splat(12582912.0f); return (x + magic) - magic; }  // |x| < 2^22
INLINE void store_bytes(int8_t* p, vf rounded) { vb b = __builtin_convertvector(__builtin_convertvector(rounded, vi), vb); std::memcpy(p, &b, 16); }

// Sums and functions ---------------------------------------------------------------------------------------------------------------

// out[i] = sum of the lanes of v[i]. The order of additions is the same for every i, so a result does not depend on its place.
INLINE vf sum_each(const vf* v) {
    vf a[8], b[4], c[2];
    const vi e1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}, o1 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
    const vi e2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, o2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    const vi e4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}, o4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
    const vi e8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, o8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
    for (int i = 0; i < 8; i++) a[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], e1) + __builtin_shuffle(v[2 * i], v[2 * i + 1], o1);
    for (int i = 0; i < 4; i++) b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], e2) + __builtin_shuffle(a[2 * i], a[2 * i + 1], o2);
    for (int i = 0; i < 2; i++) c[i] = __builtin_shuffle(b[2 * i], b[2 * i + 1], e4) + __builtin_shuffle(b[2 * i], b[2 * i + 1], o4);
    return __builtin_shuffle(c[0], c[1], e8) + __builtin_shuffle(c[0], c[1], o8);
}
const vi FAR_8 = {8, 9, 10, 11, 12, 13, 14, 15}, FAR_4 = {4, 5, 6, 7}, FAR_2 = {2, 3}, FAR_1 = {1};
INLINE float sum(vf v) {
    v += __builtin_shuffle(v, FAR_8); v += __builtin_shuffle(v, FAR_4); v += __builtin_shuffle(v, FAR_2); v += __builtin_shuffle(v, FAR_1);
    return v[0];
}
INLINE float max_of(vf v) {
    v = vmax(v, __builtin_shuffle(v, FAR_8)); v = vmax(v, __builtin_shuffle(v, FAR_4)); v = vmax(v, __builtin_shuffle(v, FAR_2));
    v = vmax(v, __builtin_shuffle(v, FAR_1));
    return v[0];
}

// e^x to 2 units in the last place; 0 below -87, a NaN stays one.
INLINE vf exp(vf x) {
    vf clipped = select(x < -87.0f, splat(-87.0f), select(x > 88.0f, splat(88.0f), x));
    vf n = round_even(clipped * 1.44269504f);
    vf r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
    vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
    vf out = p * (vf)bits;
    out = select(x < -87.0f, splat(0.0f), out);
    return select(x == x, out, x);
}
INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }
