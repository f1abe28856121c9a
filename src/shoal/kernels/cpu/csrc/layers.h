// A range of decoder layers over a batch, run by every thread of a team at once: phases of
// equal pieces of work, a barrier after each.
//
//     norm | qkv | norm of heads, rope, cache | attention | o | norm | gate, up | rounding | down
//
// An MLP is a mixture of experts where the layer has some (experts.h).
// Where there are several ranks, the first thread sums o and down over them, between two barriers.
#pragma once
#include "experts.h"
#include "token_ranges.h"

namespace {

// What a token's heads give, as an input of o: zeros where o has columns of other ranks' heads.
inline const float* attention_input(const Forward& f, const shoal_layer& layer, int64_t token) {
    if (f.model->num_ranks) take_own(f, layer, token);
    else merge_parts(f, layer, token);
    float* own = f.scratch.attention + token * layer.o.cols + layer.o_lead;
    float* row = own - layer.o_lead;
    int64_t end = layer.o_lead + f.model->num_heads * f.model->head_dim;
    if (own != row) memset(row, 0, size_t(layer.o_lead) * 4);
    if (end != layer.o.cols) memset(row + end, 0, size_t(layer.o.cols - end) * 4);
    return row;
}

inline void attend_to_keys(Pass& pass, const shoal_layer& layer, const shoal_layer_kv& kv) {
    const Forward& f = pass.f;
    const int64_t* starts = f.scratch.item_starts;
    pass.phase(starts[f.batch->num_rows], [&](int64_t i) {
        int64_t low = 0, high = f.batch->num_rows; // the row in which item i lies
        while (high - low > 1) (starts[(low + high) / 2] <= i ? low : high) = (low + high) / 2;
        run_item(f, layer, kv, low, i - starts[low]);
    });
}

// Where a sum fails, so does the next one, and the pass ends there.
inline void attend_over_ranks(Pass& pass, const shoal_layer& layer, const shoal_layer_kv& kv) {
    const Forward& f = pass.f;
    const shoal_model& all = *f.attended;
    int64_t tokens = f.batch->num_tokens, kv_heads = 2 * int64_t(all.num_kv_heads);
    pass.phase(tokens, [&](int64_t token) { place_heads(f, layer, token); });
    if (!pass.reduce(f.scratch.heads, (all.num_heads + kv_heads) * all.head_dim)) return;
    pass.phase(tokens * kv_heads, [&](int64_t i) { store_head(f, kv, i / kv_heads, i % kv_heads); });
    attend_to_keys(pass, layer, kv);
    pass.phase(tokens, [&](int64_t token) { merge_parts(f, layer, token); });
    if (!pass.reduce(f.scratch.sums, int64_t(all.num_heads) * all.num_ranks)) return;
    pass.phase(tokens, [&](int64_t token) { weigh_ranks(f, token); });
    pass.reduce(f.scratch.merged, int64_t(all.num_heads) * all.head_dim);
}

// Where q and k are normed over all heads together: each token's squares, summed over ranks.
inline bool sum_squares(Pass& pass) {
    const Forward& f = pass.f;
    if (!f.model->norm_heads) return true;
    pass.phase(f.batch->num_tokens, [&](int64_t token) { put_squares(f, token); });
    return pass.reduce(f.scratch.head_squares, 2);
}

inline Branch attention_half(Pass& pass, const shoal_layer& layer, const shoal_layer_kv& kv,
                             const Branch& before) {
    const Forward& f = pass.f;
    Branch branch = branch_of(f, layer.o, layer.post_attention_norm);
    const shoal_model& model = *f.model;
    if (!layer.o.data) {
        if (!sum_squares(pass)) return branch;
        if (model.num_ranks) attend_over_ranks(pass, layer, kv);
        return put_bias_aside(pass, before, layer.o_bias), branch;
    }
    int64_t tokens = f.batch->num_tokens, n = model.hidden;
    int64_t heads = model.num_heads + 2 * model.num_kv_heads, head_cols = heads * model.head_dim;
    pass.inputs(layer.qkv, tokens, [&](int64_t token) {
        add_branch(f, before, token, pass.row());
        rms_norm(f.hidden + token * n, layer.attention_norm, n, model.norm_eps, pass.row());
        return pass.row();
    });
    pass.product(layer.qkv, tokens, {Into::kStore, f.scratch.qkv, head_cols, head_cols, layer.qkv_bias, 0},
                 &layer.o);
    if (!sum_squares(pass)) return branch;
    if (model.num_ranks) {
        attend_over_ranks(pass, layer, kv);
    } else {
        pass.phase(tokens * heads, [&](int64_t i) { finish_head(f, layer, kv, i / heads, i % heads); });
        attend_to_keys(pass, layer, kv);
    }
    pass.inputs(layer.o, tokens, [&](int64_t token) { return attention_input(f, layer, token); });
    pass.product(layer.o, tokens, branch_output(f, branch, layer.o_bias), &layer.gate_up, Into::kGate);
    return branch;
}

inline Branch mlp_half(Pass& pass, const shoal_layer& layer, const Branch& before,
                       const shoal_weight* next) {
    if (layer.experts) return experts_half(pass, layer, before, next);
    const Forward& f = pass.f;
    Branch branch = branch_of(f, layer.down, layer.post_ffn_norm);
    if (!layer.down.data) return put_bias_aside(pass, before, layer.down_bias), branch;
    const shoal_model& model = *f.model;
    int64_t tokens = f.batch->num_tokens, n = model.hidden, ffn = layer.down.cols;
    pass.inputs(layer.gate_up, tokens, [&](int64_t token) {
        add_branch(f, before, token, pass.row());
        rms_norm(f.hidden + token * n, layer.ffn_norm, n, model.norm_eps, pass.row());
        return pass.row();
    });
    pass.product(layer.gate_up, tokens,
                 {Into::kGate, f.scratch.gated, ffn, ffn, layer.gate_up_bias, model.activation},
                 &layer.down);
    pass.inputs(layer.down, tokens, [&](int64_t token) { return f.scratch.gated + token * ffn; });
    pass.product(layer.down, tokens, branch_output(f, branch, layer.down_bias), next);
    return branch;
}

// Where x is largest, the first of equals.
inline int64_t argmax(const float* x, int64_t n) {
    constexpr int64_t kRun = 1024; // the run that holds the largest, then its place in it
    float most = -INFINITY;
    int64_t best = 0;
    for (int64_t start = 0; start < n; start += kRun) {
        int64_t end = start + kRun < n ? start + kRun : n, i = start;
        F top = set1(-INFINITY);
        for (; i + kWidth <= end; i += kWidth) top = max(top, load(x + i));
        float highest = largest(top);
        for (; i < end; i++) highest = x[i] > highest ? x[i] : highest;
        if (highest > most) most = highest, best = start;
    }
    for (int64_t i = best; i < n; i++)
        if (x[i] == most) return i;
    return 0;
}

inline void embed(const Forward& f, int64_t token) {
    const shoal_ends& ends = *f.ends;
    float* x = f.hidden + token * f.model->hidden;
    int64_t row = ends.token_ids[token] - ends.first_id;
    if (!ends.embedding || row < 0 || row >= ends.embedding->rows) { // another rank's
        memset(x, 0, size_t(f.model->hidden) * 4);
        return;
    }
    read_row(*ends.embedding, row, x);
    if (ends.embedding_scale == 1.f) return;
    for (int64_t i = 0; i < f.model->hidden; i++) x[i] *= ends.embedding_scale;
}

inline void sample(Pass& pass) {
    const Forward& f = pass.f;
    const shoal_ends& ends = *f.ends;
    int64_t n = ends.head->rows, samples = ends.num_samples;
    pass.inputs(*ends.head, samples,
                [&](int64_t i) { return f.hidden + ends.samples[i] * f.model->hidden; });
    pass.product(*ends.head, samples, {Into::kStore, ends.logits, n, n, nullptr, 0}, nullptr);
    pass.phase(samples, [&](int64_t i) { ends.best[i] = argmax(ends.logits + i * n, n); });
}

void forward(void* argument, int thread) {
    const Forward& f = *static_cast<const Forward*>(argument);
    const shoal_model& model = *f.model;
    int64_t tokens = f.batch->num_tokens;
    int64_t angles = model.num_layers && model.num_heads ? tokens * model.num_ropes : 0;
    const shoal_weight* head = f.ends->num_samples ? f.ends->head : nullptr;
    Pass pass = {f, thread, team_size(f.team), f.scratch.work, nullptr, nullptr};
    if (model.num_layers) pass.expect(&model.layers[0].qkv, Into::kStore);
    pass.phase(angles + (f.ends->token_ids ? tokens : 0), [&](int64_t i) {
        if (i < angles) make_angles(f, i / tokens, i % tokens);
        else embed(f, i - angles);
    });
    if (f.ends->token_ids && !pass.reduce(f.hidden)) return;
    Branch before = {nullptr, false};
    for (int64_t i = 0; i < model.num_layers; i++) {
        const shoal_layer& layer = model.layers[i];
        before = attention_half(pass, layer, f.kv[i], before);
        if (!pass.reduce(f.scratch.residual)) return;
        before = mlp_half(pass, layer, before, i + 1 < model.num_layers ? &model.layers[i + 1].qkv : head);
        if (!pass.reduce(f.scratch.residual)) return;
    }
    pass.phase(tokens, [&](int64_t token) {
        float* x = f.hidden + token * model.hidden;
        add_branch(f, before, token, pass.row());
        if (model.final_norm) rms_norm(x, model.final_norm, model.hidden, model.norm_eps, x);
    });
    if (head) sample(pass);
}

// This rank's experts, for tokens of others.
void experts(void* argument, int thread) {
    const Forward& f = *static_cast<const Forward*>(argument);
    int64_t tokens = f.batch->num_tokens, n = f.model->hidden;
    Pass pass = {f, thread, team_size(f.team), f.scratch.work, nullptr, nullptr};
    pass.phase(tokens + 1, [&](int64_t i) {
        if (i < tokens) memset(f.scratch.residual + i * n, 0, size_t(n) * 4);
        else list_tokens(f, *f.served, 0);
    });
    add_experts(pass, *f.served, nullptr);
}

void linear(void* argument, int thread) {
    const Linear& l = *static_cast<const Linear*>(argument);
    int threads = team_size(l.team);
    Tiles tiles(l.num_tokens);
    int64_t first, last;
    while (take(l.scratch.work, tiles.count, threads, &first, &last))
        for (int64_t i = first; i < last; i++)
            for (int m = 0; m < tiles[i].size; m++)
                put_input(*l.weight, l.scratch.inputs, tiles[i], m,
                          l.x + (tiles[i].first + m) * l.weight->cols);
    team_barrier(l.team);
    multiply(*l.weight, l.scratch.inputs, l.num_tokens,
             {Into::kStore, l.out, l.weight->rows, l.weight->rows, nullptr, 0}, l.scratch.work + 1,
             thread, threads);
}

int64_t input_bytes(int64_t tokens, int64_t cols) { return tokens * token_bytes(cols); }

int64_t plan(const shoal_model* model, const shoal_batch* batch, Scratch* scratch) {
    return plan_attention(*model, *batch, *scratch);
}

} // namespace
