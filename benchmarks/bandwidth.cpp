// How fast this machine reads memory: a buffer in huge pages, one sequential stream a thread.
//
//     bandwidth NUM_THREADS MEGABYTES PASSES   ->   GB/s of each pass, one a line
//
// The threads start each pass together; a pass ends when the last of them is done.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

typedef std::uint64_t Vector __attribute__((vector_size(64)));

static std::uint64_t sum(const Vector* data, std::size_t count) {
    Vector totals[8] = {};
    for (std::size_t i = 0; i + 8 <= count; i += 8) {
        for (int lane = 0; lane < 8; ++lane) totals[lane] += data[i + lane];
    }
    for (int lane = 1; lane < 8; ++lane) totals[0] += totals[lane];
    std::uint64_t total = 0;
    for (int lane = 0; lane < 8; ++lane) total += totals[0][lane];
    return total;
}

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    const int num_threads = std::atoi(argv[1]);
    const std::size_t huge = std::size_t{2} << 20;
    const std::size_t size = std::size_t(std::atoll(argv[2])) * 1000000 / huge * huge;
    const int passes = std::atoi(argv[3]);
    if (num_threads < 1 || size == 0 || passes < 1) return 2;
    char* mapped = static_cast<char*>(mmap(nullptr, size + huge, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapped == MAP_FAILED) return 1;
    char* buffer = mapped + (huge - reinterpret_cast<std::uintptr_t>(mapped) % huge) % huge;
    madvise(buffer, size, MADV_HUGEPAGE);
    std::memset(buffer, 1, size);

    using Clock = std::chrono::steady_clock;
    std::atomic<int> arrived{0}, done{0};
    std::atomic<std::uint64_t> checksum{0};
    auto run = [&](int rank, int pass) {
        const std::size_t count = size / sizeof(Vector) / num_threads;
        arrived.fetch_add(1);
        while (arrived.load() < num_threads * (pass + 1)) {}
        checksum += sum(reinterpret_cast<const Vector*>(buffer) + count * rank, count);
        done.fetch_add(1);
    };
    std::vector<double> seconds;
    std::vector<std::thread> team;
    for (int rank = 1; rank < num_threads; ++rank) {
        team.emplace_back([&, rank] { for (int pass = 0; pass < passes; ++pass) run(rank, pass); });
    }
    for (int pass = 0; pass < passes; ++pass) {
        const auto start = Clock::now();
        run(0, pass);
        while (done.load() < num_threads * (pass + 1)) {}
        seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
    for (auto& thread : team) thread.join();
    for (double each : seconds) std::printf("%.3f\n", size / each / 1e9);
    return checksum.load() == 0;  // so that no compiler drops the reads
}
