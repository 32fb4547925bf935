// The threads of one engine: all run the same function, do the parts of its loops together, and sleep in the kernel between calls.
//
// Each member has a share of a loop, of which it takes half of what is left at a time; who is through with its own takes from others'.
// So members touch each other's memory about once in a loop, however many parts it has: between two cores that is hundreds of
// nanoseconds, as long as some parts take. At a barrier is waited for parts, not for members: who has nothing in hand is waited for by
// nobody. So a member whose core is needed by somebody else for a while (the router, the worker's own links), or who takes long to
// wake, costs the others at most the parts that it holds, and goes through the loops that were done without it when it is back. The end
// of a call waits for whoever has begun it.
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
    explicit Team(int most) : most_(most), size_(most), calls_(new std::atomic<uint32_t>[size_t(most)]()), members_(size_t(most)) {
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
        for (Member& member : members_) {
            member.taken.store(0, std::memory_order_relaxed);
            member.done.store(0, std::memory_order_relaxed);
        }
        members_[0].begin();
        if (size_ > 1) {
            gate_.store(uint32_t(size_) << SIZE_SHIFT, std::memory_order_release);
            wake(size_);
        }
        task(0);
        barrier(0);
        if (size_ > 1) close();
    }

    // Has part(i, next) called once for each i below count, on some member; `next` is what that member does after it in this loop, as far
    // as can be told, or `count`. Every member calls it, with the same count, and all of them begin the same loops in the same order; it
    // returns when nothing is left to be begun, which is no barrier.
    template <class Part>
    void share(int member, int64_t count, const Part& part) {
        share(member, count, [] {}, part);
    }

    // The same; ready() is called before the first part that a member does, and not by one that does none.
    template <class Ready, class Part>
    void share(int member, int64_t count, const Ready& ready, const Part& part) {
        if (size_ == 1) {
            if (count > 0) ready();
            for (int64_t i = 0; i < count; ++i) part(i, i + 1);
            return;
        }
        Member& mine = members_[size_t(member)];
        const uint64_t loop = ++mine.loops;
        mine.parts += uint32_t(count);
        bool is_ready = false;
        for (int i = 0; i < size_; ++i) {
            const int whose = member + i < size_ ? member + i : member + i - size_;
            const int64_t end = end_of(whose, count);
            for (Lot lot; (lot = take(whose, loop, end_of(whose - 1, count), end)).size > 0;) {
                if (!is_ready) ready();
                is_ready = true;
                for (int64_t at = lot.first; at < lot.first + lot.size; ++at) part(at, at + 1 < end ? at + 1 : count);
                mine.done.fetch_add(uint32_t(lot.size));
                if (sleepers_.load()) ring();
            }
        }
    }

    // Returns when all parts are done of the loops that this member has gone through so far.
    void barrier(int member) {
        if (size_ == 1) return;
        for (int look = 0; look < LOOKS; ++look) {
            if (!is_missing(member)) return;
            pause();
        }
        sleepers_.fetch_add(1);
        for (uint32_t rung; rung = rung_.load(), is_missing(member);) rung_.wait(rung);
        sleepers_.fetch_sub(1);
    }

private:
    static constexpr int LOOKS = 2000;
    static constexpr int INDEX_BITS = 40;
    static constexpr uint64_t INDEX_MASK = (uint64_t(1) << INDEX_BITS) - 1;
    static constexpr uint32_t CLOSED = 1u << 31, INSIDE_MASK = 0xffff;
    static constexpr int SIZE_SHIFT = 16;

    // What belongs to one member; others read it, and take from its share when they are through with theirs.
    struct alignas(128) Member {
        std::atomic<uint64_t> taken{0};  // of its share: in which loop, and up to which part
        std::atomic<uint32_t> done{0};   // parts that it did, of all loops of the call; differences count
        uint64_t loops = 0;              // that it has begun, known to itself alone, as is
        uint32_t parts = 0;              // how many these have, whoever does them

        void begin() {
            loops = 0;
            parts = 0;
        }
    };

    struct Lot {
        int64_t first, size;
    };

    // Shares are of nearly equal size, in the order of members.
    int64_t end_of(int member, int64_t count) const { return count * (member + 1) / size_; }

    // Half of what is left of somebody's share [first, end), so that others may take of the rest; nothing if nothing is left, be it that
    // others are in a later loop.
    Lot take(int whose, uint64_t loop, int64_t first, int64_t end) {
        std::atomic<uint64_t>& of = members_[size_t(whose)].taken;
        for (uint64_t taken = of.load(std::memory_order_relaxed);;) {
            if (taken >> INDEX_BITS > loop) return {end, 0};
            if (taken >> INDEX_BITS == loop) first = int64_t(taken & INDEX_MASK);
            const int64_t size = (end - first + 1) / 2;
            if (size <= 0) return {end, 0};
            const uint64_t wanted = loop << INDEX_BITS | uint64_t(first + size);
            if (of.compare_exchange_weak(taken, wanted, std::memory_order_relaxed)) return {first, size};
        }
    }

    // Whether parts are to be done of the loops that this member has gone through. Nobody is in a later one then.
    bool is_missing(int member) const {
        uint32_t done = 0;
        for (int i = 0; i < size_; ++i) done += members_[size_t(i)].done.load();
        return int32_t(done - members_[size_t(member)].parts) < 0;  // a late member sees more than it asks for
    }

    void ring() {
        rung_.fetch_add(1);
        rung_.notify_all();
    }

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
            members_[size_t(member)].begin();
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
    std::vector<Member> members_;
    std::atomic<bool> ending_{false};
    alignas(128) std::atomic<int> sleepers_{0};  // who wait for parts asleep
    std::atomic<uint32_t> rung_{0};              // raised whenever parts are done while somebody sleeps
    std::atomic<uint32_t> gate_{CLOSED};          // closed; members that may come in; members inside
    std::vector<std::thread> threads_;
};

}  // namespace pdserve
