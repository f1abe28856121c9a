// Causal attention of a batch's tokens over their paged KV, flash-style: a chunk of keys at a
// time, scores never kept (arXiv 2205.14135). A row of few tokens is also cut along its context
// (flash-decoding), so that one long sequence keeps every thread busy; where depends only on the
// position, never on the batch.
//
//     item = row, KV head, some of its query heads, some of the row's tokens, part of the context
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

struct RowItems {
    int64_t parts, query_groups, head_groups;
    int heads, tokens; // of an item
    int64_t total(int64_t kv_heads) const { return parts * query_groups * head_groups * kv_heads; }
};

inline RowItems items_of(const shoal_model& model, int64_t query_len, int64_t context_len) {
    int group = model.num_heads / model.num_kv_heads;
    RowItems items;
    items.head_groups = (group + kMaxQueries - 1) / kMaxQueries;
    items.heads = int((group + items.head_groups - 1) / items.head_groups);
    items.tokens = kMaxQueries / items.heads;
    items.query_groups = (query_len + items.tokens - 1) / items.tokens;
    items.parts = query_len > kFewTokens ? 1 : (context_len + kPart - 1) / kPart;
    return items;
}

inline int64_t plan_attention(const shoal_model& model, const shoal_batch& batch, Scratch& scratch) {
    int64_t token = 0, item = 0, part = 0;
    for (int64_t r = 0; r <= batch.num_rows; r++) {
        scratch.row_starts[r] = token, scratch.item_starts[r] = item, scratch.part_starts[r] = part;
        if (r == batch.num_rows) break;
        RowItems items = items_of(model, batch.query_lens[r], batch.context_lens[r]);
        item += items.total(model.num_kv_heads);
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
    int64_t kv_head;
    int64_t first_key, end_key;        // keys that any query sees
    int64_t seen_from[kMaxQueries], seen_to[kMaxQueries];
    const float* queries; // [head_dim][queries]
    float* out;           // [queries][head_dim + kWidth]: sums of weighted values
    float most[kMaxQueries], total[kMaxQueries];
};

// Scores of one block's 16 keys.
template <int kKv, int kQueries>
inline void score_block(const Item& item, int64_t position, float (*scores)[kChunk],
                        int64_t position_in_chunk) {
    const shoal_model& model = *item.model;
    int64_t head = item.blocks[position / kBlock] * model.num_kv_heads + item.kv_head;
    int64_t base = head * model.head_dim * kBlock;
    for (int half = 0; half < kBlock / kWidth; half++) {
        F even[kQueries], odd[kQueries]; // two chains: one would wait on itself
#pragma GCC unroll 8
        for (int q = 0; q < kQueries; q++) even[q] = odd[q] = zero();
        const float* query = item.queries;
        int64_t at = base + half * kWidth, end = at + model.head_dim * kBlock;
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
                score = mul(score, load(item.kv->key_scales + head * kBlock + half * kWidth));
            if (float cap = model.attention_softcap; cap > 0.f)
                score = mul(set1(cap), hyperbolic_tangent(mul(score, set1(1.f / cap))));
            store(scores[q] + position_in_chunk + half * kWidth, score);
        }
    }
    for (int q = 0; q < kQueries; q++) // the edges of what a query sees
        if (position < item.seen_from[q] || position + kBlock > item.seen_to[q])
            for (int i = 0; i < kBlock; i++)
                if (position + i < item.seen_from[q] || position + i >= item.seen_to[q])
                    scores[q][position_in_chunk + i] = -INFINITY;
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

// Adds weighted values of some keys to dimensions [d, d + 16 n) of the sums. `kVectors` of them are
// whole, and `rest` values follow.
template <int kKv, int kQueries, int kVectors>
inline void add_slice(const Item& item, int64_t from, int64_t to, const float (*weights)[kChunk],
                      const float* shrink, int64_t d, int rest) {
    constexpr int kAll = kVectors ? kVectors : 1;
    const shoal_model& model = *item.model;
    int64_t head_dim = model.head_dim, stride = head_dim + kLanes;
    F sums[kQueries][kAll];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 4
        for (int v = 0; v < kAll; v++)
            sums[q][v] = mul(load(item.out + q * stride + d + v * kWidth), set1(shrink[q]));
    for (int64_t key = from; key < to;) {
        int64_t head = item.blocks[key / kBlock] * model.num_kv_heads + item.kv_head;
        int64_t at = (head * kBlock + key % kBlock) * head_dim + d;
        int64_t end = key / kBlock * kBlock + kBlock;
        for (end = end < to ? end : to; key < end; key++, at += head_dim) {
            F values[kAll];
            if (kVectors) {
#pragma GCC unroll 4
                for (int v = 0; v < kAll; v++) values[v] = load_kv<kKv>(item.kv->values, at + v * kWidth);
            } else {
                values[0] = load_kv_some<kKv>(item.kv->values, at, rest);
            }
#pragma GCC unroll 8
            for (int q = 0; q < kQueries; q++) {
                F weight = set1(weights[q][key % kChunk]);
#pragma GCC unroll 4
                for (int v = 0; v < kAll; v++) sums[q][v] = fma(values[v], weight, sums[q][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; q++)
#pragma GCC unroll 4
        for (int v = 0; v < kAll; v++) store(item.out + q * stride + d + v * kWidth, sums[q][v]);
}

template <int kKv, int kQueries>
inline void add_values(const Item& item, int64_t from, int64_t to, const float (*weights)[kChunk],
                       const float* shrink) {
    constexpr int kVectors = kWidth == 16 ? 4 : 2; // as many as leave the sums in registers
    int64_t head_dim = item.model->head_dim, d = 0;
    for (; d + kVectors * kWidth <= head_dim; d += kVectors * kWidth)
        add_slice<kKv, kQueries, kVectors>(item, from, to, weights, shrink, d, 0);
    for (; d + kWidth <= head_dim; d += kWidth)
        add_slice<kKv, kQueries, 1>(item, from, to, weights, shrink, d, 0);
    if (d < head_dim)
        add_slice<kKv, kQueries, 0>(item, from, to, weights, shrink, d, int(head_dim - d));
}

template <int kKv, int kQueries> void attend(Item& item) {
    const shoal_model& model = *item.model;
    int64_t start = item.first_key / kChunk * kChunk;
    alignas(64) float scores[kQueries][kChunk];
    float shrink[kQueries];
    for (; start < item.end_key; start += kChunk) {
        int64_t end = start + kChunk < item.end_key ? start + kChunk : item.end_key;
        int64_t padded = round_up(end - start, kBlock);
        for (int64_t at = 0; at < padded; at += kBlock)
            score_block<kKv, kQueries>(item, start + at, scores, at);
        for (int q = 0; q < kQueries; q++)
            shrink[q] = weigh(scores[q], padded, &item.most[q], &item.total[q]);
        if (kKv == SHOAL_KV_INT8) {
            for (int64_t at = 0; at < padded; at += kWidth) {
                int64_t block = item.blocks[(start + at) / kBlock];
                int64_t head = block * model.num_kv_heads + item.kv_head;
                F scale = load(item.kv->value_scales + head * kBlock + at % kBlock);
                for (int q = 0; q < kQueries; q++)
                    store(scores[q] + at, mul(load(scores[q] + at), scale));
            }
        }
        int64_t from = start < item.first_key ? item.first_key : start;
        add_values<kKv, kQueries>(item, from, end, scores, shrink);
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
    int64_t index = first + (token * f.model->num_heads + head) * items.parts + part;
    return f.scratch.partial + index * (f.model->head_dim + 2);
}

inline void run_item(const Forward& f, const shoal_layer& layer, const shoal_layer_kv& kv, int64_t row,
                     int64_t index) {
    const shoal_model& model = *f.model;
    int64_t query_len = f.batch->query_lens[row], context_len = f.batch->context_lens[row];
    RowItems items = items_of(model, query_len, context_len);
    int64_t part = index % items.parts, rest = index / items.parts;
    int64_t query_group = rest % items.query_groups;
    rest /= items.query_groups;
    int64_t head_group = rest % items.head_groups, kv_head = rest / items.head_groups;

    int group = model.num_heads / model.num_kv_heads;
    int64_t first_head = head_group * items.heads, first_token = query_group * items.tokens;
    int heads = int(first_head + items.heads <= group ? items.heads : group - first_head);
    int tokens = int(first_token + items.tokens <= query_len ? items.tokens : query_len - first_token);
    if (heads <= 0) return;
    int queries = heads * tokens;
    int64_t from = items.parts > 1 ? part * kPart : 0;
    int64_t to = items.parts > 1 && from + kPart < context_len ? from + kPart : context_len;

    Item item = {&model, &kv, f.batch->block_tables[row], kv_head,
                 to, from, {}, {}, nullptr, nullptr, {}, {}};
    int64_t stride = model.head_dim + kLanes;
    alignas(64) float transposed[kMaxHeadDim * kMaxQueries];
    alignas(64) float out[kMaxQueries * (kMaxHeadDim + kLanes)];
    memset(out, 0, size_t(queries) * size_t(stride) * 4);
    int64_t qkv_stride = int64_t(model.num_heads + 2 * model.num_kv_heads) * model.head_dim;
    for (int q = 0; q < queries; q++) {
        int64_t token = first_token + q / heads, head = kv_head * group + first_head + q % heads;
        int64_t position = context_len - query_len + token;
        int64_t oldest = layer.window > 0 && position >= layer.window ? position - layer.window + 1 : 0;
        item.seen_from[q] = oldest > from ? oldest : from;
        item.seen_to[q] = position + 1 < to ? position + 1 : to;
        if (item.seen_from[q] < item.first_key) item.first_key = item.seen_from[q];
        if (item.seen_to[q] > item.end_key) item.end_key = item.seen_to[q];
        item.most[q] = -INFINITY;
        const float* query = f.scratch.qkv + (f.scratch.row_starts[row] + token) * qkv_stride +
                             head * model.head_dim;
        for (int64_t d = 0; d < model.head_dim; d++) transposed[d * queries + q] = query[d];
    }
    item.queries = transposed, item.out = out;
    if (item.first_key < item.end_key) kAttend[model.kv_format][queries - 1](item);

    for (int q = 0; q < queries; q++) {
        int64_t token = first_token + q / heads, head = kv_head * group + first_head + q % heads;
        if (items.parts > 1) {
            float* to_part = part_of(f, row, items, token, head, part);
            memcpy(to_part, out + q * stride, size_t(model.head_dim) * 4);
            to_part[model.head_dim] = item.most[q], to_part[model.head_dim + 1] = item.total[q];
            continue;
        }
        float* to_token = f.scratch.attention +
                          ((f.scratch.row_starts[row] + token) * model.num_heads + head) * model.head_dim;
        float inverse = 1.f / item.total[q];
        for (int64_t d = 0; d < model.head_dim; d++) to_token[d] = out[q * stride + d] * inverse;
    }
}

// The parts of one token's heads, put together where its output belongs.
inline void merge_parts(const Forward& f, int64_t token) {
    const shoal_model& model = *f.model;
    int64_t row = f.scratch.token_rows[token], in_row = token - f.scratch.row_starts[row];
    RowItems items = items_of(model, f.batch->query_lens[row], f.batch->context_lens[row]);
    if (items.parts == 1) return;
    for (int64_t head = 0; head < model.num_heads; head++) {
        float* to = f.scratch.attention + (token * model.num_heads + head) * model.head_dim;
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
        for (int64_t d = 0; d < model.head_dim; d++) to[d] /= total;
    }
}

} // namespace
