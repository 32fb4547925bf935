// The largest logit of a row among those that may come, found while the panels of the head are computed: no logit is stored.
//
// Equal logits are ordered by token id. A row in which any logit is above all numbers or none, or in which none that may come is
// finite, has no token.
#pragma once

#include <cmath>
#include <limits>

#include "product.h"

namespace pdserve {

constexpr int64_t NO_TOKEN = -1;

// One member's account of one row; panels may come in any order.
struct BestToken {
    float logit = -std::numeric_limits<float>::infinity();
    bool broken = false;
    int64_t token = NO_TOKEN;

    void take(float other, int64_t other_token) {
        if (other > logit || (other == logit && other_token < token)) {
            logit = other;
            token = other_token;
        }
    }

    // The logits of `count` tokens from `first` on; bit i of `may_come` is token first + i. What lies behind them is no logit.
    void see(const float* logits, int64_t first, int64_t count, uint32_t may_come) {
        const uint32_t there = count < PANEL ? (1u << count) - 1 : ~0u;
        uint32_t odd = 0, candidates = 0;
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            const Floats values = load(logits + v * LANES);
            odd |= lanes_not_below(values, all(std::numeric_limits<float>::infinity())) << (v * LANES);
            candidates |= lanes_not_below(values, all(logit)) << (v * LANES);
        }
        broken |= (odd & there) != 0;
        for (candidates &= there & may_come; candidates; candidates &= candidates - 1) {
            const int lane = __builtin_ctz(candidates);
            take(logits[lane], first + lane);
        }
    }

    void merge(const BestToken& other) {
        broken |= other.broken;
        take(other.logit, other.token);
    }

    int64_t found() const { return broken ? NO_TOKEN : token; }
};

}  // namespace pdserve
