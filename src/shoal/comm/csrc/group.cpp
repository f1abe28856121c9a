// The ranks of an instance on one host, over memory they share: sums, gathers and exchanges.
//
//     Header | a Rank each | per rank two slots of kSlotBytes
//
// A rank copies its piece into a slot of its own, publishes a tag, waits until all tags are there
// and reads the others' slots. Slots alternate by round: nobody is more than a round ahead, since
// a round needs everybody's tag. Small messages take one round trip: all ranks add up all slots,
// in rank order, so all have the same bits. Large ones two: each rank adds up its part of the
// piece, then all copy the sums. Parts for one rank each go with a table of their sizes, the same
// on every piece; who reads copies its own.
//
// Who waits spins, because the others are microseconds away, yields, then sleeps on its bell; where
// it waited long the last time, it sleeps at once, as who yields a core may not get it back soon.
// Knows nothing of models, Python or torch.
#include "stretch.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <linux/futex.h>
#include <new>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kAbi = 2;
constexpr int64_t kSlotBytes = 256 << 10; // both slots of two ranks fit a core's L2
constexpr int64_t kOneShotBytes = 64 << 10;
constexpr int kSpins = 200; // about 10 us
constexpr int64_t kYieldNs = 100'000;
constexpr int64_t kLongWaitNs = 200'000; // more than a short one and being woken take
constexpr int64_t kMostBytes = 1LL << 40; // of a part; more is a mistake
constexpr uint64_t kParts = ~0ULL; // what a rank says of a piece that holds parts
constexpr int kTagBits = 44; // of a tag, for the count; the incarnation is above

enum Status : int32_t { kDone = 0, kAborted = 1, kLate = 2, kUnlike = 3 };

struct alignas(64) Header {
    std::atomic<uint32_t> valid_from; // incarnations before it have failed
};

struct alignas(64) Rank {
    std::atomic<uint64_t> tag;     // incarnation, and what it has published in it
    std::atomic<uint64_t> what[2]; // bytes of its even and odd piece, and whether they are summed
    std::atomic<uint32_t> awaits;  // 1 + the rank it sleeps for
    std::atomic<uint32_t> bell;    // futex: rung by that rank, and by an abort
};

static_assert(std::atomic<uint64_t>::is_always_lock_free);

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t old, int64_t timeout_ns) {
    timespec timeout = to_timespec(timeout_ns);
    syscall(SYS_futex, word, FUTEX_WAIT, old, &timeout, nullptr, 0);
}

