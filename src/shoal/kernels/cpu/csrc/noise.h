// Gumbel noise of (seed, position, token id), added to logits: what model/philox.py defines, with
// the same random words. Philox4x32-10 (Salmon et al., SC 2011).
//
//     counter = (token id / 4, position low, position high, 0)    key = (seed low, seed high)
#pragma once
#include "vector.h"

namespace {

#ifdef __AVX512F__
inline I exclusive_or(I a, I b) { return _mm512_xor_si512(a, b); }
inline I bits_of(F a) { return _mm512_castps_si512(a); }
inline F of_bits(I a) { return _mm512_castsi512_ps(a); }
inline I shift_right(I a, int n) { return _mm512_srli_epi32(a, unsigned(n)); }
inline I both(I a, I b) { return _mm512_and_si512(a, b); }
inline F choose_if_equal(F a, F b, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), yes);
}
inline void multiply_wide(I a, I b, I* low, I* high) {
    I even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    *low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    *high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}
inline I counting_from(int32_t first) {
    return add_i(set1_i(first),
                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
#else
inline I exclusive_or(I a, I b) { return _mm256_xor_si256(a, b); }
inline I bits_of(F a) { return _mm256_castps_si256(a); }
inline F of_bits(I a) { return _mm256_castsi256_ps(a); }
inline I shift_right(I a, int n) { return _mm256_srli_epi32(a, n); }
inline I both(I a, I b) { return _mm256_and_si256(a, b); }
inline F choose_if_equal(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
inline void multiply_wide(I a, I b, I* low, I* high) {
    I even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
    *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
inline I counting_from(int32_t first) {
    return add_i(set1_i(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// log of normal positive numbers (Cephes' logf): mantissa in [1/2, 1) doubled below sqrt(1/2).
inline F logarithm(F x) {
    I bits = bits_of(x);
    F mantissa = of_bits(add_i(both(bits, set1_i(0x7fffff)), set1_i(0x3f000000)));
    F exponent = sub(to_float(shift_right(bits, 23)), set1(126.f));
    F small = max(mantissa, set1(0.707106781f)); // equal: the mantissa is not below it
    F is_small = choose_if_equal(small, mantissa, zero(), set1(1.f));
    exponent = sub(exponent, is_small);
    F r = sub(fma(mantissa, is_small, mantissa), set1(1.f));
    F square = mul(r, r);
    F p = set1(7.0376836292e-2f);
    p = fma(p, r, set1(-1.1514610310e-1f));
    p = fma(p, r, set1(1.1676998740e-1f));
    p = fma(p, r, set1(-1.2420140846e-1f));
    p = fma(p, r, set1(1.4249322787e-1f));
    p = fma(p, r, set1(-1.6668057665e-1f));
    p = fma(p, r, set1(2.0000714765e-1f));
    p = fma(p, r, set1(-2.4999993993e-1f));
    p = fma(p, r, set1(3.3333331174e-1f));
    F y = mul(mul(p, r), square);
    y = fma(exponent, set1(-2.12194440e-4f), y);
    y = fma(square, set1(-0.5f), y);
    return fma(exponent, set1(0.693359375f), add(r, y));
}

// -log(-log(1 - u)) with u = (word + 1/2) / 2**32, at most 1 - 2**-24.
inline F gumbel(I word) {
    F low = to_float(both(word, set1_i(0xffff))), high = to_float(shift_right(word, 16));
    F u = mul(add(fma(high, set1(65536.f), low), set1(0.5f)), set1(0x1p-32f));
    u = min(u, set1(1.f - 0x1p-24f));
    F w = sub(set1(1.f), u), negative = sub(zero(), u);
    // log(1 - u), also where 1 - u has lost most of u.
    F rest = sub(w, set1(1.f));
    F exact = div(mul(logarithm(w), negative), choose_if_equal(rest, zero(), set1(1.f), rest));
    F inner = choose_if_equal(rest, zero(), negative, exact);
    return sub(zero(), logarithm(sub(zero(), inner)));
}

// Adds the noise of token ids [first, first + n) to logits.
void add_gumbel(float* logits, int64_t first, int64_t n, uint64_t seed, int64_t position) {
    const I multiplier0 = set1_i(int32_t(0xD2511F53)), multiplier1 = set1_i(int32_t(0xCD9E8D57));
    int64_t skipped = first % 4; // ids that share the first counter
    for (int64_t at = -skipped; at < n; at += 4 * kWidth) {
        I c0 = counting_from(int32_t((first + at) / 4));
        I c1 = set1_i(int32_t(position)), c2 = set1_i(int32_t(position >> 32)), c3 = zero_i();
        uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
        for (int round = 0; round < 10; round++, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
            I low0, high0, low1, high1;
            multiply_wide(c0, multiplier0, &low0, &high0);
            multiply_wide(c2, multiplier1, &low1, &high1);
            c0 = exclusive_or(exclusive_or(high1, c1), set1_i(int32_t(key0)));
            c2 = exclusive_or(exclusive_or(high0, c3), set1_i(int32_t(key1)));
            c1 = low1, c3 = low0;
        }
        float noise[4][kWidth]; // of token ids 4 b, 4 b + 1, ...
        store(noise[0], gumbel(c0)), store(noise[1], gumbel(c1));
        store(noise[2], gumbel(c2)), store(noise[3], gumbel(c3));
        for (int64_t i = at < 0 ? skipped : 0; i < 4 * kWidth && at + i < n; i++) logits[at + i] += noise[i % 4][i / 4];
    }
}

} // namespace
