// The ranks of an instance on one host, over memory they share: sums and gathers.
//
//     Header | a Rank each | per rank two slots of kSlotBytes
//
// A rank copies its piece into a slot of its own, publishes a tag, waits until all tags are there
// and reads the others' slots. Slots alternate by round: nobody is more than a round ahead, since
// a round needs everybody's tag. Small messages take one round trip: all ranks add up all slots,
// in rank order, so all have the same bits. Large ones two: each rank adds up its part of the
// piece, then all copy the sums.
//
// Who waits spins, because the others are microseconds away, yields, then sleeps on its bell.
// Knows nothing of models, Python or torch.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <linux/futex.h>
#include <new>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kAbi = 1;
constexpr int64_t kSlotBytes = 256 << 10; // both slots of two ranks fit a core's L2
constexpr int64_t kOneShotBytes = 64 << 10;
constexpr int kSpins = 200; // about 10 us
constexpr int64_t kYieldNs = 100'000;
constexpr int64_t kSmallestSleepNs = 200'000; // a sleep is late by tens of microseconds
constexpr int64_t kLongestSleepNs = 50'000'000; // then look whether the call was aborted
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

int64_t now_ns(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

timespec to_timespec(int64_t ns) { return {ns / 1'000'000'000, ns % 1'000'000'000}; }

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

// A slower device for the lab: what this thread computed between collectives, stretched.
class Stretch {
  public:
    void set_speed(double speed) { owed_per_ns_.store(1 / speed - 1); }

    void begin() {
        began_ = owed_per_ns_.load(std::memory_order_relaxed) > 0;
        if (!began_) return;
        thread_ = pthread_self();
        began_ns_ = now_ns(CLOCK_THREAD_CPUTIME_ID);
    }

    // Sleeps off what is owed; a sleep's own error is carried over.
    template <class IsOver> void pay(IsOver is_over) {
        if (!began_ || !pthread_equal(thread_, pthread_self())) return;
        began_ = false;
        debt_ns_ += (now_ns(CLOCK_THREAD_CPUTIME_ID) - began_ns_) * owed_per_ns_.load();
        if (debt_ns_ < kSmallestSleepNs) return;
        prctl(PR_SET_TIMERSLACK, 1000UL);
        int64_t from_ns = now_ns(CLOCK_MONOTONIC), until_ns = from_ns + int64_t(debt_ns_), at_ns;
        while ((at_ns = now_ns(CLOCK_MONOTONIC)) < until_ns && !is_over()) {
            int64_t nap_ns = std::min(until_ns - at_ns, kLongestSleepNs);
            timespec until = to_timespec(at_ns + nap_ns);
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
        }
        debt_ns_ -= at_ns - from_ns;
    }

  private:
    std::atomic<double> owed_per_ns_{0};
    bool began_ = false;
    pthread_t thread_{};
    int64_t began_ns_ = 0;
    double debt_ns_ = 0;
};

class Group {
  public:
    Group(void* memory, int rank, int size, int64_t deadline_ns)
        : header_(static_cast<Header*>(memory)), ranks_(reinterpret_cast<Rank*>(header_ + 1)),
          slots_(reinterpret_cast<char*>(ranks_ + size)), rank_(rank), size_(size),
          deadline_ns_(deadline_ns) {}

    static int64_t bytes(int size) {
        return sizeof(Header) + size * (sizeof(Rank) + 2 * kSlotBytes);
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
        stretch_.begin();
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
        stretch_.begin();
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
    }

    void begin() { stretch_.begin(); }

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
        int64_t from_ns = now_ns(CLOCK_MONOTONIC);
        while (now_ns(CLOCK_MONOTONIC) - from_ns < kYieldNs) { // the other may need this core
            if (there.load(std::memory_order_acquire) >= tag) return kDone;
            if (has_failed()) return kAborted;
            sched_yield();
        }
        return sleep_until_there(other, tag, from_ns + deadline_ns_);
    }

    Status sleep_until_there(int other, uint64_t tag, int64_t deadline_ns) {
        Rank& self = ranks_[rank_];
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
    Stretch stretch_;
};

Group* group(void* context) { return static_cast<Group*>(context); }

} // namespace

EXPORT int32_t shoal_group_abi() { return kAbi; }

EXPORT int64_t shoal_group_bytes(int32_t size) { return Group::bytes(size); }

// Null: see errno. The memory is zeros at first, and at least shoal_group_bytes(size) of them.
EXPORT void* shoal_group_create(int32_t fd, int32_t rank, int32_t size, int64_t deadline_ns) {
    struct stat file;
    if (fstat(fd, &file) != 0) return nullptr;
    if (file.st_size < Group::bytes(size)) {
        errno = EINVAL;
        return nullptr;
    }
    void* memory = mmap(nullptr, Group::bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
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
