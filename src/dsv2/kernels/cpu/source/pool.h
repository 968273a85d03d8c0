// Threads that run one function together, meet at barriers, and sleep when there is nothing to do.
//
// Waiting spins for some hundred microseconds, which covers the gaps inside a step, and then parks, so that an idle engine, or one that shares
// its cores with other work, costs nothing.
#pragma once
#include <algorithm>
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
    int index;
    uint32_t loops;  // parallel loops begun so far, the same in every thread between barriers
    void barrier();
    // Call body(i) for every i below count, each by one of the threads. Every thread has a stretch of neighbours of its own and takes `grain`
    // of them at a time from its beginning; who has finished takes from the end of another's. Weights are read in long runs so: two threads
    // that take turns at short ones read 31 GB/s where halves read 55, since what is fetched ahead is the other's. Does not wait at the end.
    template <class F> void share(int64_t count, int64_t grain, F body);

  private:
    bool take(int owner, uint32_t loop, int64_t pieces, bool from_end, int64_t* piece);
};

class Pool {
  public:
    explicit Pool(int threads) : size(threads), stretches((size_t)threads * OPEN_LOOPS) {
        for (int i = 1; i < threads; i++) others.emplace_back([this, i] { serve(i); });
    }
    ~Pool() {
        stopping = true;
        begin.raise();
        for (auto& thread : others) thread.join();
    }
    // Run job(argument, worker) on every thread, the caller being the first; return when all have.
    void run(void (*function)(void*, Worker&), void* given) {
        job = function;
        argument = given;
        begin.raise();
        Worker me{this, 0, loops};
        function(given, me);
        me.barrier();
        loops = me.loops;
    }
    const int size;

  private:
    friend struct Worker;
    static constexpr int OPEN_LOOPS = 64;  // loops that may run between two barriers
    static constexpr int64_t MOST_PIECES = 0xffff;
    // What was taken of a thread's stretch: pieces from its beginning (low 16 bits), from its end (next 16), and in which loop (high 32).
    struct alignas(64) Stretch { std::atomic<uint64_t> taken{0}; };
    void serve(int index) {
        uint32_t seen = 0;
        for (;;) {
            begin.wait(seen);
            seen++;
            if (stopping) return;
            Worker me{this, index, loops};
            job(argument, me);
            me.barrier();
        }
    }
    std::vector<Stretch> stretches;
    std::vector<std::thread> others;
    std::atomic<int> arrived{0};
    Event begin, phase;
    void (*job)(void*, Worker&) = nullptr;
    void* argument = nullptr;
    uint32_t loops = 1;  // a stretch that no loop used carries 0
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

// Take one of the `pieces` of a thread's stretch; false when none is left.
inline bool Worker::take(int owner, uint32_t loop, int64_t pieces, bool from_end, int64_t* piece) {
    auto& taken = pool->stretches[(size_t)owner * Pool::OPEN_LOOPS + loop % Pool::OPEN_LOOPS].taken;
    const uint64_t mark = (uint64_t)loop << 32;
    uint64_t now = taken.load(std::memory_order_relaxed);
    for (;;) {
        const uint64_t state = now >> 32 == loop ? now : mark;  // what an earlier loop left counts as nothing
        const int64_t front = state & Pool::MOST_PIECES, back = state >> 16 & Pool::MOST_PIECES;
        if (front + back >= pieces) return false;
        if (!taken.compare_exchange_weak(now, state + (from_end ? 1 << 16 : 1), std::memory_order_relaxed)) continue;
        *piece = from_end ? pieces - 1 - back : front;
        return true;
    }
}

template <class F> void Worker::share(int64_t count, int64_t grain, F body) {
    const uint32_t loop = loops++;
    grain = std::max(grain, count / Pool::MOST_PIECES + 1);
    const int64_t all = (count + grain - 1) / grain;
    for (int turn = 0; turn < pool->size; turn++) {
        const int owner = (index + turn) % pool->size;
        const int64_t first = all * owner / pool->size, pieces = all * (owner + 1) / pool->size - first;
        for (int64_t piece; take(owner, loop, pieces, turn > 0, &piece);) {
            const int64_t from = (first + piece) * grain, to = from + grain < count ? from + grain : count;
            for (int64_t i = from; i < to; i++) body(i);
        }
    }
}
