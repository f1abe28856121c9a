// Products with packed weights: out [tokens, rows] = x [tokens, cols] times the transpose.
//
// Inputs are cut into tiles of up to kMaxTile tokens (T_i below); a tile is laid out so that one
// pointer walks it as another walks a panel:
//     f32, bf16        [cols][T_i] floats, or [cols / 2][T_i] pairs of bf16
//     int8, int4       [cols / 4][T_i] x 4 signed bytes, rounded per token and group of 32 | tails
// Each sum of a token and a row is made in one order, whatever the tile: results do not depend
// on the batch.
#pragma once
#include "internal.h"
#include "vector.h"

namespace {

struct Tile {
    int64_t first;
    int size;
};

// Tiles of nearly the same size.
struct Tiles {
    int64_t count, tokens;
    explicit Tiles(int64_t n) : count((n + kMaxTile - 1) / kMaxTile), tokens(n) {}
    Tile operator[](int64_t i) const {
        int64_t size = tokens / count, longer = tokens % count;
        return {i * size + (i < longer ? i : longer), int(size + (i < longer))};
    }
};

// A tile of rounded inputs: codes, then per group and token the scale, the sum of codes times
// what the format's codes are off by, and scale times sum.
struct IntegerInput {
    int8_t* codes;
    float* scales;
    int32_t* offsets;
    float* sums;
};

inline int64_t token_bytes(int64_t cols) { // enough for any format
    int64_t padded = padded_cols(SHOAL_INT8, cols);
    return padded * 4;
}

inline IntegerInput integer_input(uint8_t* base, int64_t cols, Tile tile) {
    int64_t padded = padded_cols(SHOAL_INT8, cols), groups = padded / kGroup;
    uint8_t* at = base + tile.first * token_bytes(cols);
    auto* scales = reinterpret_cast<float*>(at + padded * tile.size);
    auto* offsets = reinterpret_cast<int32_t*>(scales + groups * tile.size);
    return {reinterpret_cast<int8_t*>(at), scales, offsets,
            reinterpret_cast<float*>(offsets + groups * tile.size)};
}

// ---- making inputs ----

// One group of one token: codes to `at`, every 4 of them `stride` bytes apart.
inline void round_group(const float* x, int n, int8_t* at, int64_t stride, float* scale,
                        int32_t* total) {
    float padded[kGroup];
    if (n < kGroup) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, x, size_t(n) * 4);
        x = padded;
    }
    F size = zero();
    for (int i = 0; i < kGroup; i += kWidth) size = max(size, absolute(load(x + i)));
    float most = largest(size);
    *scale = most / 127.f;
    F inverse = set1(most > 0.f ? 127.f / most : 0.f);
    int8_t codes[kGroup];
    F total_of_codes = zero(); // small whole numbers: exact
    for (int i = 0; i < kGroup; i += kWidth) {
        F rounded = round_even(mul(load(x + i), inverse));
        total_of_codes = add(total_of_codes, rounded);
        store_int8(codes + i, rounded);
    }
    *total = int32_t(sum(total_of_codes));
    for (int i = 0; i < kGroup / 4; i++) memcpy(at + i * stride, codes + 4 * i, 4);
}

inline void put_integer_input(const shoal_weight& weight, uint8_t* base, Tile tile, int m,
                              const float* x) {
    IntegerInput input = integer_input(base, weight.cols, tile);
    int64_t groups = padded_cols(weight.format, weight.cols) / kGroup;
    int32_t off_by = weight.format == SHOAL_INT8 ? -128 : weight.format == SHOAL_INT4 ? -8 : 0;
    int64_t stride = 4 * tile.size;
    for (int64_t g = 0; g < groups; g++) {
        int64_t left = weight.cols - g * kGroup, at = g * tile.size + m;
        int32_t total = 0;
        round_group(x + g * kGroup, int(left < 0 ? 0 : left < kGroup ? left : kGroup),
                    input.codes + g * 8 * stride + 4 * m, stride, &input.scales[at], &total);
        input.offsets[at] = off_by * total;
        input.sums[at] = input.scales[at] * float(total);
    }
}

