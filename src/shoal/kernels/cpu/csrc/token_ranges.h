// Attention of ranks that split KV by token ranges: each has all KV heads of some blocks.
//
//     own q k v, turned, among zeros | sum over ranks | k v of blocks here | attention over them |
//     sums of exponentials | sum over ranks | weights | sum over ranks
//
// Pieces of work only: the phases are in layers.h.
#pragma once
#include "heads.h"
#include "merge.h"

namespace {

// q, k and v of all heads: this rank's, turned, and zeros. A KV head that ranks share comes from
// the one that has its first query heads.
inline void place_heads(const Forward& f, const shoal_layer& layer, int64_t token) {
    const shoal_model& model = *f.model;
    int64_t dim = model.head_dim, all = model.all_heads + 2 * int64_t(model.all_kv_heads);
    float* to = f.scratch.heads + token * all * dim;
    memset(to, 0, size_t(all * dim) * 4);
    float* sums = f.scratch.sums + token * model.all_heads * model.num_ranks;
    memset(sums, 0, size_t(model.all_heads) * model.num_ranks * 4);
    int64_t rotated = model.num_heads + model.num_kv_heads;
    for (int64_t head = 0; head < rotated + model.num_kv_heads; head++) {
        float* x = f.scratch.qkv + (token * (rotated + model.num_kv_heads) + head) * dim;
        if (head < rotated) turn_head(f, layer, token, head, x);
        int64_t kv_head = (head - model.num_heads) % (model.num_kv_heads ? model.num_kv_heads : 1);
        int64_t place = model.first_head + head;
        if (head >= model.num_heads) {
            if (kv_head == 0 && model.head_offset > 0) continue;
            place = model.all_heads + model.first_kv_head + kv_head;
            if (head >= rotated) place += model.all_kv_heads;
        }
        memcpy(to + place * dim, x, size_t(dim) * 4);
    }
}

// Keys (of KV heads from 0 on), then values, of a token whose block is here.
inline void store_head(const Forward& f, const shoal_layer_kv& kv, int64_t token, int64_t head) {
    const shoal_model& all = *f.attended;
    int64_t slot = slot_of(f, token);
    if (slot < 0) return;
    const float* x = f.scratch.heads +
                     (token * (all.num_heads + 2 * int64_t(all.num_kv_heads)) + all.num_heads + head) * all.head_dim;
    if (head < all.num_kv_heads) store_keys(f, kv, slot, head, x);
    else store_values(f, kv, slot, head - all.num_kv_heads, x);
}

// The merged attention of this rank's heads, where its input of o is.
inline void take_own(const Forward& f, const shoal_layer& layer, int64_t token) {
    const shoal_model& model = *f.model;
    const float* from = f.scratch.merged + (token * model.all_heads + model.first_head) * model.head_dim;
    float* to = f.scratch.attention + token * layer.o.cols + layer.o_lead;
    memcpy(to, from, size_t(model.num_heads) * model.head_dim * 4);
}

} // namespace
