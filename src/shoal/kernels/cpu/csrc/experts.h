// The MLP half of a layer with experts.
//
//     norm | scores | choice | lists | [the MLP beside them] | inputs | gate, up | inputs | down
//                       routed ┘                                                   returned ┘
//
// A thread takes output columns (panels) and goes through all experts' lists for these, so that
// all threads stream weights however few experts are active, and a token's sums are made in the
// order of the experts' numbers, whatever the threads and the batch.
#pragma once
#include "bring.h"
#include "routing.h"

namespace {

constexpr int64_t kFirstBytes = 1024; // of an expert's panels, fetched while the one before is run

enum class Part { kGateUp = 0, kDown = 1 };

inline const shoal_weight& weight_of(const shoal_experts& experts, int64_t slot, Part part) {
    return experts.weights[2 * slot + int(part)];
}

inline int64_t list_size(const Scratch& s, int64_t slot) { return s.list_starts[slot + 1] - s.list_starts[slot]; }

// The first expert from `slot` on that has tokens; slots.last: none has.
inline int64_t next_active(const Forward& f, const Slots& slots, int64_t slot) {
    while (slot < slots.last && !list_size(f.scratch, slot)) slot++;
    return slot;
}

// Makes the inputs of one tile; `values` gives those at a place in the lists.
template <typename Values>
inline void expert_inputs(Pass& pass, const shoal_experts& experts, const Slots& slots, Part part,
                          Values values) {
    const Scratch& s = pass.f.scratch;
    int64_t first = first_tile(s, experts, slots.first);
    pass.phase(first_tile(s, experts, slots.last) - first, [&](int64_t i) {
        ExpertTile tile = s.expert_tiles[first + i];
        const shoal_weight& weight = weight_of(experts, tile.slot, part);
        int64_t start = s.list_starts[tile.slot];
        uint8_t* inputs = s.inputs + start * token_bytes(weight.cols);
        for (int m = 0; m < tile.size; m++)
            put_input(weight, inputs, Tile{tile.first, tile.size}, m, values(start + tile.first + m));
    });
}

// Units [first, last) of all experts in turn.
inline void run_experts(const Forward& f, const shoal_experts& experts, const Slots& slots, Part part,
                        const Output& to, int64_t panels, int64_t first, int64_t last) {
    const Scratch& s = f.scratch;
    int64_t slot = next_active(f, slots, slots.first);
    while (slot < slots.last && first < last) {
        int64_t next = next_active(f, slots, slot + 1);
        const shoal_weight& weight = weight_of(experts, slot, part);
        int64_t unit_bytes = panels * panel_bytes(weight.format, weight.cols);
        if (next < slots.last)
            for (int64_t at = 0; at < kFirstBytes; at += 64)
                prefetch(weight_of(experts, next, part).data + first * unit_bytes + at);
        Output own = to;
        int64_t start = s.list_starts[slot];
        if (part == Part::kGateUp) own.out += start * to.stride;
        else own.tokens = s.list_tokens + start, own.weights = s.list_weights + start;
        multiply_units(weight, s.inputs + start * token_bytes(weight.cols), list_size(s, slot), own, panels,
                       first, last);
        slot = next;
    }
}

// What this thread reads first of a part of the experts.
inline void expect_experts(Pass& pass, const shoal_experts& experts, const Slots& slots, Part part) {
    pass.expect(nullptr, Into::kStore);
    int64_t slot = next_active(pass.f, slots, slots.first);
    if (slot < slots.last)
        pass.expect(&weight_of(experts, slot, part), part == Part::kGateUp ? Into::kGate : Into::kStore);
}

inline void expert_product(Pass& pass, const shoal_experts& experts, const Slots& slots, Part part,
                           const Output& to) {
    if (!experts.num_shares) return;
    Shares shares(weight_of(experts, 0, part), to.into, pass.threads);
    int64_t own = pass.thread * shares.own, shared = pass.threads * shares.own, first, last;
    run_experts(pass.f, experts, slots, part, to, shares.panels, own, own + shares.own);
    while (take(pass.work, shares.units - shared, pass.threads, &first, &last))
        run_experts(pass.f, experts, slots, part, to, shares.panels, shared + first, shared + last);
}

// Adds some of this rank's experts to `residual`: kRoundPhases phases.
inline void add_round(Pass& pass, const shoal_experts& experts, const Slots& slots,
                      const shoal_weight* next) {
    const Forward& f = pass.f;
    const Scratch& s = f.scratch;
    int64_t n = f.model->hidden, ffn = f.model->expert_ffn;
    expect_experts(pass, experts, slots, Part::kGateUp);
    expert_inputs(pass, experts, slots, Part::kGateUp,
                  [&](int64_t at) { return s.normed + s.list_tokens[at] * n; });
    expert_product(pass, experts, slots, Part::kGateUp,
                   {Into::kGate, s.expert_gated, ffn, ffn, nullptr, f.model->activation});
    expect_experts(pass, experts, slots, Part::kDown);
    pass.end();
    expert_inputs(pass, experts, slots, Part::kDown,
                  [&](int64_t at) { return s.expert_gated + at * ffn; });
    expert_product(pass, experts, slots, Part::kDown, {Into::kWeighted, s.residual, n, n, nullptr, 0});
    pass.expect(next, Into::kStore);
    pass.end();
}

// Adds this rank's experts of the lists to `residual`, in rounds where not all are in memory.
inline void add_experts(Pass& pass, const shoal_experts& experts, const shoal_weight* next) {
    Slots slots = {0, experts.num_shares};
    if (!experts.bring || !pass.f.scratch.list_starts[experts.num_shares])
        return add_round(pass, experts, slots, next);
    Work* first = pass.work; // of every round
    for (slots.last = 0; slots.last < experts.num_shares;) {
        pass.work = first;
        if (!bring_round(pass, experts, &slots)) return;
        add_round(pass, experts, slots, slots.last < experts.num_shares ? nullptr : next);
    }
}

// The MLP that every token goes through, into `residual`.
inline void shared_mlp(Pass& pass, const shoal_layer& layer) {
    const Forward& f = pass.f;
    int64_t tokens = f.batch->num_tokens, n = f.model->hidden, ffn = layer.down.cols;
    pass.inputs(layer.gate_up, tokens, [&](int64_t token) { return f.scratch.normed + token * n; });
    pass.product(layer.gate_up, tokens,
                 {Into::kGate, f.scratch.gated, ffn, ffn, nullptr, f.model->activation}, &layer.down);
    pass.inputs(layer.down, tokens, [&](int64_t token) {
        float* values = f.scratch.gated + token * ffn;
        if (const float* gate = layer.experts->shared_gate) {
            float share = 1.f / (1.f + expf(-dot_product(f.scratch.normed + token * n, gate, n)));
            for (int64_t i = 0; i < ffn; i++) values[i] *= share;
        }
        return values;
    });
    pass.product(layer.down, tokens, {Into::kStore, f.scratch.residual, n, n, nullptr, 0}, nullptr);
}

inline void route(Pass& pass, const shoal_experts& experts) {
    const Forward& f = pass.f;
    int64_t tokens = f.batch->num_tokens;
    int64_t runs = (f.model->num_experts + kScoredExperts - 1) / kScoredExperts;
    pass.phase((tokens + kScoredTokens - 1) / kScoredTokens * runs, [&](int64_t i) {
        score(f, experts, i / runs * kScoredTokens, i % runs * kScoredExperts);
    });
    pass.phase(tokens, [&](int64_t token) { choose_experts(f, token, pass.row()); });
}

inline Branch experts_half(Pass& pass, const shoal_layer& layer, const Branch& before,
                           const shoal_weight* next) {
    const Forward& f = pass.f;
    const shoal_experts& experts = *layer.experts;
    int64_t tokens = f.batch->num_tokens, n = f.model->hidden;
    pass.phase(tokens, [&](int64_t token) {
        add_branch(f, before, token, pass.row());
        norm_alike(f.hidden + token * n, layer.ffn_norm, n, f.model->norm_eps, f.scratch.normed + token * n);
        if (!layer.down.data) memset(f.scratch.residual + token * n, 0, size_t(n) * 4);
    });
    Branch branch = {layer.post_ffn_norm, true};
    route(pass, experts);
    const shoal_model& model = *f.model;
    int64_t phase = share_phase(f, experts);
    if (model.routed && !pass.alone([&] {
            return model.routed(model.experts_context, experts.layer, f.batch->num_tokens, phase,
                                f.scratch.normed, f.scratch.expert_ids, f.scratch.expert_weights);
        }))
        return branch;
    pass.phase(1, [&](int64_t) { list_tokens(f, experts, phase); });
    if (layer.down.data) shared_mlp(pass, layer);
    add_experts(pass, experts, next);
    if (model.returned)
        pass.alone([&] {
            return model.returned(model.experts_context, f.batch->num_tokens, f.scratch.residual);
        });
    return branch;
}

} // namespace
