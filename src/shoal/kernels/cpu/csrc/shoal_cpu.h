// The C interface of shoal's CPU kernels: plain structs and data pointers, no Python, no torch.
//
// A weight [rows, cols] is packed for streaming (see packing.cpp): 16 rows make a panel, and a
// panel is read front to back. `shoal_cpu_forward` runs a range of a decoder's layers over a
// ragged batch in one call; `shoal_cpu_linear` a single weight (the head).
//
// Weights may be a rank's share: some query heads and the KV heads they read, some FFN columns,
// some token ids, or none. What the ranks add up is then summed by `shoal_reduce`. A rank that has
// experts and nothing else runs them by `shoal_cpu_experts`.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#pragma GCC visibility push(default)
#endif

#define SHOAL_CPU_ABI 5

enum { SHOAL_F32 = 0, SHOAL_BF16 = 1, SHOAL_INT8 = 2, SHOAL_INT4 = 3, SHOAL_INT4_MIN = 4 };
enum { SHOAL_KV_F32 = 0, SHOAL_KV_BF16 = 1, SHOAL_KV_INT8 = 2 };
enum { SHOAL_SILU = 0, SHOAL_GELU_TANH = 1 };

typedef struct {
    const uint8_t* data; // 64-byte aligned
    int32_t format;
    int32_t rows; // as packed: gate_up counts padding between its panels
    int32_t cols;
    int32_t reserved;
} shoal_weight;

// Sums `count` floats over all ranks, in place; not 0: it failed, and the pass ends.
typedef int32_t (*shoal_reduce)(void* context, float* data, int64_t count);

// Before the products of a layer's experts: x [num_tokens, hidden] are their inputs; ids and weights
// [num_tokens, num_active] may be changed; `phase`, as of a share. Not 0: as above.
typedef int32_t (*shoal_routed)(void* context, int32_t layer, int32_t num_tokens, int64_t phase,
                                const float* x, int64_t* ids, float* weights);
// After them: adds to `out` [num_tokens, hidden]. Not 0: as above.
typedef int32_t (*shoal_returned)(void* context, int32_t num_tokens, float* out);

// Some of the tokens that go to an expert: of n, those from (n start + phase) >> 16 on, up to
// (n stop + phase) >> 16.
typedef struct {
    int32_t expert, start, stop;
} shoal_share;

// Brings experts into memory, where not all are: sets `data` of the weights of those from `first` on
// that have tokens (share i has those from list_starts[i] on, up to list_starts[i + 1]), of as many as
// there is room for, and returns which one comes next; they stay until the next call. -1: it failed,
// and the pass ends.
struct shoal_experts;
typedef int32_t (*shoal_bring)(void* context, const struct shoal_experts*, int32_t first,
                               const int64_t* list_starts);

// Experts of a layer that this rank has. Weights are gate_up and down of each share.
typedef struct shoal_experts {
    const float* router;      // [num_experts, hidden]
    const float* shared_gate; // [hidden]; null: what the MLP beside the experts gives is added as it is
    const shoal_weight* weights;
    const shoal_share* shares;
    int64_t* counts; // [num_experts] tokens of each are added to it; null: nobody counts
    int32_t num_shares;
    int32_t layer; // of the model: moves who gets what is left over of a share
    shoal_bring bring; // null: all are in memory
    void* bring_context;
} shoal_experts;

// Pointers may be null where the model has no such part; a weight's, where this rank has no heads
// or no FFN columns. Columns of o may begin before and end after this rank's heads: quantised ones
// come in whole groups. Inputs are zero there.
typedef struct {
    shoal_weight qkv, o, gate_up, down; // gate_up: panels of gate and of up in turn
    const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias; // gate_up_bias: in packed order
    const float *attention_norm, *qk_norm, *post_attention_norm, *ffn_norm, *post_ffn_norm;
    int32_t window; // newest tokens each token sees; 0: all
    int32_t rope;   // which row of inv_freqs
    int32_t o_lead; // columns of o before those of this rank's heads
    int32_t reserved;
    const shoal_experts* experts; // null: the MLP is all there is; else it is beside them
} shoal_layer;

typedef struct {
    int32_t hidden, num_heads, num_kv_heads, head_dim;
    int32_t ffn; // the widest of any layer
    int32_t activation;
    int32_t num_layers, num_ropes;
    float norm_eps, attention_scale, attention_softcap; // softcap 0: none
    int32_t kv_format;
    int32_t group_size;  // query heads of a KV head, on all ranks
    int32_t head_offset; // of the first KV head here, those before the first query head here
    int32_t attention_width; // most columns of any o
    // Where KV is split over ranks by token ranges (num_ranks 0: it is not): heads of all ranks,
    // the first ones here, how many ranks there are and which this one is.
    int32_t num_ranks, rank, all_heads, all_kv_heads, first_head, first_kv_head;
    // Where q and k are normed over all heads together: how many there are on all ranks; 0: by head.
    int32_t norm_heads, norm_kv_heads;
    // Experts: of a layer, of a token, and how those are chosen; 0: there are none.
    int32_t num_experts, num_active, num_expert_groups, num_active_groups, renormalises, expert_ffn;
    float expert_scale;
    const shoal_layer* layers;
    const float* inv_freqs;    // [num_ropes, head_dim / 2]
    const float* rope_factors; // [num_ropes], cos and sin are multiplied by it
    const float* final_norm;   // null: leave the hidden states as they are
    shoal_reduce reduce;       // null: there is one rank
    void* reduce_context;
    shoal_routed routed;       // null: every rank chooses for itself, and keeps all tokens
    shoal_returned returned;   // null: no tokens went to other ranks
    void* experts_context;     // of both
} shoal_model;

