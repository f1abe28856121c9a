// A team's way through a batch: phases of equal pieces of work, a barrier after each; and what a
// half of a layer gives, on its way to the hidden states.
#pragma once
#include "heads.h"

namespace {

constexpr int64_t kReadAheadBytes = 256 << 10; // of a core's own cache
constexpr int64_t kReadAheadTokens = 16;       // beyond, a step is bound by arithmetic

struct Pass {
    const Forward& f;
    int thread, threads;
    Work* work; // of the next phase
    const uint8_t *ahead, *ahead_end; // what this thread reads first in the next product
    bool failed = false;              // a call of `alone` did

    // Runs `piece` for 0 <= i < total, spread over the team, and waits for all of it.
    template <typename Piece> void phase(int64_t total, Piece piece) {
        int64_t first, last;
        while (take(work, total, threads, &first, &last))
            for (int64_t i = first; i < last; i++) piece(i);
        end();
    }

    // Calls on the first thread, while the others wait; false: it failed (it gave not 0), or one
    // before did, and every thread must leave.
    template <typename Call> bool alone(Call call) {
        if (failed) return false;
        const Work* here = work;
        if (thread == 0 && call()) __atomic_store_n(&f.failed_at, here, __ATOMIC_RELAXED);
        end();
        failed = __atomic_load_n(&f.failed_at, __ATOMIC_RELAXED) == here;
        return !failed;
    }

    // Sums [tokens, hidden] over all ranks; false: as above.
    bool reduce(float* data) { return reduce(data, f.model->hidden); }

    bool reduce(float* data, int64_t of_a_token) {
        const shoal_model& model = *f.model;
        if (!model.reduce) return !failed;
        int64_t count = int64_t(f.batch->num_tokens) * of_a_token;
        return alone([&] { return model.reduce(model.reduce_context, data, count); });
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

} // namespace
