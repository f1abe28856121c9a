// A range of decoder layers over a batch, run by every thread of a team at once: phases of
// equal pieces of work, a barrier after each.
//
//     norm | qkv | norm of heads, rope, cache | attention | o | norm | gate, up | rounding | down
//
// Where there are several ranks, the first thread sums o and down over them, between two barriers.
#pragma once
#include <math.h>

#include "attention.h"

namespace {

constexpr int64_t kReadAheadBytes = 256 << 10; // of a core's own cache
constexpr int64_t kReadAheadTokens = 16;       // beyond, a step is bound by arithmetic

struct Pass {
    const Forward& f;
    int thread, threads;
    Work* work; // of the next phase
    const uint8_t *ahead, *ahead_end; // what this thread reads first in the next product

    // Runs `piece` for 0 <= i < total, spread over the team, and waits for all of it.
    template <typename Piece> void phase(int64_t total, Piece piece) {
        int64_t first, last;
        while (take(work, total, threads, &first, &last))
            for (int64_t i = first; i < last; i++) piece(i);
        end();
    }

    // Sums [tokens, hidden] over all ranks; false: it failed, and every thread must leave.
    bool reduce(float* data) {
        const shoal_model& model = *f.model;
        if (!model.reduce) return true;
        int64_t count = int64_t(f.batch->num_tokens) * model.hidden;
        if (thread == 0 && model.reduce(model.reduce_context, data, count)) f.failed = true;
        end();
        return !f.failed;
    }

    // Waits for the others, and reads ahead meanwhile: a step is bound by reading weights.
    void end() {
        work++;
        uint32_t round = team_arrive(f.team);
        for (; ahead < ahead_end && !team_is_over(f.team, round); ahead += 256)
            for (int line = 0; line < 256; line += 64) prefetch_far(ahead + line);
        team_wait(f.team, round);
    }

    void expect(const shoal_weight* weight, Into into) {
        ahead = ahead_end = nullptr;
        if (!weight || f.batch->num_tokens > kReadAheadTokens) return;
        Shares shares(*weight, into, threads);
        int64_t bytes = shares.own * shares.panels * panel_bytes(weight->format, weight->cols);
        ahead = weight->data + thread * bytes;
        ahead_end = ahead + (bytes < kReadAheadBytes ? bytes : kReadAheadBytes);
    }

    float* row() const { return f.scratch.row + thread * f.scratch.row_floats; }

    // Makes the inputs of a product: `values` gives (a pointer to) a token's values.
    template <typename Values> void inputs(const shoal_weight& weight, int64_t tokens, Values values) {
        Tiles tiles(tokens);
        phase(tiles.count, [&](int64_t i) {
            Tile tile = tiles[i];
            for (int m = 0; m < tile.size; m++)
                put_input(weight, f.scratch.inputs, tile, m, values(tile.first + m));
        });
    }

