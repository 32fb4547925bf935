// Floats in 16 bits (IEEE half precision), as scales of weights are stored; every one of them is a float of 32 bits exactly.
#pragma once

#include "element.h"

namespace pdserve {

inline float widen_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = half & 0x7fffu;
    const uint32_t bits = rest >= 0x7c00u ? rest << 13 | 0x7f800000u : as_bits(as_float(rest << 13) * 0x1p112f);
    return as_float(sign | bits);
}

inline Floats load_halves(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Floats value;
    for (int lane = 0; lane < LANES; ++lane) value[lane] = widen_half(from[lane]);
    return value;
#endif
}

}  // namespace pdserve