// KV of a layer, blocks of 16 tokens: keys [block, KV head, head_dim, 16], values
// [block, KV head, 16, head_dim]; int8 with fp32 scales [block, KV head, 16].
typedef struct {
    void *keys, *values;
    float *key_scales, *value_scales;
} shoal_layer_kv;

typedef struct {
    int32_t num_tokens, num_rows;
    const int64_t* query_lens;          // [rows]
    const int64_t* context_lens;        // [rows], new tokens included
    const int64_t* const* block_tables; // of each row: its blocks, or those that are here
    // [blocks + 1] of each row, those here before each of its blocks and its end; null: all are.
    const int64_t* const* held_before;
} shoal_batch;

typedef struct shoal_context shoal_context;

int32_t shoal_cpu_abi(void);
// Name of the best instruction set this machine has, or null: none of ours.
const char* shoal_cpu_best_isa(void);
// isa: null for the best; one the machine lacks gives null, as does a lack of memory.
shoal_context* shoal_cpu_create(int32_t num_threads, const char* isa);
void shoal_cpu_destroy(shoal_context*);

// What stands before and after the layers; any pointer may be null.
typedef struct {
    const shoal_weight* embedding; // of token ids from first_id on; null: of none
    const int64_t* token_ids;      // [num_tokens]; null: `hidden` holds what goes in
    int64_t first_id;
    float embedding_scale;
    int32_t num_samples;
    const shoal_weight* head;      // null: no logits
    const int64_t* samples;        // [num_samples] tokens of the batch whose logits are wanted
    float* logits;                 // [num_samples, head rows]
    int64_t* best;                 // [num_samples] where they are largest, the first of equals
} shoal_ends;

// hidden: [num_tokens, hidden] fp32, out (and in without token ids). Returns 0, -1 without memory,
// or -2 where one of the model's functions failed.
int32_t shoal_cpu_forward(shoal_context*, const shoal_model*, const shoal_layer_kv*,
                          const shoal_batch*, const shoal_ends*, float* hidden);
// out [num_tokens, hidden] = what these experts add to tokens x whose experts were chosen elsewhere;
// an id of num_experts is none. Shares have phase 0. Returns as above.
int32_t shoal_cpu_experts(shoal_context*, const shoal_model*, const shoal_experts*, int32_t num_tokens,
                          const float* x, const int64_t* ids, const float* weights, float* out);
// out [num_tokens, rows] = x [num_tokens, cols] times the weight's transpose.
int32_t shoal_cpu_linear(shoal_context*, const shoal_weight*, const float* x, int32_t num_tokens,
                         float* out);

// Adds Gumbel noise to logits [num_rows, n] of token ids from first_id on, in place; a row has its
// seed and position.
void shoal_cpu_add_gumbel(shoal_context*, float* logits, int64_t num_rows, int64_t n,
                          int64_t first_id, const uint64_t* seeds, const int64_t* positions);

// Bytes of a packed weight.
int64_t shoal_cpu_packed_bytes(int32_t format, int64_t rows, int64_t cols);

enum {
    SHOAL_FROM_F32 = 0,
    SHOAL_FROM_BF16 = 1,
    SHOAL_FROM_F16 = 2,
    SHOAL_FROM_Q4_0 = 3,
    SHOAL_FROM_Q4_1 = 4,
    SHOAL_FROM_Q8_0 = 5,
    SHOAL_FROM_INT8 = 6, // codes int8 [n, cols], scales and minimums fp32 [n, groups]
    SHOAL_FROM_INT4 = 7, // codes uint8 [n, cols / 2], the even column in the low four bits
};
// Puts n rows of a checkpoint at packed rows `places`. Padding stays as it is: zero it first.
// Returns -1 for a source that the format cannot take.
int32_t shoal_cpu_pack(uint8_t* data, int32_t format, int64_t cols, int32_t source, const void* rows,
                       const float* scales, const float* minimums, int64_t num_groups,
                       const int64_t* places, int64_t n);

// Reads `bytes` with every thread, to measure a machine's bandwidth; returns a checksum.
uint64_t shoal_cpu_read(shoal_context*, const uint8_t* data, int64_t bytes);

#ifdef __cplusplus
#pragma GCC visibility pop
}
#endif
