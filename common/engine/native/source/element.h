// What weights, activations and KV are made of: fp32, or bf16 in pairs. Both are handled as 32-bit words.
//
//     fp32   a word is one value;   dot(sum, w, x) = sum + w * x
//     bf16   a word is two values;  dot(sum, w, x) = sum + w.low * x.low + w.high * x.high, in fp32
//
// A matrix product is the same walk over words for both. bf16 rounds to nearest even; NaN stays NaN.
#pragma once

#include "vectors.h"

namespace pdserve {

inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Float32 {
    using Stored = float;
    static constexpr int PER_WORD = 1;

    static inline Floats dot(Floats sum, Words weights, uint32_t input) { return fused((Floats)weights, all(as_float(input)), sum); }
    static inline float widen(Stored value) { return value; }
    static inline Floats widen_vector(const Stored* from) { return load(from); }
    static inline void narrow(const float* from, Stored* to, int64_t count) { memcpy(to, from, size_t(count) * sizeof(float)); }
    static inline void narrow(Floats values, Stored* to) { store(to, values); }

    static inline void from_bytes(const int8_t* from, Stored* to, int64_t count) {
        for (int64_t i = 0; i < count; ++i) to[i] = float(from[i]);
    }

    // Word i = value first + i of the token.
    static inline void interleave(const Stored* const* tokens, int64_t first, int64_t count, uint32_t* to) {
        memcpy(to, tokens[0] + first, size_t(count) * sizeof(float));
    }
};

struct BFloat16 {
    using Stored = uint16_t;
    static constexpr int PER_WORD = 2;

    static inline Floats dot(Floats sum, Words weights, uint32_t input) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(int(input)));
#else
        sum = fused((Floats)(weights << 16), all(as_float(input << 16)), sum);
        return fused((Floats)(weights & 0xffff0000u), all(as_float(input & 0xffff0000u)), sum);
#endif
    }
    static inline float widen(Stored value) { return as_float(uint32_t(value) << 16); }
    static inline Floats widen_vector(const Stored* from) {
        typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
        Halves halves;
        memcpy(&halves, from, sizeof halves);
        return (Floats)(__builtin_convertvector(halves, Words) << 16);
    }
    static inline void narrow(const float* from, Stored* to, int64_t count) {
        int64_t i = 0;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        for (; i + 16 <= count; i += 16) {
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
            memcpy(to + i, &rounded, sizeof rounded);
        }
#endif
        for (; i < count; ++i) {
            const uint32_t bits = as_bits(from[i]);
            const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
            to[i] = Stored(from[i] == from[i] ? rounded : 0x7fc0u);
        }
    }
    static inline void narrow(Floats values, Stored* to) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
        memcpy(to, &rounded, sizeof rounded);
#else
        float all[LANES];
        store(all, values);
        narrow(all, to, LANES);
#endif
    }

    // Exact: integers of 8 bits are bf16 numbers.
    static inline void from_bytes(const int8_t* from, Stored* to, int64_t count) {
        int64_t i = 0;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        for (; i + 32 <= count; i += 32) {
            const auto half = [&](int64_t at) {
                return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at))));
            };
            const __m512bh both = _mm512_cvtne2ps_pbh(half(i + 16), half(i));
            memcpy(to + i, &both, sizeof both);
        }
#endif
        for (; i < count; ++i) to[i] = Stored(as_bits(float(from[i])) >> 16);
    }

    // Word i = value first + i of two neighbouring tokens, the earlier one low.
    static inline void interleave(const Stored* const* tokens, int64_t first, int64_t count, uint32_t* to) {
        const Stored *low = tokens[0] + first, *high = tokens[1] + first;
        int64_t i = 0;
#if defined(__AVX512F__)
        for (; i + 16 <= count; i += 16) {
            __m256i lower, upper;
            memcpy(&lower, low + i, sizeof lower);
            memcpy(&upper, high + i, sizeof upper);
            const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(lower), _mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
            _mm512_storeu_si512(to + i, pairs);
        }
#endif
        for (; i < count; ++i) to[i] = uint32_t(low[i]) | uint32_t(high[i]) << 16;
    }
};

}  // namespace pdserve
