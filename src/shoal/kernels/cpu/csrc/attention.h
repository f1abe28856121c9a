// Causal attention of a batch's tokens over their paged KV, flash-style: a chunk of keys at a
// time, scores never kept (arXiv 2205.14135). A row of few tokens is also cut along its context
// (flash-decoding), so that one long sequence keeps every thread busy; where depends on the row
// alone, never on the batch. (Beyond one part, a token's sums are rounded differently as part of
// a prompt and alone.)
//
//     item = row, some KV heads, some of their query heads, some of its tokens, part of the context
//
// Where the context is cut, an item has several KV heads: a block's heads lie side by side, and
// only long runs are read at full speed.
#pragma once
#include "matmul.h"

namespace {

#ifdef __AVX512F__
constexpr int kMaxQueries = 6; // tokens x heads that share what is read
#else
constexpr int kMaxQueries = 4;
#endif
constexpr int kChunk = 128;      // keys whose scores are kept at once
constexpr int kPart = 512;       // keys of a part
constexpr int kFewTokens = 4;    // rows of at most as many are cut in parts
constexpr int kBlock = 16;       // tokens of a KV block
constexpr int kMaxKvHeads = 4;   // of an item

struct RowItems {
    int64_t parts, query_groups, head_groups, kv_groups;
    int heads, tokens, kv_heads; // of an item
    int64_t total() const { return parts * query_groups * head_groups * kv_groups; }
};

// Keys here of a row's tokens before a position; numbered without gaps where other ranks hold
// some of its blocks.
inline int64_t keys_before(const shoal_batch& batch, int64_t row, int64_t position) {
    if (!batch.held_before) return position;
    const int64_t* before = batch.held_before[row];
    int64_t block = position / kBlock, rest = position % kBlock;
    bool is_here = rest && before[block + 1] > before[block];
    return before[block] * kBlock + (is_here ? rest : 0);
}

inline RowItems items_of(const shoal_model& model, const shoal_batch& batch, int64_t row) {
    int64_t query_len = batch.query_lens[row];
    int64_t num_keys = keys_before(batch, row, batch.context_lens[row]);
    int group = model.group_size;
    RowItems items;
    items.head_groups = (group + kMaxQueries - 1) / kMaxQueries;
    items.heads = int((group + items.head_groups - 1) / items.head_groups);
    items.tokens = kMaxQueries / items.heads;
    items.query_groups = (query_len + items.tokens - 1) / items.tokens;
    items.parts = query_len > kFewTokens || !num_keys ? 1 : (num_keys + kPart - 1) / kPart;
    items.kv_heads = items.parts == 1 ? 1 : kMaxKvHeads;
    items.kv_groups = (model.num_kv_heads + items.kv_heads - 1) / items.kv_heads;
    return items;
}

inline int64_t plan_attention(const shoal_model& model, const shoal_batch& batch, Scratch& scratch) {
    int64_t token = 0, item = 0, part = 0;
    for (int64_t r = 0; r <= batch.num_rows; r++) {
        scratch.row_starts[r] = token, scratch.item_starts[r] = item, scratch.part_starts[r] = part;
        if (r == batch.num_rows) break;
        RowItems items = items_of(model, batch, r);
        item += items.total();
        if (items.parts > 1) part += items.parts * batch.query_lens[r] * model.num_heads;
        for (int64_t i = 0; i < batch.query_lens[r]; i++) scratch.token_rows[token++] = r;
    }
    return part * (model.head_dim + 2);
}

// ---- reading the cache ----

template <int kKv> inline F load_kv(const void* data, int64_t at) {
    if constexpr (kKv == SHOAL_KV_F32) return load(static_cast<const float*>(data) + at);
    else if constexpr (kKv == SHOAL_KV_BF16) return load_bf16(static_cast<const uint16_t*>(data) + at);
    else return load_int8(static_cast<const int8_t*>(data) + at);
}

template <int kKv> inline F load_kv_some(const void* data, int64_t at, int n) {
    constexpr int kBytes = kKv == SHOAL_KV_F32 ? 4 : kKv == SHOAL_KV_BF16 ? 2 : 1;
    uint8_t some[kWidth * 4] = {};
    memcpy(some, static_cast<const uint8_t*>(data) + at * kBytes, size_t(n) * kBytes);
    return load_kv<kKv>(some, 0);
}

struct Item {
    const shoal_model* model;
    const shoal_layer_kv* kv;
    const int64_t* blocks; // of the row
    int64_t first_kv_head;
    int kv_heads;
    int64_t first_key, end_key; // keys that any query sees
    int64_t seen_from[kMaxQueries], seen_to[kMaxQueries];
    const float* queries; // [KV heads][head_dim][queries]
    float* out;           // [KV heads][queries][head_dim + 16]: sums of weighted values
    float most[kMaxKvHeads][kMaxQueries], total[kMaxKvHeads][kMaxQueries];

