// The threads of one engine: all run the same function, meet at barriers, and sleep in the kernel between calls.
//
// At a barrier a thread looks for a short while, then sleeps: other workers may share the cores. A team of one has no threads.
// Between two calls it can be said that fewer are to take part; the others sleep on and are not woken.
//
// A loop is shared out while it runs: a member takes a part of what is left, and again when it is through. So one whose core is
// needed by somebody else for a while (the router, the worker's own links) is not waited for longer than for its last part.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace pdserve {

class Team {
public:
    explicit Team(int most) : most_(most), size_(most), rounds_(new std::atomic<uint32_t>[size_t(most)]()), loops_(size_t(most)) {
        for (int member = 1; member < most; ++member) threads_.emplace_back([this, member] { serve(member); });
    }

    ~Team() {
        task_ = nullptr;
        size_ = most_;
        start();
        for (std::thread& thread : threads_) thread.join();
    }

    // Who takes part in a call; members are numbered from 0.
    int size() const { return size_; }

    // For the calls to come, as many as there are at most. Not within a call.
    void use(int64_t wanted) { size_ = wanted < 1 ? 1 : wanted > most_ ? most_ : int(wanted); }

    // Runs task(member) on every member, member 0 on the calling thread; returns when all are through.
    template <class Task>
    void run(const Task& task) {
        task_ = [](const void* what, int member) { (*static_cast<const Task*>(what))(member); };
        argument_ = &task;
        for (Loops& of : loops_) of.begun = 0;
        taken_.store(0, std::memory_order_relaxed);
        if (size_ > 1) start();
        task(0);
        barrier();
    }

    // Has part(i) called once for each i below count, on some member. Every member calls it, with the same count, and all of them
    // begin the same loops in the same order; it returns when nothing is left to be begun, which is no barrier.
    template <class Part>
    void share(int member, int64_t count, const Part& part) {
        if (size_ == 1) {
            for (int64_t i = 0; i < count; ++i) part(i);
            return;
        }
        const uint64_t loop = ++loops_[size_t(member)].begun;
        const uint64_t end = uint64_t(count);
        uint64_t taken = taken_.load(std::memory_order_relaxed);
        for (;;) {
            if (taken >> INDEX_BITS > loop) return;  // others are in a later loop: nothing of this one is left
            const uint64_t first = taken >> INDEX_BITS < loop ? 0 : taken & INDEX_MASK;
            if (first >= end) return;
            // Less and less at a time, so that all come to the end together.
            const uint64_t size = (end - first + 2 * uint64_t(size_) - 1) / (2 * uint64_t(size_));
            if (!taken_.compare_exchange_weak(taken, loop << INDEX_BITS | (first + size), std::memory_order_relaxed)) continue;
            for (uint64_t i = first; i < first + size; ++i) part(int64_t(i));
            taken = taken_.load(std::memory_order_relaxed);
        }
    }

    // Returns when every member is here.
    void barrier() {
        const int size = size_;  // before it is known that we are here: from then on the next call may have another
        if (size == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            phase_.notify_all();
            return;
        }
        for (int look = 0; look < LOOKS; ++look) {
            if (phase_.load(std::memory_order_acquire) != phase) return;
            pause();
        }
        phase_.wait(phase, std::memory_order_acquire);
    }

private:
    static constexpr int LOOKS = 2000;
    static constexpr int INDEX_BITS = 40;
    static constexpr uint64_t INDEX_MASK = (uint64_t(1) << INDEX_BITS) - 1;

    struct alignas(64) Loops {
        uint64_t begun = 0;
    };

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    void start() {
        for (int member = 1; member < size_; ++member) {
            rounds_[size_t(member)].fetch_add(1, std::memory_order_release);
            rounds_[size_t(member)].notify_one();
        }
    }

    void serve(int member) {
        for (uint32_t seen = 0;;) {
            rounds_[size_t(member)].wait(seen, std::memory_order_acquire);
            ++seen;
            if (task_ == nullptr) return;
            task_(argument_, member);
            barrier();
        }
    }

    const int most_;
    int size_;  // written between calls; members read it within one
    void (*task_)(const void*, int) = nullptr;
    const void* argument_ = nullptr;
    std::unique_ptr<std::atomic<uint32_t>[]> rounds_;  // per member: calls that it took part in
    std::vector<Loops> loops_;                         // per member, of the call that runs
    alignas(64) std::atomic<uint64_t> taken_{0};       // which loop, and up to where it was taken
    std::atomic<uint32_t> phase_{0};
    std::atomic<int> arrived_{0};
    std::vector<std::thread> threads_;
};

}  // namespace pdserve
