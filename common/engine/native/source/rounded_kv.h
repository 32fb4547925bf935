// Keys and values in 8 bits: a row is the values of one token in one head, each rounded to one of 255 steps, and their step.
//
//     row    | head_dim bytes, padded to whole words | scale: fp32 |        value = byte * scale
//
// A row's rounding depends on the row alone. Rows of zeros have the scale 0; what is not finite makes the whole row NaN.
#pragma once

#include "rounding.h"

namespace pdserve {

inline int64_t scale_offset(int64_t head_dim) { return round_up(head_dim, 4); }

// The room of a row, in values of the model's type.
template <class Stored>
inline int64_t row_values(int64_t head_dim, bool rounded) {
    return rounded ? (scale_offset(head_dim) + int64_t(sizeof(float))) / int64_t(sizeof(Stored)) : head_dim;
}

inline float scale_of_row(const void* row, int64_t head_dim) {
    float scale;
    memcpy(&scale, static_cast<const char*>(row) + scale_offset(head_dim), sizeof scale);
    return scale;
}

inline void round_row(const float* from, int64_t head_dim, void* row) {
    float values[512];
    const int64_t width = round_up(head_dim, LANES);
    memcpy(values, from, size_t(head_dim) * sizeof(float));
    for (int64_t i = head_dim; i < width; ++i) values[i] = 0.0f;
    Floats most = {}, strange = {};
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats value = load(values + i);
        most = larger(most, larger(value, -value));
        strange += value - value;  // not zero for what is not finite
    }
    const bool finite = sum(strange) == 0.0f;
    const float highest = finite ? largest(most) : 0.0f;
    const float inverse = highest > SMALLEST ? 127.0f / highest : 0.0f;
    const float scale = finite ? highest / 127.0f : __builtin_nanf("");
    int8_t* to = static_cast<int8_t*>(row);
    for (int64_t i = 0; i < head_dim; ++i) to[i] = int8_t(__builtin_rintf((finite ? values[i] : 0.0f) * inverse));
    for (int64_t i = head_dim; i < scale_offset(head_dim); ++i) to[i] = 0;
    memcpy(to + scale_offset(head_dim), &scale, sizeof scale);
}

}  // namespace pdserve