    // Where a block's keys or values of a KV head lie: an index among [block, KV head].
    int64_t place(int64_t position, int kv_head) const {
        return blocks[position / kBlock] * model->num_kv_heads + first_kv_head + kv_head;
    }
};

// Scores of one block's 16 keys for one KV head's queries.
template <int kKv, int kQueries>
inline void score_block(const Item& item, int kv_head, int64_t position, float (*scores)[kChunk]) {
    const shoal_model& model = *item.model;
    int64_t place = item.place(position, kv_head), column = position % kChunk;
    for (int half = 0; half < kBlock / kWidth; half++) {
        F even[kQueries], odd[kQueries]; // two chains: one would wait on itself
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; q++) even[q] = odd[q] = zero();
        const float* query = item.queries + kv_head * model.head_dim * kQueries;
        int64_t at = place * model.head_dim * kBlock + half * kWidth;
        int64_t end = at + model.head_dim * kBlock;
        for (; at < end; at += 2 * kBlock, query += 2 * kQueries) {
            F first = load_kv<kKv>(item.kv->keys, at);
            F second = load_kv<kKv>(item.kv->keys, at + kBlock);
#pragma GCC unroll 8
            for (int q = 0; q < kQueries; q++) {
                even[q] = fma(first, set1(query[q]), even[q]);
                odd[q] = fma(second, set1(query[kQueries + q]), odd[q]);
            }
        }
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; q++) {
            F score = add(even[q], odd[q]);
            if (kKv == SHOAL_KV_INT8)
                score = mul(score, load(item.kv->key_scales + place * kBlock + half * kWidth));
            if (float cap = model.attention_softcap; cap > 0.f)
                score = mul(set1(cap), hyperbolic_tangent(mul(score, set1(1.f / cap))));
            store(scores[q] + column + half * kWidth, score);
        }
    }
    for (int q = 0; q < kQueries; q++) // the edges of what a query sees
        if (position < item.seen_from[q] || position + kBlock > item.seen_to[q])
            for (int i = 0; i < kBlock; i++)
                if (position + i < item.seen_from[q] || position + i >= item.seen_to[q])
                    scores[q][column + i] = -INFINITY;
}

// Scores to weights e**(score - most); returns what earlier sums shrink by.
inline float weigh(float* scores, int64_t n, float* most, float* total) {
    F top = set1(-INFINITY);
    for (int64_t i = 0; i < n; i += kWidth) top = max(top, load(scores + i));
    float highest = largest(top);
    if (highest == -INFINITY) {
        memset(scores, 0, size_t(n) * 4);
        return 1.f;
    }
    if (highest < *most) highest = *most;
    F sums = zero(), floor = set1(-80.f);
    for (int64_t i = 0; i < n; i += kWidth) {
        F x = sub(load(scores + i), set1(highest));
        F weights = exponential(x);
#ifdef __AVX512F__
        weights = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, floor, _CMP_GE_OQ), weights);
#else
        weights = _mm256_and_ps(weights, _mm256_cmp_ps(x, floor, _CMP_GE_OQ));
