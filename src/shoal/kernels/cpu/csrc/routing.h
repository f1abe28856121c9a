// Which experts a token goes through, and which tokens an expert has.
//
//     x, normed | its scores by all experts | the highest few, and their weights | lists by expert
//
// Ranks with different instruction sets must choose alike, so sums that a choice depends on are
// made in 16 lanes and folded in one order, whatever a vector's width.
#pragma once
#include "heads.h"

namespace {

constexpr int kScoredExperts = 4, kScoredTokens = 2; // at once
constexpr int kShareBits = 16;

struct Sixteen {
    F part[kHalves];
};

inline F load_upto(const float* x, int64_t left) {
    return left >= kWidth ? load(x) : load_some(x, left > 0 ? int(left) : 0);
}

inline float fold_lanes(const Sixteen& lanes) {
    float x[kLanes];
    for (int h = 0; h < kHalves; h++) store(x + h * kWidth, lanes.part[h]);
    for (int n = kLanes / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
}

// Products of kTokens vectors with kScoredExperts others.
template <int kTokens>
inline void dot_products(const float* const* x, const float* const* weights, int64_t n,
                         float (*out)[kScoredExperts]) {
    Sixteen lanes[kTokens][kScoredExperts];
    for (int h = 0; h < kHalves; h++) {
        F sums[kTokens][kScoredExperts];
#pragma GCC unroll 2
        for (int m = 0; m < kTokens; m++)
#pragma GCC unroll 4
            for (int e = 0; e < kScoredExperts; e++) sums[m][e] = zero();
        int64_t i = h * kWidth;
        for (; i + kWidth <= n; i += kLanes)
#pragma GCC unroll 4
            for (int e = 0; e < kScoredExperts; e++) {
                F weight = load(weights[e] + i);
#pragma GCC unroll 2
                for (int m = 0; m < kTokens; m++) sums[m][e] = fma(load(x[m] + i), weight, sums[m][e]);
            }
        if (i < n)
            for (int e = 0; e < kScoredExperts; e++)
                for (int m = 0; m < kTokens; m++)
                    sums[m][e] = fma(load_upto(x[m] + i, n - i), load_upto(weights[e] + i, n - i), sums[m][e]);
        for (int m = 0; m < kTokens; m++)
            for (int e = 0; e < kScoredExperts; e++) lanes[m][e].part[h] = sums[m][e];
    }
    for (int m = 0; m < kTokens; m++)
        for (int e = 0; e < kScoredExperts; e++) out[m][e] = fold_lanes(lanes[m][e]);
}

inline float dot_product(const float* x, const float* weight, int64_t n) {
    const float* weights[kScoredExperts] = {weight, weight, weight, weight};
    float out[1][kScoredExperts];
    dot_products<1>(&x, weights, n, out);
    return out[0][0];
}

// As `rms_norm`, its sum in an order of its own.
inline void norm_alike(const float* x, const float* weight, int64_t n, float eps, float* out) {
    float scale = 1.f / sqrtf(dot_product(x, x, n) / float(n) + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// Scores, before the softmax, of a few tokens by a few experts.
inline void score(const Forward& f, const shoal_experts& experts, int64_t token, int64_t expert) {
    int64_t n = f.model->hidden, total = f.model->num_experts, tokens = f.batch->num_tokens;
    const float* weights[kScoredExperts];
    for (int64_t e = 0; e < kScoredExperts; e++)
        weights[e] = experts.router + (expert + e < total ? expert + e : expert) * n;
    const float* x[kScoredTokens];
    for (int64_t m = 0; m < kScoredTokens; m++)
        x[m] = f.scratch.normed + (token + m < tokens ? token + m : token) * n;
    float out[kScoredTokens][kScoredExperts];
    if (token + 1 < tokens) dot_products<kScoredTokens>(x, weights, n, out);
    else dot_products<1>(x, weights, n, out);
    for (int64_t m = 0; m < kScoredTokens && token + m < tokens; m++)
        for (int64_t e = 0; e < kScoredExperts && expert + e < total; e++)
            f.scratch.scores[(token + m) * total + expert + e] = out[m][e];
}

// Where x is largest, the first of equals.
inline int64_t place_of_largest(const float* x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// Leaves only the best groups of consecutive experts to choose from.
inline void hide_groups(const shoal_model& model, float* scores, float* best) {
    int64_t groups = model.num_expert_groups, size = model.num_experts / groups;
    for (int64_t g = 0; g < groups; g++)
        best[g] = scores[g * size + place_of_largest(scores + g * size, size)];
    for (int64_t taken = 0; taken < model.num_active_groups; taken++)
        best[place_of_largest(best, groups)] = -INFINITY;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < size && best[g] != -INFINITY; i++) scores[g * size + i] = -INFINITY;
}

// The experts of one token and their weights; `row`: room for the scores and the groups' best.
inline void choose_experts(const Forward& f, int64_t token, float* row) {
    const shoal_model& model = *f.model;
    int64_t n = model.num_experts, active = model.num_active;
    float* scores = f.scratch.scores + token * n;
    memcpy(row, scores, size_t(n) * 4);
    float most = scores[place_of_largest(scores, n)], total = 0.f, chosen = 0.f;
    for (int64_t i = 0; i < n; i++) total += expf(scores[i] - most);
    if (model.num_active_groups < model.num_expert_groups) hide_groups(model, row, row + n);
    int64_t* ids = f.scratch.expert_ids + token * active;
    float* weights = f.scratch.expert_weights + token * active;
    for (int64_t k = 0; k < active; k++) {
        ids[k] = place_of_largest(row, n);
        row[ids[k]] = -INFINITY;
        weights[k] = expf(scores[ids[k]] - most) / total;
        chosen += weights[k];
    }
    for (int64_t k = 0; k < active; k++) {
        if (model.renormalises) weights[k] /= chosen;
        weights[k] *= model.expert_scale;
    }
}

// In [0, 1 << kShareBits): which share of an expert's tokens is rounded up (core/split.py).
inline int64_t share_phase(const Forward& f, const shoal_experts& experts) {
    return (position_of(f, 0) + experts.layer) * 40503 % (1 << kShareBits);
}

// Lists of this rank's tokens, expert by expert, each in the order of the batch, and their tiles.
inline void list_tokens(const Forward& f, const shoal_experts& experts, int64_t phase) {
    const Scratch& s = f.scratch;
    int64_t n = f.model->num_experts, active = f.model->num_active;
    int64_t pairs = int64_t(f.batch->num_tokens) * active, listed = 0, tiles = 0;
    ExpertTurn* turns = s.turns;
    for (int64_t i = 0; i < n; i++) turns[i] = {};
    for (int64_t i = 0; i < pairs; i++)
        if (s.expert_ids[i] < n) turns[s.expert_ids[i]].tokens++;
    for (int64_t i = 0; i < n && experts.counts; i++) experts.counts[i] += turns[i].tokens;
    for (int64_t slot = 0; slot < experts.num_shares; slot++) {
        const shoal_share& share = experts.shares[slot];
        ExpertTurn& turn = turns[share.expert];
        turn.first = (turn.tokens * share.start + phase) >> kShareBits;
        turn.last = (turn.tokens * share.stop + phase) >> kShareBits;
        turn.list = s.list_starts[slot] = listed;
        listed += turn.last - turn.first;
        Tiles own(turn.last - turn.first);
        for (int64_t t = 0; t < own.count; t++)
            s.expert_tiles[tiles++] = {int32_t(slot), int32_t(own[t].first), own[t].size};
    }
    s.list_starts[experts.num_shares] = listed;
    s.list_starts[experts.num_shares + 1] = tiles;
    for (int64_t i = 0; i < pairs; i++) {
        if (s.expert_ids[i] >= n) continue;
        ExpertTurn& turn = turns[s.expert_ids[i]];
        int64_t at = turn.seen++;
        if (at < turn.first || at >= turn.last) continue;
        at += turn.list - turn.first;
        s.list_tokens[at] = i / active;
        s.list_weights[at] = s.expert_weights[i];
    }
}

} // namespace
