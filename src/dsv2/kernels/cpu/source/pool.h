// Threads that run one function together, meet at barriers, and sleep when there is nothing to do.
//
// Waiting spins for some hundred microseconds, which covers the gaps inside a step, and then parks, so that an idle engine, or one that shares
// its cores with other work, costs nothing.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

// Wait for an event counter to leave a value.
class Event {
  public:
    uint32_t now() const { return count.load(std::memory_order_acquire); }
    void wait(uint32_t seen) {
        for (int spin = 0; spin < SPINS; spin++) {
            if (now() != seen) return;
            relax();
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1);
        changed.wait(lock, [&] { return count.load() != seen; });
        sleepers.fetch_sub(1);
    }
    void raise() {
        count.fetch_add(1);
        if (sleepers.load() == 0) return;  // who is about to sleep looks at the count once more under the lock
        std::lock_guard<std::mutex> lock(mutex);
        changed.notify_all();
    }

  private:
    static constexpr int SPINS = 20000;
    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }
    std::atomic<uint32_t> count{0};
    std::atomic<int> sleepers{0};
    std::mutex mutex;
    std::condition_variable changed;
};

class Pool;

// One thread's view of a running job.
struct Worker {
    Pool* pool;
    int index, loops;  // loops: parallel loops begun so far, the same in every thread between barriers
    void barrier();
    // Call body(i) for every i below count, each by one of the threads, in pieces of `grain` neighbours. Does not wait at the end.
    template <class F> void share(int64_t count, int64_t grain, F body);
};

class Pool {
  public:
    // most_loops: parallel loops of a job, at most.
    Pool(int threads, int most_loops) : size(threads), counters(most_loops) {
        for (int i = 1; i < threads; i++) others.emplace_back([this, i] { serve(i); });
    }
    ~Pool() {
        stopping = true;
        begin.raise();
        for (auto& thread : others) thread.join();
    }
    // Run job(argument, worker) on every thread, the caller being the first; return when all have.
    void run(void (*function)(void*, Worker&), void* given) {
        for (auto& counter : counters) counter.store(0, std::memory_order_relaxed);
        job = function;
        argument = given;
        begin.raise();
        Worker me{this, 0, 0};
        function(given, me);
        me.barrier();
    }
    const int size;

  private:
    friend struct Worker;
    void serve(int index) {
        uint32_t seen = 0;
        for (;;) {
            begin.wait(seen);
            seen++;
            if (stopping) return;
            Worker me{this, index, 0};
            job(argument, me);
            me.barrier();
        }
    }
    std::vector<std::atomic<int64_t>> counters;
    std::vector<std::thread> others;
    std::atomic<int> arrived{0};
    Event begin, phase;
    void (*job)(void*, Worker&) = nullptr;
    void* argument = nullptr;
    std::atomic<bool> stopping{false};
};

inline void Worker::barrier() {
    const uint32_t seen = pool->phase.now();
    if (pool->arrived.fetch_add(1) + 1 == pool->size) {
        pool->arrived.store(0);
        pool->phase.raise();
    } else {
        pool->phase.wait(seen);
    }
}

template <class F> void Worker::share(int64_t count, int64_t grain, F body) {
    auto& counter = pool->counters[loops++];
    for (;;) {
        const int64_t from = counter.fetch_add(grain), to = from + grain < count ? from + grain : count;
        if (from >= count) return;
        for (int64_t i = from; i < to; i++) body(i);
    }
}
