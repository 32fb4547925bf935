// Where a step's time goes, if somebody asks: seconds per stage, as member 0 of the team sees them from barrier to barrier, so that
// waiting for the others is in them. Off, a stage costs one comparison.
#pragma once

#include <chrono>

namespace pdserve {

// Mirrors common/engine/native/library.py.
enum Stage { EMBED, NORM, QKV, TURN_AND_WRITE, ATTEND, OUTPUT, GATE_UP, DOWN, HEAD, NUM_STAGES };

class StageClock {
public:
    // Adds to `seconds` [NUM_STAGES] from now on; null ends it.
    void watch(double* seconds) { seconds_ = seconds; }

    void begin() {
        if (seconds_) last_ = Clock::now();
    }

    void lap(int member, Stage stage) {
        if (!seconds_ || member) return;
        const Clock::time_point now = Clock::now();
        seconds_[stage] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

private:
    using Clock = std::chrono::steady_clock;
    double* seconds_ = nullptr;
    Clock::time_point last_;
};

}  // namespace pdserve
