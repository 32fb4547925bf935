// Values in 8 bits with one scale for all of them: each the nearest of 255 steps, the largest 127 steps from zero.
//
// What is missing up to a whole number of vectors is zero. Values none of which is larger than SMALLEST are zeros: their steps would
// not be. What is not finite makes the scale NaN, for broken memory must not look like zeros.
#pragma once

#include "element.h"

namespace pdserve {

constexpr float SMALLEST = 1e-30f;
constexpr float STEPS = 127.0f;

struct Rounded {
    float scale;
    int32_t total;  // of the steps
};

// Of `count` values, WIDTH at most; writes WIDTH steps.
template <class Element, int WIDTH>
inline Rounded round_values(const typename Element::Stored* from, int64_t count, int8_t* to) {
    static_assert(WIDTH % LANES == 0);
    typename Element::Stored padded[WIDTH];
    if (count < WIDTH) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, from, size_t(count) * sizeof *from);
        from = padded;
    }
    Floats values[WIDTH / LANES];
    Words most = {};
    for (int i = 0; i < WIDTH / LANES; ++i) {
        values[i] = Element::widen_vector(from + i * LANES);
        most = larger(most, (Words)values[i] & 0x7fffffffu);  // of floats without their signs, the order is that of their bits
    }
    const float highest = as_float(largest(most));
    const bool finite = highest - highest == 0.0f;
    const Floats inverse = all(finite && highest > SMALLEST ? STEPS / highest : 0.0f);
    Integers total = {};
    for (int i = 0; i < WIDTH / LANES; ++i) {
        const Integers step = nearest(finite ? values[i] * inverse : Floats{});
        total += step;
        store_bytes(to + i * LANES, step);
    }
    return {finite ? highest / STEPS : __builtin_nanf(""), sum(total)};
}

}  // namespace pdserve
