// The C interface: picks the instruction set, keeps the buffers, starts the team.
#include <new>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "packing.h"

namespace shoal {

extern const KernelTable kTable_avx2, kTable_avx512, kTable_avx512_vnni, kTable_avx512_bf16;

namespace {

bool has(const KernelTable& table) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return false;
    if (&table == &kTable_avx2) return true;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return false;
    if (&table == &kTable_avx512) return true;
    if (!__builtin_cpu_supports("avx512vnni")) return false;
    return &table == &kTable_avx512_vnni || __builtin_cpu_supports("avx512bf16");
}

const KernelTable* find(const char* isa) {
    const KernelTable* all[] = {&kTable_avx512_bf16, &kTable_avx512_vnni, &kTable_avx512, &kTable_avx2};
    for (const KernelTable* table : all)
        if ((!isa || !strcmp(isa, table->name)) && has(*table)) return table;
    return nullptr;
}

// A buffer that grows, for one use at a time.
class Buffer {
  public:
    ~Buffer() { free(data_); }
    bool ensure(int64_t bytes) {
        if (bytes <= size_) return true;
        free(data_);
        size_ = 0;
        data_ = aligned_alloc(64, size_t(round_up(bytes, 64)));
        if (data_) size_ = bytes;
        return data_;
    }
    uint8_t* data() const { return static_cast<uint8_t*>(data_); }

  private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// Hands out parts of a buffer: once to measure (no buffer yet), once to place.
struct Carver {
    uint8_t* base;
    int64_t used = 0;
    template <typename T> void take(T*& to, int64_t count) {
        to = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * int64_t(sizeof(T)), 64);
    }
};

int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

} // namespace
} // namespace shoal

using namespace shoal;

struct shoal_context {
    const KernelTable* table;
    Team* team;
    Buffer buffer, partial;
};

namespace {

void carve_choice(Scratch& s, Carver& carver, const shoal_model& m, int64_t tokens) {
    carver.take(s.normed, tokens * m.hidden);
    carver.take(s.scores, tokens * m.num_experts);
    carver.take(s.expert_weights, tokens * m.num_active);
    carver.take(s.expert_ids, tokens * m.num_active);
}

void carve_lists(Scratch& s, Carver& carver, const shoal_model& m, int64_t tokens) {
    int64_t pairs = tokens * m.num_active;
    carver.take(s.turns, m.num_experts);
    carver.take(s.list_starts, int64_t(m.num_experts) + 3);
    carver.take(s.list_tokens, pairs);
    carver.take(s.list_weights, pairs);
    carver.take(s.expert_gated, pairs * m.expert_ffn);
    carver.take(s.expert_tiles, pairs);
}

int64_t carve(Scratch& s, uint8_t* base, const KernelTable& table, const shoal_model& m,
              const shoal_batch& b, int threads) {
    Carver carver = {base};
    int64_t tokens = b.num_tokens, rows = b.num_rows + 1;
    int64_t heads = int64_t(m.num_heads) + 2 * int64_t(m.num_kv_heads);
    int64_t pairs = tokens * m.num_active;
    int64_t widest = largest(m.hidden, largest(m.attention_width, m.ffn));
    s.row_floats = round_up(largest(widest, m.num_experts + m.num_expert_groups), 16);
    carver.take(s.qkv, tokens * heads * m.head_dim);
    carver.take(s.attention, tokens * m.attention_width);
    s.heads = s.qkv;
    if (m.num_ranks) {
        carver.take(s.heads, tokens * (m.all_heads + 2 * int64_t(m.all_kv_heads)) * m.head_dim);
        carver.take(s.merged, tokens * m.all_heads * m.head_dim);
        carver.take(s.sums, tokens * m.all_heads * m.num_ranks);
    }
    carver.take(s.gated, tokens * m.ffn);
    carver.take(s.residual, tokens * m.hidden);
    carver.take(s.cosines, tokens * m.num_ropes * (m.head_dim / 2));
    carver.take(s.sines, tokens * m.num_ropes * (m.head_dim / 2));
    carver.take(s.row, threads * s.row_floats);
    carver.take(s.inputs, largest(table.input_bytes(tokens, widest),
                                  table.input_bytes(pairs, largest(m.hidden, m.expert_ffn))));
    carver.take(s.head_squares, m.norm_heads ? 2 * tokens : 0);
    if (m.num_experts) carve_choice(s, carver, m, tokens), carve_lists(s, carver, m, tokens);
    carver.take(s.token_rows, tokens);
    carver.take(s.row_starts, rows);
    carver.take(s.item_starts, rows);
    carver.take(s.part_starts, rows);
    carver.take(s.work, int64_t(m.num_layers) * kPhasesPerLayer + kOtherPhases);
    return carver.used;
}

int64_t carve_served(Scratch& s, uint8_t* base, const KernelTable& table, const shoal_model& m,
                     int64_t tokens) {
    Carver carver = {base};
    carve_lists(s, carver, m, tokens);
    carver.take(s.inputs, table.input_bytes(tokens * m.num_active, largest(m.hidden, m.expert_ffn)));
    carver.take(s.work, kPhasesPerLayer);
    return carver.used;
}

} // namespace

int32_t shoal_cpu_abi(void) { return SHOAL_CPU_ABI; }

const char* shoal_cpu_best_isa(void) {
    const KernelTable* table = find(nullptr);
    return table ? table->name : nullptr;
}

