// A team of threads. A thread that waits spins briefly, because the next piece of work is
// microseconds away; then it sleeps, because a spinning core is taken from somebody else.
#include <atomic>
#include <new>
#include <sched.h>
#include <thread>
#include <vector>

#include "internal.h"

namespace shoal {
namespace {

constexpr int kBarrierSpins = 4000; // some tens of microseconds
constexpr int kIdleSpins = 20000;   // about 0.2 ms: the host's work between two steps
constexpr int kYields = 20;

// Waits until `value` is no longer `old`.
void wait_while(const std::atomic<uint32_t>& value, uint32_t old, int spins) {
    for (int i = 0; i < spins; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        __builtin_ia32_pause();
    }
    for (int i = 0; i < kYields; i++) { // somebody else may need this core to get there
        if (value.load(std::memory_order_acquire) != old) return;
        sched_yield();
    }
    value.wait(old, std::memory_order_acquire);
}

} // namespace

class Team {
  public:
    explicit Team(int size) : size_(size) {
        try {
            for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { work(i); });
        } catch (...) { // fewer threads than asked for are allowed here
            end();
            throw;
        }
    }

    ~Team() { end(); }

    void run(void (*function)(void*, int), void* argument) {
        function_ = function, argument_ = argument;
        start();
        function(argument, 0);
        barrier(); // all have returned
    }

    uint32_t arrive() {
        uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.fetch_add(1); // in one order with the waiters' count, or a sleeper is missed
            round_.notify_all();
        }
        return round;
    }

    bool is_over(uint32_t round) const { return round_.load(std::memory_order_acquire) != round; }

    void wait(uint32_t round) { wait_while(round_, round, kBarrierSpins); }

    void barrier() { wait(arrive()); }

    int size() const { return size_; }

  private:
    void end() {
        function_ = nullptr;
        start();
        for (auto& thread : threads_) thread.join();
    }

    void start() {
        started_.fetch_add(1, std::memory_order_release);
        started_.notify_all();
    }

    void work(int thread) {
        for (uint32_t seen = 0;; seen++) {
            wait_while(started_, seen, kIdleSpins);
            if (!function_) return;
            function_(argument_, thread);
            barrier();
        }
    }

    const int size_;
    void (*function_)(void*, int) = nullptr;
    void* argument_ = nullptr;
    alignas(64) std::atomic<uint32_t> started_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
    std::vector<std::thread> threads_;
};

Team* team_create(int num_threads) {
    try {
        return new Team(num_threads);
    } catch (const std::exception&) {
        return nullptr;
    }
}
void team_destroy(Team* team) { delete team; }
void team_run(Team* team, void (*function)(void*, int), void* argument) { team->run(function, argument); }
void team_barrier(Team* team) { team->barrier(); }
uint32_t team_arrive(Team* team) { return team->arrive(); }
bool team_is_over(Team* team, uint32_t round) { return team->is_over(round); }
void team_wait(Team* team, uint32_t round) { team->wait(round); }
int team_size(const Team* team) { return team->size(); }

} // namespace shoal
