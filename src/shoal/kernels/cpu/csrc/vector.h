// The vectors of one instruction set. Included once per set; everything is in an anonymous
// namespace, so that no function compiled for one machine is linked into another's path.
//
//     F  a vector of floats    I  as many 32-bit integers, or four times as many bytes
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "packing.h"

namespace {

using namespace shoal;

#ifdef __AVX512F__

using F = __m512;
using I = __m512i;
constexpr int kWidth = 16;
constexpr int kMaxTile = 12; // tokens whose sums stay in registers

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F absolute(F a) { return _mm512_abs_ps(a); }
inline F round_even(F a) { return _mm512_roundscale_ps(a, 8); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float largest(F a) { return _mm512_reduce_max_ps(a); }
inline F times_power_of_2(F a, F n) { return _mm512_scalef_ps(a, n); }

inline I zero_i() { return _mm512_setzero_si512(); }
inline I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
inline I load_i(const void* p) { return _mm512_loadu_si512(p); }
inline I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I low_nibbles(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline I high_nibbles(I a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
inline F low_bf16(I a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
inline F high_bf16(I a) {
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(int(0xffff0000))));
}
inline F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F load_bf16(const uint16_t* p) {
    auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline F load_int8(const int8_t* p) {
    return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Rounded to the nearest even integer and cut to a byte.
inline void store_int8(int8_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}
inline void store_bf16(uint16_t* p, F a) {
    I bits = _mm512_castps_si512(a);
    I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    auto half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

#ifdef __AVX512VNNI__
// Sums of four products each, of bytes 0 to 255 by four signed bytes, on top of `total`. As
// assembly, because compilers load and broadcast the four in an instruction of its own.
inline I dot_bytes(I total, I w, const int8_t* x) {
    struct Four { int8_t bytes[4]; };
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(total) : "v"(w), "m"(*(const Four*)x));
    return total;
}
inline I dot_nibbles(I total, I w, const int8_t* x) { return dot_bytes(total, w, x); }
#else
inline I four(const int8_t* x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return set1_i(bytes);
}
inline I dot_small(I w, I x, int by) { // w <= 127: no pair of products saturates
    return _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(short(by)));
}
inline I dot_nibbles(I total, I w, const int8_t* x) { return add_i(total, dot_small(w, four(x), 1)); }
inline I dot_bytes(I total, I w, const int8_t* four_x) {
    I x = four(four_x);
    I low = _mm512_and_si512(w, _mm512_set1_epi8(127));
    I top = _mm512_and_si512(_mm512_srli_epi16(w, 7), _mm512_set1_epi8(1));
    return add_i(add_i(total, dot_small(low, x, 1)), dot_small(top, x, 128));
}
#endif

#ifdef __AVX512BF16__
constexpr bool kPairsOfBf16 = true;
inline F dot_bf16(F total, I w, I x) {
    return _mm512_dpbf16_ps(total, (__m512bh)w, (__m512bh)x);
}
#else
constexpr bool kPairsOfBf16 = false;
inline F dot_bf16(F total, I, I) { return total; }
#endif

#else // AVX2, FMA, F16C

using F = __m256;
using I = __m256i;
constexpr int kWidth = 8;
constexpr int kMaxTile = 4;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F absolute(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
inline F round_even(F a) { return _mm256_round_ps(a, 8); }
inline __m128 fold(F a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
inline float sum(F a) {
    __m128 b = fold(a);
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float largest(F a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
inline F times_power_of_2(F a, F n) { // of normal numbers
    I exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}

inline I zero_i() { return _mm256_setzero_si256(); }
inline I set1_i(int32_t x) { return _mm256_set1_epi32(x); }
inline I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline I low_nibbles(I a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline I high_nibbles(I a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
inline F low_bf16(I a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
inline F high_bf16(I a) {
    return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(int(0xffff0000))));
}
inline F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load_bf16(const uint16_t* p) {
    auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline F load_int8(const int8_t* p) {
    return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store_int8(int8_t* p, F a) {
    I wide = _mm256_cvtps_epi32(a);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline void store_bf16(uint16_t* p, F a) {
    I bits = _mm256_castps_si256(a);
    I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    bits = _mm256_srli_epi32(bits, 16);
    auto half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
inline I four(const int8_t* x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return set1_i(bytes);
}
inline I dot_small(I w, I x, int by) { // w <= 127: no pair of products saturates
    return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(short(by)));
}
inline I dot_nibbles(I total, I w, const int8_t* x) { return add_i(total, dot_small(w, four(x), 1)); }
inline I dot_bytes(I total, I w, const int8_t* four_x) {
    I x = four(four_x);
    I low = _mm256_and_si256(w, _mm256_set1_epi8(127));
    I top = _mm256_and_si256(_mm256_srli_epi16(w, 7), _mm256_set1_epi8(1));
    return add_i(add_i(total, dot_small(low, x, 1)), dot_small(top, x, 128));
}
constexpr bool kPairsOfBf16 = false;
inline F dot_bf16(F total, I, I) { return total; }

#endif

constexpr int kHalves = kLanes / kWidth; // vectors to a panel's 16 rows

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// e**x to about 2 ulp (Cephes' expf); 0 far below, large but finite far above.
inline F exponential(F x) {
    x = min(max(x, set1(-87.3f)), set1(88.3f));
    F n = round_even(mul(x, set1(1.44269504f)));
    F r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.f)));
    return times_power_of_2(p, n);
}

inline F sigmoid(F x) { return div(set1(1.f), add(set1(1.f), exponential(sub(zero(), x)))); }
// tanh(x) = 2 sigmoid(2x) - 1
inline F hyperbolic_tangent(F x) { return fma(set1(2.f), sigmoid(add(x, x)), set1(-1.f)); }

// Up to kWidth values, the rest zeros.
inline F load_some(const float* p, int n) {
    float some[kWidth] = {};
    memcpy(some, p, size_t(n) * 4);
    return load(some);
}
inline void store_some(float* p, F x, int n) {
    float some[kWidth];
    store(some, x);
    memcpy(p, some, size_t(n) * 4);
}

} // namespace