shoal_context* shoal_cpu_create(int32_t num_threads, const char* isa) {
    const KernelTable* table = find(isa);
    Team* team = table && num_threads > 0 ? team_create(num_threads) : nullptr;
    if (!team) return nullptr;
    auto* context = new (std::nothrow) shoal_context{table, team, {}, {}};
    if (!context) team_destroy(team);
    return context;
}

void shoal_cpu_destroy(shoal_context* context) {
    team_destroy(context->team);
    delete context;
}

int32_t shoal_cpu_forward(shoal_context* context, const shoal_model* model, const shoal_layer_kv* kv,
                          const shoal_batch* batch, const shoal_ends* ends, float* hidden) {
    shoal_model attended = *model;
    if (model->num_ranks) {
        attended.num_heads = model->all_heads, attended.num_kv_heads = model->all_kv_heads;
        attended.head_offset = 0;
    }
    Forward f = {context->team, model, &attended, kv, batch, ends, hidden, {}, nullptr, nullptr};
    const KernelTable& table = *context->table;
    int threads = team_size(context->team);
    int64_t bytes = carve(f.scratch, nullptr, table, *model, *batch, threads);
    if (!context->buffer.ensure(bytes)) return -1;
    carve(f.scratch, context->buffer.data(), table, *model, *batch, threads);
    memset(f.scratch.work, 0, sizeof(Work) * (size_t(model->num_layers) * kPhasesPerLayer + kOtherPhases));
    if (!context->partial.ensure(table.plan(&attended, batch, &f.scratch) * 4)) return -1;
    f.scratch.partial = reinterpret_cast<float*>(context->partial.data());
    team_run(context->team, table.forward, &f);
    return f.failed_at ? -2 : 0;
}

int32_t shoal_cpu_experts(shoal_context* context, const shoal_model* model, const shoal_experts* experts,
                          int32_t num_tokens, const float* x, const int64_t* ids, const float* weights,
                          float* out) {
    shoal_batch batch = {num_tokens, 0, nullptr, nullptr, nullptr, nullptr};
    Forward f = {context->team, model, model, nullptr, &batch, nullptr, nullptr, {}, nullptr, experts};
    const KernelTable& table = *context->table;
    if (!context->buffer.ensure(carve_served(f.scratch, nullptr, table, *model, num_tokens))) return -1;
    carve_served(f.scratch, context->buffer.data(), table, *model, num_tokens);
    memset(f.scratch.work, 0, sizeof(Work) * kPhasesPerLayer);
    f.scratch.normed = const_cast<float*>(x); // they are only read
    f.scratch.expert_ids = const_cast<int64_t*>(ids);
    f.scratch.expert_weights = const_cast<float*>(weights);
    f.scratch.residual = out;
    team_run(context->team, table.experts, &f);
    return f.failed_at ? -2 : 0;
}

int32_t shoal_cpu_linear(shoal_context* context, const shoal_weight* weight, const float* x,
                         int32_t num_tokens, float* out) {
    Linear l = {context->team, weight, x, num_tokens, out, {}};
    Carver carver = {nullptr};
    int64_t bytes = context->table->input_bytes(num_tokens, weight->cols);
    if (!context->buffer.ensure(bytes + 128)) return -1;
    carver.base = context->buffer.data();
    carver.take(l.scratch.work, 2);
    carver.take(l.scratch.inputs, bytes);
    memset(l.scratch.work, 0, 2 * sizeof(Work));
    team_run(context->team, context->table->linear, &l);
    return 0;
}

namespace {

constexpr int64_t kNoiseRun = 4096; // token ids that a thread takes at once

struct Noise {
    const KernelTable* table;
    Team* team;
    float* logits;
    int64_t num_rows, n, first_id;
    const uint64_t* seeds;
    const int64_t* positions;
};

void noise_share(void* argument, int thread) {
    auto& noise = *static_cast<Noise*>(argument);
    int64_t runs = (noise.n + kNoiseRun - 1) / kNoiseRun;
    for (int64_t i = thread; i < noise.num_rows * runs; i += team_size(noise.team)) {
        int64_t row = i / runs, first = i % runs * kNoiseRun, left = noise.n - first;
        noise.table->add_gumbel(noise.logits + row * noise.n + first, noise.first_id + first,
                                left < kNoiseRun ? left : kNoiseRun, noise.seeds[row],
                                noise.positions[row]);
    }
}

} // namespace

void shoal_cpu_add_gumbel(shoal_context* context, float* logits, int64_t num_rows, int64_t n,
                          int64_t first_id, const uint64_t* seeds, const int64_t* positions) {
    Noise noise = {context->table, context->team, logits, num_rows, n, first_id, seeds, positions};
    team_run(context->team, noise_share, &noise);
}

namespace {

struct Read {
    Team* team;
    const uint64_t* data;
    int64_t words;
    uint64_t sums[256][8];
};

void read_share(void* argument, int thread) {
    auto& read = *static_cast<Read*>(argument);
    int64_t share = read.words / team_size(read.team) / 8 * 8;
    const uint64_t* at = read.data + thread * share;
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < share; i += 8) {
        __builtin_prefetch(at + i + 256);
        for (int j = 0; j < 8; j++) sums[j] += at[i + j];
    }
    memcpy(read.sums[thread % 256], sums, sizeof sums);
}

} // namespace

uint64_t shoal_cpu_read(shoal_context* context, const uint8_t* data, int64_t bytes) {
    Read read = {context->team, reinterpret_cast<const uint64_t*>(data), bytes / 8, {}};
    team_run(context->team, read_share, &read);
    uint64_t total = 0;
    for (auto& sums : read.sums)
        for (uint64_t each : sums) total += each;
    return total;
}
