// What this machine can do at best, to hold a step's stages against: bytes read from memory, and products of a tile that finds
// everything in the first-level cache. Each is the best of a few short runs of the whole team, a part of the work for each member.
#pragma once

#include <chrono>
#include <vector>

#include "quantised.h"
#include "team.h"

namespace pdserve {

struct Limits {
    double read_bytes_per_s;
    double operations_per_s;            // two per product, in the model's type
    double rounded_operations_per_s;    // likewise, in 8 bits
};

template <class Work>
double best_seconds(Team& team, const Work& work) {
    double best = 1e9;
    for (int run = 0; run < 5; ++run) {
        const auto started = std::chrono::steady_clock::now();
        team.run([&](int member) { team.share(member, team.size(), [&](int64_t part, int64_t) { work(part); }); });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        best = seconds < best ? seconds : best;
    }
    return best;
}

template <class Element>
Limits measure_limits(Team& team) {
    constexpr int64_t READ_WORDS = int64_t(1) << 25, WORDS = 64, PASSES = 2000, GROUPS = 2;
    constexpr int ROWS = TILE_ROWS;
    Limits found;
    {
        const std::vector<uint32_t> memory(size_t(READ_WORDS), 1u);
        std::atomic<uint32_t> kept{0};
        const double seconds = best_seconds(team, [&](int64_t part) {
            const int64_t share = READ_WORDS / team.size() / (4 * LANES) * (4 * LANES);
            const uint32_t* from = memory.data() + share * part;
            Words sums[4] = {};
            for (int64_t i = 0; i < share; i += 4 * LANES)
                for (int j = 0; j < 4; ++j) sums[j] += load(from + i + j * LANES);
            kept += (sums[0] + sums[1] + sums[2] + sums[3])[0];
        });
        found.read_bytes_per_s = double(READ_WORDS * 4) / seconds;
    }
    {
        const std::vector<uint32_t> panel(size_t(WORDS * PANEL) + 64), input(size_t(ROWS * WORDS));
        const double seconds = best_seconds(team, [&](int64_t) {
            PanelSums sums;
            for (int64_t pass = 0; pass < PASSES; ++pass) {
                multiply_tile<Element, ROWS>(input.data(), WORDS, panel.data(), WORDS,
                                             Ahead{reinterpret_cast<const char*>(panel.data()), 0}, sums);
                asm volatile("" : : "r"(&sums) : "memory");
            }
        });
        found.operations_per_s = 2.0 * double(ROWS * PANEL * WORDS * Element::PER_WORD * PASSES * team.size()) / seconds;
    }
    {
        const std::vector<uint32_t> panel(size_t(GROUPS * PANEL_GROUP_WORDS));
        QuantisedRows rows;
        rows.reserve(RESIDENT_ROWS, GROUPS);
        const double seconds = best_seconds(team, [&](int64_t) {
            PanelSums sums;
            for (int64_t pass = 0; pass < PASSES; ++pass) {
                multiply_quantised_tile<RESIDENT_ROWS>(rows.of_tile(0, GROUPS), GROUPS, panel.data(),
                                                       Ahead{reinterpret_cast<const char*>(panel.data()), 0}, sums);
                asm volatile("" : : "r"(&sums) : "memory");
            }
        });
        found.rounded_operations_per_s = 2.0 * double(RESIDENT_ROWS * PANEL * GROUPS * GROUP * PASSES * team.size()) / seconds;
    }
    return found;
}

}  // namespace pdserve