void ring(Rank& rank) {
    rank.bell.fetch_add(1);
    syscall(SYS_futex, &rank.bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void add(float* __restrict total, const float* __restrict part, int64_t count) {
    for (int64_t i = 0; i < count; i++) total[i] += part[i];
}

void add(float* __restrict total, const float* __restrict first, const float* __restrict second,
         int64_t count) {
    for (int64_t i = 0; i < count; i++) total[i] = first[i] + second[i];
}

class Group {
  public:
    Group(void* memory, int rank, int size, int64_t deadline_ns)
        : header_(static_cast<Header*>(memory)), ranks_(reinterpret_cast<Rank*>(header_ + 1)),
          slots_(reinterpret_cast<char*>(ranks_ + size)), rank_(rank), size_(size),
          deadline_ns_(deadline_ns), leaving_(size), coming_(size), starts_(size) {}

    static int64_t bytes(int size) {
        int64_t bytes = sizeof(Header) + size * (sizeof(Rank) + 2 * kSlotBytes);
        return (bytes + kSlotBytes - 1) / kSlotBytes * kSlotBytes; // whole pages, of any size
    }

    Status all_reduce(float* data, int64_t count) {
        if (size_ == 1) return kDone;
        pay();
        Status status = kDone;
        constexpr int64_t kPiece = kSlotBytes / sizeof(float);
        for (int64_t at = 0; at < count && status == kDone; at += kPiece) {
            int64_t piece = std::min(count - at, kPiece);
            bool is_small = piece * int64_t(sizeof(float)) <= kOneShotBytes;
            status = is_small ? reduce_at_once(data + at, piece) : reduce_in_two(data + at, piece);
        }
        begin();
        return status;
    }

    Status all_gather(const char* mine, int64_t bytes, char* all) {
        pay();
        Status status = kDone;
        for (int64_t at = 0; at < bytes && status == kDone; at += kSlotBytes) {
            int64_t piece = std::min(bytes - at, kSlotBytes);
            lay_out(mine + at, piece, false);
            if ((status = meet()) != kDone) break;
            for (int r = 0; r < size_; r++) memcpy(all + r * bytes + at, slot(r), piece);
            status = unless_aborted();
        }
        begin();
        return status;
    }

    // What is for rank r are leaving[r] bytes; says how many come from each. `parts` must stay
    // until `take_parts`, the next call.
    Status send_parts(const char* parts, const int64_t* leaving, int64_t* coming) {
        pay();
        parts_ = parts, longest_ = 0;
        leaving_.assign(leaving, leaving + size_);
        lay_out_parts(0);
        if (Status status = meet(); status != kDone) return status;
        for (int r = 0; r < size_; r++) {
            auto table = reinterpret_cast<const int64_t*>(slot(r));
            int64_t total = 0;
            for (int to = 0; to < size_; to++) {
                if (table[to] < 0 || table[to] > kMostBytes) return fail(kUnlike);
                if (to == rank_) starts_[r] = total, coming[r] = coming_[r] = table[to];
                total += table[to];
            }
            longest_ = std::max(longest_, total);
        }
        return unless_aborted();
    }

    // What came, in the order of ranks.
    Status take_parts(char* all) {
        fetch_parts(0, all);
        Status status = unless_aborted();
        for (int64_t at = room(); at < longest_ && status == kDone; at += room()) {
            lay_out_parts(at);
            if ((status = meet()) != kDone) break;
            fetch_parts(at, all);
            status = unless_aborted();
        }
        begin();
        return status;
    }

    void abort() { fail_before(incarnation_.load() + 1); }

    void reset(uint32_t incarnation) {
        incarnation_.store(incarnation);
        published_ = 0, round_ = 0;
        fail_before(incarnation);
    }

    void pay() {
        stretch_.pay([this] { return has_failed(); });
        came_ns_ = now_ns(CLOCK_MONOTONIC);
    }

    void begin() {
        waited_ns_ += now_ns(CLOCK_MONOTONIC) - came_ns_;
        stretch_.begin();
    }

    // What collectives took in all, waiting for other ranks most of all.
    int64_t waited_ns() const { return waited_ns_; }

    void set_speed(double speed) { stretch_.set_speed(speed); }

    Header* memory() { return header_; }

    int size() const { return size_; }

  private:
    Status reduce_at_once(float* data, int64_t count) {
        lay_out(data, count * sizeof(float), true);
        if (Status status = meet(); status != kDone) return status;
        add(data, floats(0), floats(1), count);
        for (int r = 2; r < size_; r++) add(data, floats(r), count);
        return unless_aborted();
    }

    Status reduce_in_two(float* data, int64_t count) {
        lay_out(data, count * sizeof(float), true);
        if (Status status = meet(); status != kDone) return status;
        // Nobody else reads this rank's part of its own slot, so the sums go there.
        int64_t start = part(count, rank_), stop = part(count, rank_ + 1);
        float* sums = data + start;
        add(sums, floats(0) + start, floats(1) + start, stop - start);
        for (int r = 2; r < size_; r++) add(sums, floats(r) + start, stop - start);
        memcpy(floats(rank_) + start, sums, (stop - start) * sizeof(float));
        if (Status status = meet(); status != kDone) return status;
        for (int r = 0; r < size_; r++) {
            int64_t from = part(count, r), to = part(count, r + 1);
            if (r != rank_) memcpy(data + from, floats(r) + from, (to - from) * sizeof(float));
        }
        return unless_aborted();
    }

    // Whole cache lines for each rank.
    int64_t part(int64_t count, int rank) const {
        constexpr int64_t kLine = 64 / sizeof(float);
        return rank == size_ ? count : count / kLine * rank / size_ * kLine;
    }

    void lay_out(const void* piece, int64_t bytes, bool is_summed) {
        round_++;
        memcpy(slot(rank_), piece, bytes);
        ranks_[rank_].what[round_ % 2].store(bytes * 2 + is_summed, std::memory_order_relaxed);
    }

    // Bytes of parts in a piece, behind the table.
    int64_t room() const { return kSlotBytes - size_ * int64_t(sizeof(int64_t)); }

    void lay_out_parts(int64_t at) {
        round_++;
        int64_t total = 0;
        for (int64_t bytes : leaving_) total += bytes;
        memcpy(slot(rank_), leaving_.data(), size_ * sizeof(int64_t));
        if (at < total)
            memcpy(slot(rank_) + kSlotBytes - room(), parts_ + at, std::min(total - at, room()));
        ranks_[rank_].what[round_ % 2].store(kParts, std::memory_order_relaxed);
    }

    void fetch_parts(int64_t at, char* to) {
        for (int r = 0; r < size_; to += coming_[r++]) {
            int64_t first = std::max(starts_[r], at);
            int64_t last = std::min(starts_[r] + coming_[r], at + room());
            const char* from = slot(r) + kSlotBytes - room() - at;
            if (first < last) memcpy(to + first - starts_[r], from + first, last - first);
        }
    }

    // Says that this rank is there, and waits until all are.
    Status meet() {
        Rank& self = ranks_[rank_];
        uint64_t tag = (uint64_t(incarnation_.load()) << kTagBits) + ++published_;
        uint64_t what = self.what[round_ % 2].load(std::memory_order_relaxed);
        self.tag.store(tag); // in one order with the sleepers' `awaits`, or one is missed
        for (int r = 0; r < size_; r++)
            if (ranks_[r].awaits.load() == uint32_t(rank_ + 1)) ring(ranks_[r]);
        for (int r = 0; r < size_; r++) {
            if (r == rank_) continue;
            if (Status status = await(r, tag); status != kDone) return status;
            if (ranks_[r].what[round_ % 2].load(std::memory_order_relaxed) != what)
                return has_failed() ? kAborted : fail(kUnlike);
        }
        return unless_aborted();
    }

    Status await(int other, uint64_t tag) {
        auto& there = ranks_[other].tag;
        for (int i = 0; i < kSpins; i++) {
            if (there.load(std::memory_order_acquire) >= tag) return kDone;
            if (has_failed()) return kAborted;
            pause_briefly();
        }
        bool& was_long = was_long_[round_ % 2];
        int64_t from_ns = now_ns(CLOCK_MONOTONIC);
        while (!was_long && now_ns(CLOCK_MONOTONIC) - from_ns < kYieldNs) { // it may need this core
            if (there.load(std::memory_order_acquire) >= tag) return kDone;
            if (has_failed()) return kAborted;
            sched_yield();
        }
        Status status = sleep_until_there(other, tag, from_ns + deadline_ns_);
        was_long = now_ns(CLOCK_MONOTONIC) - from_ns > kLongWaitNs;
        return status;
    }

    Status sleep_until_there(int other, uint64_t tag, int64_t deadline_ns) {
        Rank& self = ranks_[rank_];
        stretch_.doze();
        self.awaits.store(other + 1);
        Status status = kDone;
        while (status == kDone) {
            uint32_t rung = self.bell.load();
            if (ranks_[other].tag.load() >= tag) break;
            int64_t left_ns = deadline_ns - now_ns(CLOCK_MONOTONIC);
            if (has_failed()) status = kAborted;
            else if (left_ns <= 0) status = fail(kLate);
            else futex_wait(&self.bell, rung, left_ns);
        }
        self.awaits.store(0);
        return status;
    }

    bool has_failed() const { return header_->valid_from.load() > incarnation_.load(); }

    Status unless_aborted() const { return has_failed() ? kAborted : kDone; }

    // What went wrong leaves the ranks at different places: nothing goes on before a reset.
    Status fail(Status status) {
        abort();
        return status;
    }

    void fail_before(uint32_t incarnation) {
        uint32_t valid_from = header_->valid_from.load();
        while (valid_from < incarnation &&
               !header_->valid_from.compare_exchange_weak(valid_from, incarnation)) {}
        for (int r = 0; r < size_; r++) ring(ranks_[r]);
    }

    char* slot(int rank) { return slots_ + (rank * 2 + round_ % 2) * kSlotBytes; }

    float* floats(int rank) { return reinterpret_cast<float*>(slot(rank)); }

    Header* const header_;
    Rank* const ranks_;
    char* const slots_;
    const int rank_, size_;
    const int64_t deadline_ns_;
    std::atomic<uint32_t> incarnation_{0};
    uint64_t published_ = 0, round_ = 0;
    bool was_long_[2] = {}; // the last wait in an even and in an odd round: a layer has two sums
    const char* parts_ = nullptr; // of an exchange, and its sizes
    int64_t longest_ = 0;
    std::vector<int64_t> leaving_, coming_, starts_;
    std::atomic<int64_t> waited_ns_{0};
    int64_t came_ns_ = now_ns(CLOCK_MONOTONIC);
    Stretch stretch_;
};

Group* group(void* context) { return static_cast<Group*>(context); }

} // namespace

EXPORT int32_t shoal_group_abi() { return kAbi; }

EXPORT int64_t shoal_group_bytes(int32_t size) { return Group::bytes(size); }

// Null: see errno. The memory is zeros at first; the group takes
// shoal_group_bytes(size) of them, from `offset` on.
EXPORT void* shoal_group_create(int32_t fd, int64_t offset, int32_t rank, int32_t size,
                                int64_t deadline_ns) {
    struct stat file;
    if (fstat(fd, &file) != 0) return nullptr;
    if (file.st_size < offset + Group::bytes(size)) {
        errno = EINVAL;
        return nullptr;
    }
    constexpr int kAccess = PROT_READ | PROT_WRITE;
    void* memory = mmap(nullptr, Group::bytes(size), kAccess, MAP_SHARED, fd, offset);
    if (memory == MAP_FAILED) return nullptr;
    return new (std::nothrow) Group(memory, rank, size, deadline_ns);
}

EXPORT void shoal_group_destroy(void* context) {
    munmap(group(context)->memory(), Group::bytes(group(context)->size()));
    delete group(context);
}

EXPORT int32_t shoal_group_all_reduce(void* context, float* data, int64_t count) {
    return group(context)->all_reduce(data, count);
}

EXPORT int32_t shoal_group_all_gather(void* context, const void* mine, int64_t bytes, void* all) {
    auto from = static_cast<const char*>(mine);
    return group(context)->all_gather(from, bytes, static_cast<char*>(all));
}

EXPORT int32_t shoal_group_send_parts(void* context, const void* parts, const int64_t* leaving,
                                       int64_t* coming) {
    return group(context)->send_parts(static_cast<const char*>(parts), leaving, coming);
}

EXPORT int32_t shoal_group_take_parts(void* context, void* all) {
    return group(context)->take_parts(static_cast<char*>(all));
}

EXPORT void shoal_group_abort(void* context) { group(context)->abort(); }

EXPORT void shoal_group_reset(void* context, uint32_t incarnation) {
    group(context)->reset(incarnation);
}

EXPORT void shoal_group_set_speed(void* context, double speed) {
    group(context)->set_speed(speed);
}

EXPORT void shoal_group_pay(void* context) {
    group(context)->pay();
    group(context)->begin();
}

EXPORT int64_t shoal_group_waited_ns(void* context) { return group(context)->waited_ns(); }