#endif
        sums = add(sums, weights);
        store(scores + i, weights);
    }
    float shrink = *most == -INFINITY ? 0.f : expf(*most - highest);
    *most = highest;
    *total = *total * shrink + sum(sums);
    return shrink;
}

// Adds weighted values of some keys of a block to dimensions of the sums from d on: `kVectors`
// whole ones, or `rest` values.
template <int kKv, int kQueries, int kVectors>
inline void add_slice(const Item& item, int64_t place, int64_t from, int64_t to, float* out,
                      const float (*weights)[kChunk], int64_t d, int rest) {
    constexpr int kAll = kVectors ? kVectors : 1;
    int64_t head_dim = item.model->head_dim, stride = head_dim + kLanes;
    F sums[kQueries][kAll];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 4
        for (int v = 0; v < kAll; v++) sums[q][v] = load(out + q * stride + d + v * kWidth);
    int64_t at = (place * kBlock + from % kBlock) * head_dim + d, column = from % kChunk;
    for (int64_t key = from; key < to; key++, column++, at += head_dim) {
        F values[kAll];
        if (kVectors) {
#pragma GCC unroll 4
            for (int v = 0; v < kAll; v++) values[v] = load_kv<kKv>(item.kv->values, at + v * kWidth);
        } else {
            values[0] = load_kv_some<kKv>(item.kv->values, at, rest);
        }
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; q++) {
            F weight = set1(weights[q][column]);
#pragma GCC unroll 4
            for (int v = 0; v < kAll; v++) sums[q][v] = fma(values[v], weight, sums[q][v]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 4
        for (int v = 0; v < kAll; v++) store(out + q * stride + d + v * kWidth, sums[q][v]);
}

// Adds the weighted values of keys [from, to), of one block, for one KV head's queries.
template <int kKv, int kQueries>
inline void add_values(const Item& item, int kv_head, int64_t from, int64_t to,
                       const float (*weights)[kChunk]) {
    constexpr int kVectors = kWidth == 16 ? 4 : 2; // as many as leave the sums in registers
    int64_t head_dim = item.model->head_dim, d = 0, place = item.place(from, kv_head);
    float* out = item.out + kv_head * kQueries * (head_dim + kLanes);
    for (; d + kVectors * kWidth <= head_dim; d += kVectors * kWidth)
        add_slice<kKv, kQueries, kVectors>(item, place, from, to, out, weights, d, 0);
    for (; d + kWidth <= head_dim; d += kWidth)
        add_slice<kKv, kQueries, 1>(item, place, from, to, out, weights, d, 0);
    if (d < head_dim)
        add_slice<kKv, kQueries, 0>(item, place, from, to, out, weights, d, int(head_dim - d));
}

// Turns a chunk's scores of one KV head into weights, and shrinks its earlier sums to match.
template <int kKv, int kQueries>
inline void weigh_chunk(Item& item, int kv_head, int64_t start, int64_t padded,
                        float (*scores)[kChunk]) {
    int64_t stride = item.model->head_dim + kLanes;
    for (int q = 0; q < kQueries; q++) {
        float shrink = weigh(scores[q], padded, &item.most[kv_head][q], &item.total[kv_head][q]);
        float* out = item.out + (kv_head * kQueries + q) * stride;
        if (shrink != 1.f)
            for (int64_t d = 0; d < item.model->head_dim; d += kWidth) store(out + d, mul(load(out + d), set1(shrink)));
    }
    if (kKv != SHOAL_KV_INT8) return;
    for (int64_t at = 0; at < padded; at += kWidth) {
        int64_t place = item.place(start + at, kv_head);
        F scale = load(item.kv->value_scales + place * kBlock + at % kBlock);
        for (int q = 0; q < kQueries; q++)
            store(scores[q] + at, mul(load(scores[q] + at), scale));
    }
}

template <int kKv, int kQueries> void attend(Item& item) {
    alignas(64) float scores[kMaxKvHeads][kQueries][kChunk];
    for (int64_t start = item.first_key / kChunk * kChunk; start < item.end_key; start += kChunk) {
        int64_t end = start + kChunk < item.end_key ? start + kChunk : item.end_key;
        for (int64_t at = start; at < end; at += kBlock)
            for (int h = 0; h < item.kv_heads; h++)
                score_block<kKv, kQueries>(item, h, at, scores[h]);
        for (int h = 0; h < item.kv_heads; h++)
            weigh_chunk<kKv, kQueries>(item, h, start, round_up(end - start, kBlock), scores[h]);
        for (int64_t at = start; at < end; at += kBlock) {
            int64_t from = at < item.first_key ? item.first_key : at;
            int64_t to = at + kBlock < end ? at + kBlock : end;
            if (from >= to) continue; // a whole block that no query sees
            for (int h = 0; h < item.kv_heads; h++)
                add_values<kKv, kQueries>(item, h, from, to, scores[h]);
        }
    }
}

using Attend = void (*)(Item&);
#define SHOAL_QUERIES(k) {attend<k, 1>, attend<k, 2>, attend<k, 3>, attend<k, 4>, SHOAL_MORE_QUERIES(k)}
#ifdef __AVX512F__
#define SHOAL_MORE_QUERIES(k) attend<k, 5>, attend<k, 6>
#else
#define SHOAL_MORE_QUERIES(k)
#endif
const Attend kAttend[3][kMaxQueries] = {SHOAL_QUERIES(SHOAL_KV_F32), SHOAL_QUERIES(SHOAL_KV_BF16),
                                        SHOAL_QUERIES(SHOAL_KV_INT8)};

// ---- one item ----

// Where a part's result of (token of the row, head) lies: sums [head_dim] | most | total.
inline float* part_of(const Forward& f, int64_t row, const RowItems& items, int64_t token, int64_t head,
                      int64_t part) {
    int64_t first = f.scratch.part_starts[row];
    int64_t index = first + (token * f.attended->num_heads + head) * items.parts + part;
    return f.scratch.partial + index * (f.attended->head_dim + 2);
}

// Where the heads of a token go: an input of o, or what is merged over ranks.
inline float* attention_of(const Forward& f, const shoal_layer& layer, int64_t token) {
    if (f.model->num_ranks) return f.scratch.merged + token * f.attended->num_heads * f.attended->head_dim;
    return f.scratch.attention + token * layer.o.cols + layer.o_lead;
}

constexpr float kNothingSeen = -1e30f; // as the logarithm of a sum; finite, so that sums stay so

// What a merge over ranks must know of a token's head: the logarithm of the sum of exponentials.
inline void put_sum(const Forward& f, int64_t token, int64_t head, float most, float total) {
    if (!f.model->num_ranks) return;
    int64_t at = (token * f.attended->num_heads + head) * f.model->num_ranks + f.model->rank;
    f.scratch.sums[at] = total > 0.f ? most + logf(total) : kNothingSeen;
}

inline void run_item(const Forward& f, const shoal_layer& layer, const shoal_layer_kv& kv, int64_t row,
                     int64_t index) {
    const shoal_model& model = *f.attended;
    const shoal_batch& batch = *f.batch;
    int64_t query_len = batch.query_lens[row], context_len = batch.context_lens[row];
    int64_t num_keys = keys_before(batch, row, context_len);
    RowItems items = items_of(model, batch, row);
    int64_t part = index % items.parts, rest = index / items.parts;
    int64_t query_group = rest % items.query_groups;
    rest /= items.query_groups;
    int64_t head_group = rest % items.head_groups, kv_group = rest / items.head_groups;

    int64_t first_head = head_group * items.heads, first_token = query_group * items.tokens;
    int64_t first_kv_head = kv_group * items.kv_heads;
    auto at_most = [](int64_t wanted, int64_t left) { return int(wanted < left ? wanted : left); };
    int tokens = at_most(items.tokens, query_len - first_token);
    int kv_heads = at_most(items.kv_heads, model.num_kv_heads - first_kv_head);
    // Some query heads of the first and of the last KV head may be another rank's.
    int64_t base = first_kv_head * model.group_size - model.head_offset; // the item's KV heads begin
    int64_t end_head = at_most(model.group_size, first_head + items.heads);
    if (kv_heads == 1) {
        if (first_head < -base) first_head = -base;
        end_head = at_most(end_head, model.num_heads - base);
    }
    int heads = int(end_head - first_head);
    if (heads <= 0) return;
    int queries = heads * tokens;
    int64_t from = items.parts > 1 ? part * kPart : 0;
    int64_t to = items.parts > 1 && from + kPart < num_keys ? from + kPart : num_keys;

    Item item = {&model, &kv, batch.block_tables[row], first_kv_head, kv_heads,
                 to, from, {}, {}, nullptr, nullptr, {}, {}};
    for (int q = 0; q < queries; q++) {
        int64_t position = context_len - query_len + first_token + q / heads;
        int64_t oldest = layer.window > 0 && position >= layer.window ? position - layer.window + 1 : 0;
        int64_t seen_from = keys_before(batch, row, oldest);
        int64_t seen_to = keys_before(batch, row, position + 1);
        item.seen_from[q] = seen_from > from ? seen_from : from;
        item.seen_to[q] = seen_to < to ? seen_to : to;
        if (item.seen_from[q] < item.first_key) item.first_key = item.seen_from[q];
        if (item.seen_to[q] > item.end_key) item.end_key = item.seen_to[q];
    }
    // Token and head (among this rank's, if it is one) of a query of a KV head.
    auto token_of = [&](int q) { return first_token + q / heads; };
    auto head_of = [&](int h, int q) {
        return base + h * model.group_size + first_head + q % heads;
    };
    auto is_own = [&](int64_t head) { return head >= 0 && head < model.num_heads; };

    int64_t stride = model.head_dim + kLanes, first_row = f.scratch.row_starts[row];
    int64_t qkv_stride = int64_t(model.num_heads + 2 * model.num_kv_heads) * model.head_dim;
    alignas(64) float transposed[kMaxKvHeads * kMaxQueries * kMaxHeadDim];
    alignas(64) float out[kMaxKvHeads * kMaxQueries * (kMaxHeadDim + kLanes)];
    memset(out, 0, size_t(kv_heads * queries * stride) * 4);
    for (int h = 0; h < kv_heads; h++) {
        for (int q = 0; q < queries; q++) {
            item.most[h][q] = -INFINITY;
            float* column = transposed + h * model.head_dim * queries + q;
            if (!is_own(head_of(h, q))) { // its result is not kept
                for (int64_t d = 0; d < model.head_dim; d++) column[d * queries] = 0.f;
                continue;
            }
            const float* query = f.scratch.heads + (first_row + token_of(q)) * qkv_stride +
                                 head_of(h, q) * model.head_dim;
            for (int64_t d = 0; d < model.head_dim; d++) column[d * queries] = query[d];
        }
    }
    item.queries = transposed, item.out = out;
    if (item.first_key < item.end_key) kAttend[model.kv_format][queries - 1](item);

    for (int h = 0; h < kv_heads; h++) {
        for (int q = 0; q < queries; q++) {
            const float* sums = out + (h * queries + q) * stride;
            int64_t token = token_of(q), head = head_of(h, q);
            if (!is_own(head)) continue;
            if (items.parts > 1) {
                float* to_part = part_of(f, row, items, token, head, part);
                memcpy(to_part, sums, size_t(model.head_dim) * 4);
                to_part[model.head_dim] = item.most[h][q];
                to_part[model.head_dim + 1] = item.total[h][q];
                continue;
            }
            float* to_token = attention_of(f, layer, first_row + token) + head * model.head_dim;
            float inverse = item.total[h][q] > 0.f ? 1.f / item.total[h][q] : 0.f;
            put_sum(f, first_row + token, head, item.most[h][q], item.total[h][q]);
            for (int64_t d = 0; d < model.head_dim; d++) to_token[d] = sums[d] * inverse;
        }
    }
}

} // namespace
