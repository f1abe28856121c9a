// What the dispatcher (api.cpp) and the code of each instruction set share.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "shoal_cpu.h"

namespace shoal {

// A team of threads that runs one function at a time, the caller among them.
class Team;
Team* team_create(int num_threads);
void team_destroy(Team*);
void team_run(Team*, void (*function)(void* argument, int thread), void* argument);
// Inside a function that the team runs: wait until all have come here; or come, do something
// else while the others are under way, and wait then.
void team_barrier(Team*);
uint32_t team_arrive(Team*);
bool team_is_over(Team*, uint32_t round);
void team_wait(Team*, uint32_t round);
int team_size(const Team*);

// A number of equal pieces of work that threads take from until none is left.
struct alignas(64) Work {
    int64_t taken;
};

// Some tokens of an expert's list, and of an expert: its tokens, which of them are this rank's,
// where its list begins, and how many went by.
struct ExpertTile {
    int32_t slot, first, size;
};
struct ExpertTurn {
    int64_t tokens, first, last, list, seen;
};

// Buffers of one forward pass, made by api.cpp for `tokens`.
struct Scratch {
    float *qkv, *attention, *gated, *residual; // [tokens, ...]; residual: a branch before its norm
    float* heads;         // q, k and v that attention works on: qkv, or of all ranks' heads
    float *merged, *sums; // [tokens, heads of all ranks, ...] where KV is split by token ranges
    float *cosines, *sines;                    // [ropes, tokens, head_dim / 2]
    float* row;         // [threads, row_floats] one token's values, of each thread
    int64_t row_floats; // the widest of any layer
    uint8_t* inputs;    // a matrix product's input, in tiles (see matmul.h)
    float* partial;     // attention over parts of long contexts (see attention.h)
    float *normed, *scores, *expert_weights; // [tokens, ...] of layers with experts
    int64_t* expert_ids;                     // [tokens, active]
    ExpertTurn* turns;                       // [experts]
    // [shares + 3]: where each share's list begins; the end; how many tiles; which shares are in memory
    int64_t* list_starts;
    int64_t* list_tokens;                    // [pairs of a token and an expert], expert by expert
    float *list_weights, *expert_gated;      // likewise
    ExpertTile* expert_tiles;
    float* head_squares;                     // [tokens, 2] of all heads of q, and of k
    int64_t* token_rows;                            // [tokens] the row of each token
    int64_t *row_starts, *item_starts, *part_starts; // [rows + 1] tokens, work, parts before a row
    Work* work;                                     // one for each phase, zeroed
};

constexpr int kMaxHeadDim = 512;
constexpr int kPhasesPerLayer = 40, kOtherPhases = 6;

struct Forward {
    Team* team;
    const shoal_model* model;
    const shoal_model* attended; // with the heads that attention is computed of here
    const shoal_layer_kv* kv;
    const shoal_batch* batch;
    const shoal_ends* ends;
    float* hidden;
    Scratch scratch;
    // The work of the call that failed. The first thread alone writes it, and may be as far as one
    // barrier ahead of the others: each looks whether it was its own last call.
    mutable const Work* failed_at;
    const shoal_experts* served; // of tokens from other ranks; null: layers are run
};

struct Linear {
    Team* team;
    const shoal_weight* weight;
    const float* x;
    int64_t num_tokens;
    float* out;
    Scratch scratch;
};

// One instruction set's code; the functions are run by every thread of a team.
struct KernelTable {
    const char* name;
    void (*forward)(void* forward, int thread);
    void (*experts)(void* forward, int thread);
    void (*linear)(void* linear, int thread);
    void (*add_gumbel)(float* logits, int64_t first, int64_t n, uint64_t seed, int64_t position);
    int64_t (*input_bytes)(int64_t tokens, int64_t cols); // of Scratch::inputs, any format
    // Fills row_starts, item_starts and part_starts; returns the floats of Scratch::partial.
    int64_t (*plan)(const shoal_model*, const shoal_batch*, Scratch*);
};

} // namespace shoal
