// Vectors of 32-bit lanes, as wide as the machine that compiles has them, and the few functions on them that are needed.
//
// All code is written once, for `Floats` and `Words` of LANES lanes; the compiler's vector extension turns plain operators into
// the machine's instructions. Contraction is off (see the flags in build.py): a multiply-add is one exactly where fused() says so,
// so the order and the rounding of a sum are what is written, in every tile shape.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pdserve {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

inline Words load(const uint32_t* from) {
    Words value;
    memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Floats value) { memcpy(to, &value, sizeof value); }

inline Floats all(float value) { return value - Floats{}; }

// a * b + c, rounded once where the machine can.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// b where one of them is not a number.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

// A bit for each lane of `a` that is not below that of `b`, or where one of them is not a number.
inline uint32_t lanes_not_below(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
#else
    uint32_t lanes = 0;
    for (int lane = 0; lane < LANES; ++lane) lanes |= uint32_t(!(a[lane] < b[lane])) << lane;
    return lanes;
#endif
}

// What the lanes come to one after the other.
template <class Vector, class Step>
inline auto folded(const Vector& values, const Step& step) {
    auto found = values[0];
    for (int lane = 1; lane < LANES; ++lane) found = step(found, values[lane]);
    return found;
}

// In one order per machine, whatever the values.
inline float sum(Floats values) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)values);
#else
    return folded(values, [](float a, float b) { return a + b; });
#endif
}

inline float largest(Floats values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)values);
#else
    return folded(values, [](float a, float b) { return b > a ? b : a; });
#endif
}

inline Words larger(Words a, Words b) {
#if defined(__AVX512F__)
    return (Words)_mm512_max_epu32((__m512i)a, (__m512i)b);
#else
    return a > b ? a : b;
#endif
}

inline uint32_t largest(Words values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epu32((__m512i)values);
#else
    return folded(values, [](uint32_t a, uint32_t b) { return b > a ? b : a; });
#endif
}

inline int32_t sum(Integers values) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)values);
#else
    return folded(values, [](int32_t a, int32_t b) { return a + b; });
#endif
}

// The nearest integers, even ones where two are as near; of values below 2^22.
inline Integers nearest(Floats values) {
#if defined(__AVX512F__)
    return (Integers)_mm512_cvtps_epi32((__m512)values);
#else
    const Floats magic = all(12582912.0f);
    return (Integers)(values + magic) - (Integers)magic;
#endif
}

// The lowest byte of each.
inline void store_bytes(int8_t* to, Integers values) {
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    const Bytes bytes = __builtin_convertvector(values, Bytes);
    memcpy(to, &bytes, sizeof bytes);
}

// e^x to about two units in the last place; 0 below -87, never infinite, NaN stays NaN.
inline Floats exponential(Floats x) {
    const Floats lowest = all(-87.0f), magic = all(12582912.0f);
    const Floats bounded = smaller(all(88.0f), larger(lowest, x));
    const Floats turns = fused(bounded, all(1.44269504089f), magic) - magic;
    Floats rest = fused(turns, all(-0.693359375f), bounded);
    rest = fused(turns, all(2.12194440e-4f), rest);
    Floats series = all(1.9875691500e-4f);
    series = fused(series, rest, all(1.3981999507e-3f));
    series = fused(series, rest, all(8.3334519073e-3f));
    series = fused(series, rest, all(4.1665795894e-2f));
    series = fused(series, rest, all(1.6666665459e-1f));
    series = fused(series, rest, all(5.0000001201e-1f));
    series = fused(series, rest * rest, rest + 1.0f);
#if defined(__AVX512F__)
    const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ);  // not what is less; NaN counts
    return (Floats)_mm512_maskz_scalef_ps(counts, (__m512)series, (__m512)turns);
#else
    const Integers exponent = (__builtin_convertvector(turns, Integers) + 127) << 23;
    const Floats result = series * (Floats)exponent;
    return x < lowest ? Floats{} : result;
#endif
}

// 2^x for x that is not above 0, to about two units in the last place; what is smaller than any normal number may be 0, minus
// infinity is 0, NaN stays NaN.
inline Floats power_of_two(Floats x) {
    const Floats lowest = all(-160.0f), magic = all(12582912.0f);
    const Floats bounded = larger(lowest, x);
    const Floats turns = (bounded + magic) - magic, rest = bounded - turns;
    Floats series = all(1.32647e-3f);
    series = fused(series, rest, all(9.67151e-3f));
    series = fused(series, rest, all(5.550734e-2f));
    series = fused(series, rest, all(2.4022242e-1f));
    series = fused(series, rest, all(6.9314698e-1f));
    series = fused(series, rest, all(1.0f));
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)series, (__m512)turns);
#else
    const Integers exponent = (__builtin_convertvector(turns, Integers) + 127) << 23;
    const Floats result = series * (Floats)exponent;
    return x < all(-126.0f) ? Floats{} : result;
#endif
}

// What decides about bits besides the source: lanes of a sum, which multiply-adds are one, whose order of adding up lanes.
inline int64_t arithmetic() {
    int64_t found = LANES;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    found |= 0x100;
#endif
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    found |= 0x200;
#endif
#if defined(__clang__)
    found |= 0x400;
#endif
    return found;
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace pdserve
