// Between the product that makes q, k and v of a token, and attention: norms of heads, rope, and
// where KV is kept.
#pragma once
#include <math.h>

#include "attention.h"

namespace {

// x / rms(x) * weight (arXiv 1910.07467); `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    F squares = zero();
    int64_t whole = n / kWidth * kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (int64_t i = whole; i < n; i++) total += x[i] * x[i];
    float scale = 1.f / sqrtf(total / float(n) + eps);
    for (int64_t i = 0; i < whole; i += kWidth)
        store(out + i, mul(mul(load(x + i), set1(scale)), load(weight + i)));
    for (int64_t i = whole; i < n; i++) out[i] = x[i] * scale * weight[i];
}

inline int64_t position_of(const Forward& f, int64_t token) {
    int64_t row = f.scratch.token_rows[token];
    return f.batch->context_lens[row] - f.batch->query_lens[row] + token - f.scratch.row_starts[row];
}

// cos and sin of one token's position for one rope.
inline void make_angles(const Forward& f, int64_t rope, int64_t token) {
    int64_t half = f.model->head_dim / 2, position = position_of(f, token);
    const float* frequencies = f.model->inv_freqs + rope * half;
    float factor = f.model->rope_factors[rope];
    int64_t at = (rope * f.batch->num_tokens + token) * half;
    for (int64_t i = 0; i < half; i++) {
        float angle = float(position) * frequencies[i];
        f.scratch.cosines[at + i] = cosf(angle) * factor;
        f.scratch.sines[at + i] = sinf(angle) * factor;
    }
}

inline void store_keys(const Forward& f, const shoal_layer_kv& kv, int64_t slot, int64_t head,
                       const float* x) {
    const shoal_model& model = *f.attended;
    int64_t at = slot / kBlock * model.num_kv_heads + head, lane = slot % kBlock;
    int64_t base = at * model.head_dim * kBlock + lane;
    float inverse = 0.f;
    if (model.kv_format == SHOAL_KV_INT8) {
        float most = 0.f;
        for (int64_t d = 0; d < model.head_dim; d++) most = fmaxf(most, fabsf(x[d]));
        kv.key_scales[at * kBlock + lane] = most / 127.f;
        inverse = most > 0.f ? 127.f / most : 0.f;
    }
    for (int64_t d = 0; d < model.head_dim; d++) {
        int64_t place = base + d * kBlock;
        if (model.kv_format == SHOAL_KV_F32) static_cast<float*>(kv.keys)[place] = x[d];
        else if (model.kv_format == SHOAL_KV_BF16) static_cast<uint16_t*>(kv.keys)[place] = nearest_bf16(x[d]);
        else static_cast<int8_t*>(kv.keys)[place] = int8_t(lrintf(x[d] * inverse));
    }
}

inline void store_values(const Forward& f, const shoal_layer_kv& kv, int64_t slot, int64_t head,
                         const float* x) {
    const shoal_model& model = *f.attended;
    int64_t at = slot / kBlock * model.num_kv_heads + head, lane = slot % kBlock;
    int64_t base = (at * kBlock + lane) * model.head_dim;
    if (model.kv_format == SHOAL_KV_F32) {
        memcpy(static_cast<float*>(kv.values) + base, x, size_t(model.head_dim) * 4);
    } else if (model.kv_format == SHOAL_KV_BF16) {
        auto* to = static_cast<uint16_t*>(kv.values) + base;
        for (int64_t d = 0; d < model.head_dim; d++) to[d] = nearest_bf16(x[d]);
    } else {
        float most = 0.f;
        for (int64_t d = 0; d < model.head_dim; d++) most = fmaxf(most, fabsf(x[d]));
        kv.value_scales[at * kBlock + lane] = most / 127.f;
        float inverse = most > 0.f ? 127.f / most : 0.f;
        auto* to = static_cast<int8_t*>(kv.values) + base;
        for (int64_t d = 0; d < model.head_dim; d++) to[d] = int8_t(lrintf(x[d] * inverse));
    }
}

// Where a token's KV goes; -1: another rank has its block.
inline int64_t slot_of(const Forward& f, int64_t token) {
    int64_t row = f.scratch.token_rows[token], position = position_of(f, token);
    int64_t block = position / kBlock;
    if (f.batch->held_before) {
        const int64_t* before = f.batch->held_before[row];
        if (before[block + 1] == before[block]) return -1;
        block = before[block];
    }
    return f.batch->block_tables[row][block] * kBlock + position % kBlock;
}

// Squares of this rank's part of q and of k; a KV head that ranks share counts on the first.
inline void put_squares(const Forward& f, int64_t token) {
    const shoal_model& model = *f.model;
    int64_t dim = model.head_dim, heads = model.num_heads + 2 * int64_t(model.num_kv_heads);
    const float* x = f.scratch.qkv + token * heads * dim;
    float* sums = f.scratch.head_squares + 2 * token;
    sums[0] = sums[1] = 0.f;
    for (int64_t i = 0; i < model.num_heads * dim; i++) sums[0] += x[i] * x[i];
    x += model.num_heads * dim;
    for (int64_t i = model.head_offset ? dim : 0; i < model.num_kv_heads * dim; i++) sums[1] += x[i] * x[i];
}

// A head of q or k by the norm of all of them, on all ranks.
inline void norm_jointly(const Forward& f, const shoal_layer& layer, int64_t token, int64_t head, float* x) {
    const shoal_model& model = *f.model;
    bool is_key = head >= model.num_heads;
    int64_t dim = model.head_dim, count = (is_key ? model.norm_kv_heads : model.norm_heads) * dim;
    float mean = f.scratch.head_squares[2 * token + is_key] / float(count);
    float scale = 1.f / sqrtf(mean + model.norm_eps);
    const float* weight = layer.qk_norm + head * dim;
    for (int64_t d = 0; d < dim; d++) x[d] = x[d] * scale * weight[d];
}

// A head of q or k of one token: normed and turned, q scaled.
inline void turn_head(const Forward& f, const shoal_layer& layer, int64_t token, int64_t head, float* x) {
    const shoal_model& model = *f.model;
    int64_t half = model.head_dim / 2;
    if (layer.qk_norm && model.norm_heads) norm_jointly(f, layer, token, head, x);
    else if (layer.qk_norm)
        rms_norm(x, layer.qk_norm + head * model.head_dim, model.head_dim, model.norm_eps, x);
    int64_t at = (layer.rope * f.batch->num_tokens + token) * half;
    const float *cosines = f.scratch.cosines + at, *sines = f.scratch.sines + at;
    float scale = head < model.num_heads ? model.attention_scale : 1.f;
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = (first * cosines[i] - second * sines[i]) * scale;
        x[i + half] = (second * cosines[i] + first * sines[i]) * scale;
    }
}

// One head of one token: q and k are turned, k and v stored.
inline void finish_head(const Forward& f, const shoal_layer& layer, const shoal_layer_kv& kv,
                        int64_t token, int64_t head) {
    const shoal_model& model = *f.model;
    int64_t rotated = model.num_heads + model.num_kv_heads, all = rotated + model.num_kv_heads;
    float* x = f.scratch.qkv + (token * all + head) * model.head_dim;
    if (head < rotated) turn_head(f, layer, token, head, x);
    if (head >= rotated) store_values(f, kv, slot_of(f, token), head - rotated, x);
    else if (head >= model.num_heads) store_keys(f, kv, slot_of(f, token), head - model.num_heads, x);
}

} // namespace
