// The threads of one engine: all run the same function, do the parts of its loops together, and sleep in the kernel between calls.
//
// A loop is shared out while it runs: a member takes some of what is left, and again when it is through. At a barrier is waited for
// parts, not for members: who has nothing in hand is waited for by nobody. So a member whose core is needed by somebody else for a
// while (the router, the worker's own links), or who takes long to wake, costs the others at most the parts that it holds, and
// goes through the loops that were done without it when it is back. The end of a call waits for whoever has begun it.
//
// At a barrier a member looks for a short while, then sleeps: other workers may share the cores. A team of one has no threads.
// Between two calls it can be said that fewer are to take part; the others sleep on and are not woken.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace pdserve {

class Team {
public:
    explicit Team(int most) : most_(most), size_(most), calls_(new std::atomic<uint32_t>[size_t(most)]()), progress_(size_t(most)) {
        for (int member = 1; member < most; ++member) threads_.emplace_back([this, member] { serve(member); });
    }

    ~Team() {
        ending_.store(true, std::memory_order_release);
        wake(most_);
        for (std::thread& thread : threads_) thread.join();
    }

    // Who takes part in a call; members are numbered from 0.
    int size() const { return size_; }

    // For the calls to come, as many as there are at most. Not within a call.
    void use(int64_t wanted) { size_ = wanted < 1 ? 1 : wanted > most_ ? most_ : int(wanted); }

    // Runs task(member) on member 0, the calling thread, and on every other that wakes in time; returns when all parts are done
    // and nobody is in the task any more. A task computes in parts of loops only, and decides alike on every member.
    template <class Task>
    void run(const Task& task) {
        task_ = [](const void* what, int member) { (*static_cast<const Task*>(what))(member); };
        argument_ = &task;
        progress_[0] = {};
        taken_.store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        if (size_ > 1) {
            gate_.store(uint32_t(size_) << SIZE_SHIFT, std::memory_order_release);
            wake(size_);
        }
        task(0);
        barrier(0);
        if (size_ > 1) close();
    }

    // Has part(i) called once for each i below count, on some member. Every member calls it, with the same count, and all of them
    // begin the same loops in the same order; it returns when nothing is left to be begun, which is no barrier.
    template <class Part>
    void share(int member, int64_t count, const Part& part) {
        share(member, count, [] {}, part);
    }

    // The same; ready() is called before the first part that a member does, and not by one that does none.
    template <class Ready, class Part>
    void share(int member, int64_t count, const Ready& ready, const Part& part) {
        if (size_ == 1) {
            if (count > 0) ready();
            for (int64_t i = 0; i < count; ++i) part(i);
            return;
        }
        Progress& mine = progress_[size_t(member)];
        mine.parts += uint32_t(count);
        const uint64_t loop = ++mine.loops, end = uint64_t(count);
        uint64_t taken = taken_.load(std::memory_order_relaxed);
        for (bool is_ready = false;;) {
            if (taken >> INDEX_BITS > loop) return;  // others are in a later loop: nothing of this one is left
            const uint64_t first = taken >> INDEX_BITS < loop ? 0 : taken & INDEX_MASK;
            if (first >= end) return;
            // Less and less at a time, so that all come to the end together.
            const uint64_t size = (end - first + 2 * uint64_t(size_) - 1) / (2 * uint64_t(size_));
            if (!taken_.compare_exchange_weak(taken, loop << INDEX_BITS | (first + size), std::memory_order_relaxed)) continue;
            if (!is_ready) ready();
            is_ready = true;
            for (uint64_t i = first; i < first + size; ++i) part(int64_t(i));
            done_.fetch_add(uint32_t(size));
            if (sleepers_.load()) done_.notify_all();
            taken = taken_.load(std::memory_order_relaxed);
        }
    }

    // Returns when all parts are done of the loops that this member has gone through so far.
    void barrier(int member) {
        if (size_ == 1) return;
        const uint32_t wanted = progress_[size_t(member)].parts;
        const auto missing = [&](uint32_t done) { return int32_t(done - wanted) < 0; };  // a late member sees more than it asks for
        for (int look = 0; look < LOOKS; ++look) {
            if (!missing(done_.load(std::memory_order_acquire))) return;
            pause();
        }
        sleepers_.fetch_add(1);
        for (uint32_t done; missing(done = done_.load());) done_.wait(done);
        sleepers_.fetch_sub(1);
    }

private:
    static constexpr int LOOKS = 2000;
    static constexpr int INDEX_BITS = 40;
    static constexpr uint64_t INDEX_MASK = (uint64_t(1) << INDEX_BITS) - 1;
    static constexpr uint32_t CLOSED = 1u << 31, INSIDE_MASK = 0xffff;
    static constexpr int SIZE_SHIFT = 16;

    struct alignas(64) Progress {
        uint64_t loops = 0;  // that it has begun
        uint32_t parts = 0;  // of all these loops, whoever did them; differences count
    };

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    void wake(int members) {
        for (int member = 1; member < members; ++member) {
            calls_[size_t(member)].fetch_add(1, std::memory_order_release);
            calls_[size_t(member)].notify_one();
        }
    }

    void serve(int member) {
        for (uint32_t seen = 0;;) {
            calls_[size_t(member)].wait(seen, std::memory_order_acquire);
            seen = calls_[size_t(member)].load(std::memory_order_acquire);
            if (ending_.load(std::memory_order_acquire)) return;
            if (!enter(member)) continue;  // it was over before this thread was awake
            progress_[size_t(member)] = {};
            task_(argument_, member);
            const uint32_t gate = gate_.fetch_sub(1, std::memory_order_acq_rel);
            if (gate & CLOSED && (gate & INSIDE_MASK) == 1) gate_.notify_one();
        }
    }

    bool enter(int member) {
        uint32_t gate = gate_.load(std::memory_order_acquire);
        do {
            if (gate & CLOSED || int((gate & ~CLOSED) >> SIZE_SHIFT) <= member) return false;
        } while (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire));
        return true;
    }

    // Nobody comes in any more; returns when all are out.
    void close() {
        uint32_t gate = gate_.fetch_or(CLOSED, std::memory_order_acq_rel) | CLOSED;
        for (int look = 0; gate & INSIDE_MASK; gate = gate_.load(std::memory_order_acquire))
            if (++look < LOOKS)
                pause();
            else
                gate_.wait(gate, std::memory_order_acquire);
    }

    const int most_;
    int size_;  // written between calls; members read it within one
    void (*task_)(const void*, int) = nullptr;
    const void* argument_ = nullptr;
    std::unique_ptr<std::atomic<uint32_t>[]> calls_;  // per member: that it was woken for
    std::vector<Progress> progress_;                  // per member, in the call that runs
    std::atomic<bool> ending_{false};
    alignas(64) std::atomic<uint64_t> taken_{0};  // which loop, and up to where it was taken
    alignas(64) std::atomic<uint32_t> done_{0};   // parts, of all loops of the call
    std::atomic<int> sleepers_{0};                // who wait for it asleep
    std::atomic<uint32_t> gate_{CLOSED};          // closed; members that may come in; members inside
    std::vector<std::thread> threads_;
};

}  // namespace pdserve
