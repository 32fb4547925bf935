// Sixteen vectors of sixteen words, the one way round and the other.
#pragma once

#include "vectors.h"

namespace pdserve {

#if defined(__AVX512F__)
// Lane j of vector i becomes lane i of vector j.
inline void transpose(__m512i (&row)[16]) {
    __m512i mixed[16];
    for (int i = 0; i < 16; i += 2) {
        mixed[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        mixed[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(mixed[i], mixed[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(mixed[i], mixed[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(mixed[i + 1], mixed[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(mixed[i + 1], mixed[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i even_low = _mm512_shuffle_i32x4(row[i], row[4 + i], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(row[i], row[4 + i], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0xdd);
        mixed[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        mixed[4 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        mixed[8 + i] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        mixed[12 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
    for (int i = 0; i < 16; ++i) row[i] = mixed[i];
}
#endif

}  // namespace pdserve
