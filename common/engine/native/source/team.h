// The threads of one engine: all run the same function, meet at barriers, and sleep in the kernel between calls.
//
// At a barrier a thread looks for a short while, then sleeps: other workers may share the cores. A team of one has no threads.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

namespace pdserve {

class Team {
public:
    explicit Team(int size) : size_(size) {
        for (int member = 1; member < size; ++member) threads_.emplace_back([this, member] { serve(member); });
    }

    ~Team() {
        task_ = nullptr;
        start();
        for (std::thread& thread : threads_) thread.join();
    }

    int size() const { return size_; }

    // Runs task(member) on every member, member 0 on the calling thread; returns when all are through.
    template <class Task>
    void run(const Task& task) {
        task_ = [](const void* what, int member) { (*static_cast<const Task*>(what))(member); };
        argument_ = &task;
        if (size_ > 1) start();
        task(0);
        barrier();
    }

    // Returns when every member is here.
    void barrier() {
        if (size_ == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
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

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    void start() {
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
    }

    void serve(int member) {
        for (uint32_t seen = 0;;) {
            round_.wait(seen, std::memory_order_acquire);
            ++seen;
            if (task_ == nullptr) return;
            task_(argument_, member);
            barrier();
        }
    }

    const int size_;
    void (*task_)(const void*, int) = nullptr;
    const void* argument_ = nullptr;
    std::atomic<uint32_t> round_{0}, phase_{0};
    std::atomic<int> arrived_{0};
    std::vector<std::thread> threads_;
};

}  // namespace pdserve
