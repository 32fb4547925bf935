// Rotary positions: values i and i + half of a head are turned together, by the angle of the token's position and of i.
#pragma once

#include "element.h"

namespace pdserve {

// Narrows to `To`'s type what it turns; cosines and sines are `half` long.
template <class To>
inline void turn_head(const float* head, const float* cosines, const float* sines, int64_t half, typename To::Stored* to) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats low = load(head + i), high = load(head + half + i), cosine = load(cosines + i), sine = load(sines + i);
        To::narrow(low * cosine - high * sine, to + i);
        To::narrow(high * cosine + low * sine, to + half + i);
    }
    for (; i < half; ++i) {
        const float low = head[i] * cosines[i] - head[half + i] * sines[i];
        const float high = head[half + i] * cosines[i] + head[i] * sines[i];
        To::narrow(&low, to + i, 1);
        To::narrow(&high, to + half + i, 1);
    }
}

}  // namespace pdserve
