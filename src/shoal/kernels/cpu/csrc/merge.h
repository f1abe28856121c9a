// Attention over parts, put together (flash-decoding): parts of a long context, and those of ranks
// that split KV by token ranges.
#pragma once
#include <math.h>

#include "attention.h"

namespace {

// The parts of one token's heads, put together where its output belongs.
inline void merge_parts(const Forward& f, const shoal_layer& layer, int64_t token) {
    const shoal_model& model = *f.attended;
    int64_t row = f.scratch.token_rows[token], in_row = token - f.scratch.row_starts[row];
    RowItems items = items_of(model, *f.batch, row);
    if (items.parts == 1) return;
    for (int64_t head = 0; head < model.num_heads; head++) {
        float* to = attention_of(f, layer, token) + head * model.head_dim;
        const float* parts = part_of(f, row, items, in_row, head, 0);
        int64_t size = model.head_dim + 2;
        float most = -INFINITY, total = 0.f;
        for (int64_t p = 0; p < items.parts; p++)
            if (parts[p * size + model.head_dim] > most) most = parts[p * size + model.head_dim];
        memset(to, 0, size_t(model.head_dim) * 4);
        for (int64_t p = 0; p < items.parts; p++) {
            const float* part = parts + p * size;
            if (part[model.head_dim] == -INFINITY) continue;
            float share = expf(part[model.head_dim] - most);
            total += share * part[model.head_dim + 1];
            for (int64_t d = 0; d < model.head_dim; d++) to[d] += share * part[d];
        }
        put_sum(f, token, head, most, total);
        for (int64_t d = 0; total > 0.f && d < model.head_dim; d++) to[d] /= total;
    }
}

// Multiplies what this rank found for a token by its share of it: a softmax over the ranks.
inline void weigh_ranks(const Forward& f, int64_t token) {
    const shoal_model& model = *f.model;
    int64_t ranks = model.num_ranks;
    for (int64_t head = 0; head < model.all_heads; head++) {
        const float* sums = f.scratch.sums + (token * model.all_heads + head) * ranks;
        float most = sums[0], total = 0.f;
        for (int64_t r = 1; r < ranks; r++) most = fmaxf(most, sums[r]);
        for (int64_t r = 0; r < ranks; r++) total += expf(sums[r] - most);
        float share = expf(sums[model.rank] - most) / total;
        float* x = f.scratch.merged + (token * model.all_heads + head) * model.head_dim;
        for (int64_t d = 0; d < model.head_dim; d++) x[d] *= share;
    }
}

} // namespace
