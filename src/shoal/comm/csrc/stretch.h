// A slower device for the lab: what a thread computed between collectives, stretched. A core that
// others had meanwhile is no part of the device: what the thread waited for one is taken off what
// it sleeps. Knows nothing of what is computed.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <fcntl.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <unistd.h>

namespace {

constexpr int64_t kSmallestSleepNs = 200'000; // a sleep is late by tens of microseconds
constexpr int64_t kLongestSleepNs = 50'000'000; // then look whether the call was aborted

int64_t now_ns(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

timespec to_timespec(int64_t ns) { return {ns / 1'000'000'000, ns % 1'000'000'000}; }

// How long a thread was ready to run and had no core, as the kernel counts it.
class CoreWait {
  public:
    ~CoreWait() { leave(); }

    // Of the calling thread; 0 where the kernel does not say.
    int64_t total_ns() {
        if (!pthread_equal(thread_, pthread_self())) {
            leave();
            thread_ = pthread_self();
            file_ = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
        }
        char text[64];
        ssize_t size = file_ < 0 ? -1 : pread(file_, text, sizeof text - 1, 0);
        if (size <= 0) return 0;
        text[size] = 0;
        long long ran_ns, waited_ns;
        return sscanf(text, "%lld %lld", &ran_ns, &waited_ns) == 2 ? waited_ns : 0;
    }

  private:
    void leave() {
        if (file_ >= 0) close(file_);
        file_ = -1;
    }

    pthread_t thread_{};
    int file_ = -1;
};

class Stretch {
  public:
    void set_speed(double speed) { owed_per_ns_.store(1 / speed - 1); }

    // The thread sleeps until others come; how late it wakes up counts as waiting for a core.
    void doze() {
        if (is_slow()) core_wait_ns_ = core_wait_.total_ns(), dozed_ = true;
    }

    void begin() {
        began_ = is_slow();
        if (!began_) return;
        if (!dozed_) core_wait_ns_ = core_wait_.total_ns();
        dozed_ = false;
        thread_ = pthread_self();
        began_ns_ = now_ns(CLOCK_THREAD_CPUTIME_ID);
    }

    // Sleeps off what is owed; a sleep's own error is carried over.
    template <class IsOver> void pay(IsOver is_over) {
        if (!began_ || !pthread_equal(thread_, pthread_self())) return;
        began_ = false;
        double owed_ns = (now_ns(CLOCK_THREAD_CPUTIME_ID) - began_ns_) * owed_per_ns_.load();
        debt_ns_ += std::max(0., owed_ns - double(core_wait_.total_ns() - core_wait_ns_));
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
    bool is_slow() const { return owed_per_ns_.load(std::memory_order_relaxed) > 0; }

    std::atomic<double> owed_per_ns_{0};
    bool began_ = false, dozed_ = false;
    pthread_t thread_{};
    CoreWait core_wait_;
    int64_t began_ns_ = 0, core_wait_ns_ = 0;
    double debt_ns_ = 0;
};

} // namespace
