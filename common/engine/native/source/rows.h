// How rows are cut into the tiles that a product computes at once, and rows in the order in which tiles read them.
//
//     packed   [tile][word][row of the tile]: a tile reads one stream, whatever the distance of rows is
#pragma once

#include "transpose.h"

namespace pdserve {

// Tiles of nearly equal height that cover `num_rows`.
struct RowTiles {
    int64_t num_rows, count;

    RowTiles(int64_t rows, int64_t highest) : num_rows(rows), count((rows + highest - 1) / highest) {}
    int64_t first(int64_t tile) const { return num_rows * tile / count; }
    int64_t height(int64_t tile) const { return first(tile + 1) - first(tile); }
    int64_t of_row(int64_t row) const { return ((row + 1) * count - 1) / num_rows; }
};

// Packs the rows of one tile, up to 16. Each row has whole vectors of memory, be they part of it or not.
inline void pack_tile(const uint32_t* rows, int64_t stride_words, int64_t height, int64_t num_words, uint32_t* to) {
    int64_t word = 0;
#if defined(__AVX512F__)
    const __mmask16 present = __mmask16((1u << height) - 1u);
    for (; word < num_words; word += 16) {
        __m512i lines[16];
        for (int64_t row = 0; row < 16; ++row)
            lines[row] = row < height ? _mm512_loadu_si512(rows + row * stride_words + word) : _mm512_setzero_si512();
        transpose(lines);
        const int64_t count = num_words - word < 16 ? num_words - word : 16;
        for (int64_t i = 0; i < count; ++i) _mm512_mask_storeu_epi32(to + (word + i) * height, present, lines[i]);
    }
#endif
    for (; word < num_words; ++word)
        for (int64_t row = 0; row < height; ++row) to[word * height + row] = rows[row * stride_words + word];
}

}  // namespace pdserve
