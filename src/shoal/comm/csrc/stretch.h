// A slower device for the lab: what a thread computed between collectives, stretched. Knows nothing
// of what is computed.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <ctime>
#include <pthread.h>
#include <sys/prctl.h>

namespace {

constexpr int64_t kSmallestSleepNs = 200'000; // a sleep is late by tens of microseconds
constexpr int64_t kLongestSleepNs = 50'000'000; // then look whether the call was aborted

int64_t now_ns(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

timespec to_timespec(int64_t ns) { return {ns / 1'000'000'000, ns % 1'000'000'000}; }

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

} // namespace