inline uint16_t nearest_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void put_float_input(const shoal_weight& weight, uint8_t* base, Tile tile, int m,
                            const float* x) {
    uint8_t* at = base + tile.first * token_bytes(weight.cols);
    int64_t padded = padded_cols(weight.format, weight.cols);
    if (kPairsOfBf16 && weight.format == SHOAL_BF16) {
        auto* pairs = reinterpret_cast<uint16_t*>(at) + 2 * m;
        for (int64_t col = 0; col < padded; col++)
            pairs[col / 2 * 2 * tile.size + col % 2] = col < weight.cols ? nearest_bf16(x[col]) : 0;
        return;
    }
    float* to = reinterpret_cast<float*>(at) + m;
    for (int64_t col = 0; col < padded; col++) to[col * tile.size] = col < weight.cols ? x[col] : 0.f;
}

// Puts token m of a tile where the product with `weight` reads it.
inline void put_input(const shoal_weight& weight, uint8_t* base, Tile tile, int m, const float* x) {
    if (is_integer(weight.format)) put_integer_input(weight, base, tile, m, x);
    else put_float_input(weight, base, tile, m, x);
}

// ---- one panel by one tile: out [T_i][16] ----

constexpr int kAhead = 1024; // bytes; the hardware stops at every 4 KiB

