// Rows of words, the one way round and the other.
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

// Four words of each of sixteen rows, beginning at `first`: lane j of vector i is word first + i of row j. Half of it is done by loads.
inline void columns_of(const uint32_t* const* rows, int64_t first, __m512i (&column)[4]) {
    const auto four_of = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + first)); };
    __m512i mixed[4];
    for (int i = 0; i < 4; ++i) {
        mixed[i] = _mm512_castsi128_si512(four_of(i));
        mixed[i] = _mm512_mask_broadcast_i32x4(mixed[i], 0x00f0, four_of(4 + i));
        mixed[i] = _mm512_mask_broadcast_i32x4(mixed[i], 0x0f00, four_of(8 + i));
        mixed[i] = _mm512_mask_broadcast_i32x4(mixed[i], 0xf000, four_of(12 + i));
    }
    const __m512i low = _mm512_unpacklo_epi32(mixed[0], mixed[1]), low_too = _mm512_unpacklo_epi32(mixed[2], mixed[3]);
    const __m512i high = _mm512_unpackhi_epi32(mixed[0], mixed[1]), high_too = _mm512_unpackhi_epi32(mixed[2], mixed[3]);
    column[0] = _mm512_unpacklo_epi64(low, low_too);
    column[1] = _mm512_unpackhi_epi64(low, low_too);
    column[2] = _mm512_unpacklo_epi64(high, high_too);
    column[3] = _mm512_unpackhi_epi64(high, high_too);
}
#endif

}  // namespace pdserve