    // `next`: the weight of the next product, if there is one.
    void product(const shoal_weight& weight, int64_t tokens, const Output& to,
                 const shoal_weight* next, Into next_into = Into::kStore) {
        multiply(weight, f.scratch.inputs, tokens, to, work, thread, threads);
        expect(next, next_into);
        end();
    }
};

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

// cos and sin of one token's position for one rope.
inline void make_angles(const Forward& f, int64_t rope, int64_t token) {
    int64_t half = f.model->head_dim / 2, row = f.scratch.token_rows[token];
    int64_t position = f.batch->context_lens[row] - f.batch->query_lens[row] + token -
                       f.scratch.row_starts[row];
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
    const shoal_model& model = *f.model;
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
    const shoal_model& model = *f.model;
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

// One head of one token: q and k are normed and turned, q scaled, k and v stored.
inline void finish_head(const Forward& f, const shoal_layer& layer, const shoal_layer_kv& kv,
                        int64_t token, int64_t head) {
    const shoal_model& model = *f.model;
    int64_t rotated = model.num_heads + model.num_kv_heads, half = model.head_dim / 2;
    int64_t all = rotated + model.num_kv_heads;
    float* x = f.scratch.qkv + (token * all + head) * model.head_dim;
    int64_t row = f.scratch.token_rows[token];
    int64_t position = f.batch->context_lens[row] - f.batch->query_lens[row] + token -
                       f.scratch.row_starts[row];
    int64_t block = f.batch->block_tables[row][position / kBlock];
    int64_t slot = block * kBlock + position % kBlock;
    if (head >= rotated) return store_values(f, kv, slot, head - rotated, x);
    if (layer.qk_norm)
        rms_norm(x, layer.qk_norm + head * model.head_dim, model.head_dim, model.norm_eps, x);
    int64_t at = (layer.rope * f.batch->num_tokens + token) * half;
    const float *cosines = f.scratch.cosines + at, *sines = f.scratch.sines + at;
    float scale = head < model.num_heads ? model.attention_scale : 1.f;
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = (first * cosines[i] - second * sines[i]) * scale;
        x[i + half] = (second * cosines[i] + first * sines[i]) * scale;
    }
    if (head >= model.num_heads) store_keys(f, kv, slot, head - model.num_heads, x);
}

// What attention or the MLP gives: onto the hidden states at once, or aside (in `residual`),
// because it is to be summed over the ranks or normed first.
struct Branch {
    const float* norm;
    bool is_aside;
};

inline Branch branch_of(const Forward& f, const shoal_weight& last, const float* norm) {
    return {norm, norm || f.model->reduce || !last.data};
}

inline Output branch_output(const Forward& f, const Branch& branch, const float* bias) {
    int64_t n = f.model->hidden;
    if (branch.is_aside) return {Into::kStore, f.scratch.residual, n, n, bias, 0};
    return {Into::kAdd, f.hidden, n, n, bias, 0};
}

// Adds what lies aside to the hidden states of one token.
inline void add_branch(const Forward& f, const Branch& branch, int64_t token, float* row) {
    if (!branch.is_aside) return;
    int64_t n = f.model->hidden;
    const float* values = f.scratch.residual + token * n;
    if (branch.norm) rms_norm(values, branch.norm, n, f.model->norm_eps, row), values = row;
    for (int64_t i = 0; i < n; i++) f.hidden[token * n + i] += values[i];
}

// The branch of a rank that has no part in it: its bias, if it is the one that adds it.
inline void put_bias_aside(Pass& pass, const Branch& before, const float* bias) {
    const Forward& f = pass.f;
    int64_t n = f.model->hidden;
    pass.phase(f.batch->num_tokens, [&](int64_t token) {
        add_branch(f, before, token, pass.row());
        float* values = f.scratch.residual + token * n;
        if (bias) memcpy(values, bias, size_t(n) * 4);
        else memset(values, 0, size_t(n) * 4);
    });
}

// What a token's heads give, as an input of o: zeros where o has columns of other ranks' heads.
inline const float* attention_input(const Forward& f, const shoal_layer& layer, int64_t token) {
    merge_parts(f, layer, token);
    float* own = attention_of(f, layer, token);
    float* row = own - layer.o_lead;
    int64_t end = layer.o_lead + f.model->num_heads * f.model->head_dim;
    if (own != row) memset(row, 0, size_t(layer.o_lead) * 4);
    if (end != layer.o.cols) memset(row + end, 0, size_t(layer.o.cols - end) * 4);
    return row;
}

inline Branch attention_half(Pass& pass, const shoal_layer& layer, const shoal_layer_kv& kv,
                             const Branch& before) {
    const Forward& f = pass.f;
    Branch branch = branch_of(f, layer.o, layer.post_attention_norm);
    if (!layer.o.data) return put_bias_aside(pass, before, layer.o_bias), branch;
    const shoal_model& model = *f.model;
    int64_t tokens = f.batch->num_tokens, n = model.hidden;
    int64_t heads = model.num_heads + 2 * model.num_kv_heads, head_cols = heads * model.head_dim;
    pass.inputs(layer.qkv, tokens, [&](int64_t token) {
        add_branch(f, before, token, pass.row());
        rms_norm(f.hidden + token * n, layer.attention_norm, n, model.norm_eps, pass.row());
        return pass.row();
    });
    pass.product(layer.qkv, tokens, {Into::kStore, f.scratch.qkv, head_cols, head_cols, layer.qkv_bias, 0},
                 &layer.o);
    pass.phase(tokens * heads, [&](int64_t i) { finish_head(f, layer, kv, i / heads, i % heads); });
    const int64_t* starts = f.scratch.item_starts;
    pass.phase(starts[f.batch->num_rows], [&](int64_t i) {
        int64_t low = 0, high = f.batch->num_rows; // the row in which item i lies
        while (high - low > 1) (starts[(low + high) / 2] <= i ? low : high) = (low + high) / 2;
        run_item(f, layer, kv, low, i - starts[low]);
    });
    pass.inputs(layer.o, tokens, [&](int64_t token) { return attention_input(f, layer, token); });
    pass.product(layer.o, tokens, branch_output(f, branch, layer.o_bias), &layer.gate_up, Into::kGate);
    return branch;
}

inline Branch mlp_half(Pass& pass, const shoal_layer& layer, const Branch& before,
                       const shoal_weight* next) {
    const Forward& f = pass.f;
    Branch branch = branch_of(f, layer.down, layer.post_ffn_norm);
    if (!layer.down.data) return put_bias_aside(pass, before, layer.down_bias), branch;
    const shoal_model& model = *f.model;
    int64_t tokens = f.batch->num_tokens, n = model.hidden, ffn = model.ffn;
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