template <int kFormat, int kTokens>
inline void float_product(const uint8_t* panel, int64_t cols, const uint8_t* input, float* out) {
    constexpr int kBytes = kFormat == SHOAL_F32 ? 128 : 64; // of two columns
    int64_t pairs = padded_cols(kFormat, cols) / 2;
    for (int half = 0; half < kHalves; half++) {
        F even[kTokens], odd[kTokens];
#pragma GCC unroll 16
        for (int m = 0; m < kTokens; m++) even[m] = odd[m] = zero();
        const uint8_t* w = panel + half * kWidth * 4;
        if constexpr (kFormat == SHOAL_BF16 && kPairsOfBf16) {
            auto* x = reinterpret_cast<const int32_t*>(input);
            int64_t k = 0;
            for (; k + 1 < pairs; k += 2, w += 2 * kBytes, x += 2 * kTokens) {
                I first = load_i(w), second = load_i(w + kBytes);
                if (kTokens <= 4) prefetch(w + kAhead), prefetch(w + kBytes + kAhead);
#pragma GCC unroll 16
                for (int m = 0; m < kTokens; m++) {
                    even[m] = dot_bf16(even[m], first, set1_i(x[m]));
                    odd[m] = dot_bf16(odd[m], second, set1_i(x[kTokens + m]));
                }
            }
            if (k < pairs) {
                I last = load_i(w);
#pragma GCC unroll 16
                for (int m = 0; m < kTokens; m++) even[m] = dot_bf16(even[m], last, set1_i(x[m]));
            }
        } else {
            auto* x = reinterpret_cast<const float*>(input);
            for (int64_t k = 0; k < pairs; k++, w += kBytes, x += 2 * kTokens) {
                F first, second;
                if constexpr (kFormat == SHOAL_F32) {
                    first = load(reinterpret_cast<const float*>(w));
                    second = load(reinterpret_cast<const float*>(w + 64));
                    if (kTokens <= 4) prefetch(w + kAhead + 64);
                } else {
                    I both = load_i(w);
                    first = low_bf16(both), second = high_bf16(both);
                }
                if (kTokens <= 4) prefetch(w + kAhead);
#pragma GCC unroll 16
                for (int m = 0; m < kTokens; m++) {
                    even[m] = fma(first, set1(x[m]), even[m]);
                    odd[m] = fma(second, set1(x[kTokens + m]), odd[m]);
                }
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < kTokens; m++)
            store(out + m * kLanes + half * kWidth, add(even[m], odd[m]));
    }
}

// The 4 columns of vector v: by bytes, or by four bits of them.
template <int kFormat> inline I codes_at(const uint8_t* codes, int v) {
    if constexpr (kFormat == SHOAL_INT8) return load_i(codes + 64 * v);
    I both = load_i(codes + 64 * (v % 4));
    return v < 4 ? low_nibbles(both) : high_nibbles(both);
}

template <int kFormat> inline I dot(I total, I w, const int8_t* x) {
    return kFormat == SHOAL_INT8 ? dot_bytes(total, w, x) : dot_nibbles(total, w, x);
}

template <int kFormat, int kTokens>
inline void integer_product(const uint8_t* panel, int64_t cols, const uint8_t* input, float* out) {
    constexpr int kCodeBytes = kFormat == SHOAL_INT8 ? 512 : 256; // of a group
    int64_t pairs = padded_cols(kFormat, cols) / kPair, step = pair_bytes(kFormat);
    IntegerInput x = integer_input(const_cast<uint8_t*>(input), cols, Tile{0, kTokens});
    for (int half = 0; half < kHalves; half++) {
        F total[kTokens];
#pragma GCC unroll 16
        for (int m = 0; m < kTokens; m++) total[m] = zero();
        const uint8_t* pair = panel + half * kWidth * 4;
        const int8_t* codes = x.codes;
        int64_t at = 0;
        for (int64_t p = 0; p < pairs; p++, pair += step) {
            if (kTokens <= 4)
                for (int64_t ahead = 0; ahead < step; ahead += 64) prefetch(pair + kAhead + ahead);
            auto* scales = reinterpret_cast<const uint16_t*>(pair - half * kWidth * 2 + 2 * kCodeBytes);
#pragma GCC unroll 2
            for (int g = 0; g < 2; g++, at += kTokens, codes += 32 * kTokens) {
                const uint8_t* w = pair + g * kCodeBytes;
                I sums[kTokens], more = zero_i(); // two chains where one token would wait on itself
#pragma GCC unroll 16
                for (int m = 0; m < kTokens; m++)
                    sums[m] = kFormat == SHOAL_INT4_MIN ? zero_i() : set1_i(x.offsets[at + m]);
#pragma GCC unroll 8
                for (int v = 0; v < 8; v++) {
                    I w4 = codes_at<kFormat>(w, v);
#pragma GCC unroll 16
                    for (int m = 0; m < kTokens; m++) {
                        const int8_t* x4 = codes + 4 * (v * kTokens + m);
                        if (kTokens == 1 && v % 2) more = dot<kFormat>(more, w4, x4);
                        else sums[m] = dot<kFormat>(sums[m], w4, x4);
                    }
                }
                if (kTokens == 1) sums[0] = add_i(sums[0], more);
                F scale = load_f16(scales + g * kLanes);
                F minimum = zero();
                if (kFormat == SHOAL_INT4_MIN) minimum = load_f16(scales + (2 + g) * kLanes);
#pragma GCC unroll 16
                for (int m = 0; m < kTokens; m++) {
                    total[m] = fma(to_float(sums[m]), mul(scale, set1(x.scales[at + m])), total[m]);
                    if (kFormat == SHOAL_INT4_MIN)
                        total[m] = fma(minimum, set1(x.sums[at + m]), total[m]);
                }
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < kTokens; m++) store(out + m * kLanes + half * kWidth, total[m]);
    }
}

using Product = void (*)(const uint8_t* panel, int64_t cols, const uint8_t* input, float* out);

template <int kFormat, int kTokens>
void product(const uint8_t* panel, int64_t cols, const uint8_t* input, float* out) {
    if constexpr (kFormat == SHOAL_F32 || kFormat == SHOAL_BF16)
        float_product<kFormat, kTokens>(panel, cols, input, out);
    else integer_product<kFormat, kTokens>(panel, cols, input, out);
}

#define SHOAL_TILES(f) \
    {product<f, 1>, product<f, 2>, product<f, 3>, product<f, 4>, SHOAL_MORE_TILES(f)}
#ifdef __AVX512F__
#define SHOAL_MORE_TILES(f) \
    product<f, 5>, product<f, 6>, product<f, 7>, product<f, 8>, product<f, 9>, product<f, 10>, \
        product<f, 11>, product<f, 12>
#else
#define SHOAL_MORE_TILES(f)
#endif

const Product kProducts[5][kMaxTile] = {SHOAL_TILES(SHOAL_F32), SHOAL_TILES(SHOAL_BF16),
                                        SHOAL_TILES(SHOAL_INT8), SHOAL_TILES(SHOAL_INT4),
                                        SHOAL_TILES(SHOAL_INT4_MIN)};

// ---- all of it ----

// Takes pieces in runs that get shorter towards the end; false: none is left.
inline bool take(Work* work, int64_t total, int threads, int64_t* first, int64_t* last) {
    int64_t from = __atomic_load_n(&work->taken, __ATOMIC_RELAXED);
    for (;;) {
        if (from >= total) return false;
        int64_t run = (total - from) / (2 * threads);
        int64_t to = from + (run < 1 ? 1 : run);
        if (__atomic_compare_exchange_n(&work->taken, &from, to, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
            *first = from, *last = to;
            return true;
        }
    }
}

enum class Into { kStore, kAdd, kGate, kWeighted };

struct Output {
    Into into;
    float* out;
    int64_t stride; // floats from token to token
    int64_t rows;   // of the output, without padding
    const float* bias;
    int32_t activation; // kGate
    const int64_t* tokens = nullptr; // kWeighted adds to these, times these
    const float* weights = nullptr;
};

inline F gate(F x, F up, int32_t activation) {
    if (activation == SHOAL_SILU) return mul(mul(x, sigmoid(x)), up);
    F cube = mul(mul(x, x), x);
    F inner = mul(set1(0.7978845608f), fma(set1(0.044715f), cube, x));
    return mul(mul(mul(set1(0.5f), x), add(set1(1.f), hyperbolic_tangent(inner))), up);
}

// One token's 16 rows (`up`: those of the up projection, for kGate) to their place.
inline void put_output(const Output& to, int64_t row, int64_t token, const float* values,
                       const float* up, const float* bias) {
    bool is_weighted = to.into == Into::kWeighted;
    float* out = to.out + (is_weighted ? to.tokens[token] : token) * to.stride + row;
    int64_t left = to.rows - row;
    for (int i = 0; i < kLanes && i < left; i += kWidth) {
        F value = load(values + i);
        if (bias) value = add(value, load(bias + i));
        if (to.into == Into::kGate) {
            F other = load(up + i);
            if (bias) other = add(other, load(bias + kLanes + i));
            value = gate(value, other, to.activation);
        }
        bool whole = left - i >= kWidth;
        int n = whole ? kWidth : int(left - i);
        if (is_weighted) value = mul(value, set1(to.weights[token]));
        if (to.into == Into::kAdd || is_weighted)
            value = add(value, whole ? load(out + i) : load_some(out + i, n));
        if (whole) store(out + i, value);
        else store_some(out + i, value, n);
    }
}

// How a product's panels are shared out: half of them thread by thread, so that a thread knows
// where it will begin and can read ahead; the rest to whoever is free.
struct Shares {
    int64_t panels; // to a unit: gate and up go together
    int64_t units, own;
    Shares(const shoal_weight& weight, Into into, int threads)
        : panels(into == Into::kGate ? 2 : 1),
          units((weight.rows + kLanes * panels - 1) / (kLanes * panels)),
          own(units / (2 * threads)) {}
};

// Multiplies units [first, last) with all tokens.
inline void multiply_units(const shoal_weight& weight, const uint8_t* inputs, int64_t tokens,
                           const Output& to, int64_t panels, int64_t first, int64_t last) {
    Tiles tiles(tokens);
    int64_t bytes = panel_bytes(weight.format, weight.cols);
    float sums[2][kMaxTile][kLanes];
    for (int64_t i = first; i < last; i++) {
        const uint8_t* panel = weight.data + i * panels * bytes;
        const float* bias = to.bias ? to.bias + i * panels * kLanes : nullptr;
        for (int64_t t = 0; t < tiles.count; t++) {
            Tile tile = tiles[t];
            const uint8_t* input = inputs + tile.first * token_bytes(weight.cols);
            Product run = kProducts[weight.format][tile.size - 1];
            for (int p = 0; p < panels; p++) run(panel + p * bytes, weight.cols, input, sums[p][0]);
            for (int m = 0; m < tile.size; m++)
                put_output(to, i * kLanes, tile.first + m, sums[0][m], sums[1][m], bias);
        }
    }
}

// Multiplies inputs made by `put_input`; every thread takes part until nothing is left.
inline void multiply(const shoal_weight& weight, const uint8_t* inputs, int64_t tokens,
                     const Output& to, Work* work, int thread, int threads) {
    Shares shares(weight, to.into, threads);
    int64_t own = thread * shares.own, shared = threads * shares.own, first, last;
    multiply_units(weight, inputs, tokens, to, shares.panels, own, own + shares.own);
    while (take(work, shares.units - shared, threads, &first, &last))
        multiply_units(weight, inputs, tokens, to, shares.panels, shared + first, shared + last);
}

} // namespace
