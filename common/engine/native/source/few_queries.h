// Attention of few queries to a tile, in the registers of a machine that multiplies pairs of bf16.
//
//     keys      16 tokens at a time: 16 words of each turned around, so that a lane is a token, and multiplied at once
//     values    two tokens at a time: their dimensions paired, and multiplied at once
//
// Nothing is written but scores and outputs, which pays as long as there are no more queries than turning is worth. A score, or an
// output, is the same chain of multiply-adds as of many queries (attention.h), bit by bit. Memory is what one waits for, so the next
// tile is asked for meanwhile, a line or two between any two products.
#pragma once

#include "transpose.h"
#include "weighing.h"

namespace pdserve {

constexpr int64_t FEW_QUERIES = 8;
constexpr int QUERIES_IN_REGISTERS = 4;

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__)
#define PDSERVE_FEW_QUERIES

// Whether so many queries, in bf16, are few, and such heads fit.
inline bool suits_few_queries(int64_t head_dim, int64_t num_queries) { return head_dim % 64 == 0 && num_queries <= FEW_QUERIES; }

// Lines of memory of the rows that are read next, in pairs; of rows that nobody knows, ours, which are there already.
struct NextRows {
    const uint16_t* const* rows;

    NextRows(const TileRows<uint16_t>& next, const uint16_t* const* of_next, const uint16_t* const* ours, int64_t token)
        : rows(token < next.width ? of_next + token : ours + token) {}

    void fetch(int64_t row, int64_t offset_bytes) const {
        __builtin_prefetch(reinterpret_cast<const char*>(rows[row]) + offset_bytes, 0, 3);
    }
};

template <int COUNT>
void score_few(const TileRows<uint16_t>& tile, int64_t head_words, const uint32_t* queries, float* scores,
               const TileRows<uint16_t>& next) {
    for (int64_t token = 0; token < tile.width; token += 16) {
        const NextRows coming(next, next.keys, tile.keys, token);
        __m512 total[COUNT];
        for (int query = 0; query < COUNT; ++query) total[query] = _mm512_setzero_ps();
        for (int64_t word = 0; word < head_words; word += 16) {
            __m512i lines[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) lines[i] = _mm512_loadu_si512(reinterpret_cast<const uint32_t*>(tile.keys[token + i]) + word);
            transpose(lines);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                coming.fetch(i, word * int64_t(sizeof(uint32_t)));
#pragma GCC unroll 4
                for (int query = 0; query < COUNT; ++query) {
                    const __m512bh value = (__m512bh)_mm512_set1_epi32(int(queries[query * head_words + word + i]));
                    total[query] = _mm512_dpbf16_ps(total[query], (__m512bh)lines[i], value);
                }
            }
        }
        for (int query = 0; query < COUNT; ++query) _mm512_storeu_ps(scores + query * TILE_TOKENS + token, total[query]);
    }
}

// output = output * shrink + the tile's values by their weights, 64 dimensions at a time.
template <int COUNT>
void add_values_of_few(const TileRows<uint16_t>& tile, int64_t head_dim, const uint32_t* weights, const float* shrink, float* output,
                       int64_t padded_dim, const TileRows<uint16_t>& next) {
    alignas(64) static constexpr uint16_t PAIRS[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(PAIRS), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t dim = 0; dim < head_dim; dim += 64) {
        __m512 total[COUNT][4];
        for (int query = 0; query < COUNT; ++query)
            for (int v = 0; v < 4; ++v) total[query][v] = _mm512_setzero_ps();
        for (int64_t token = 0; token < tile.width; token += 2) {
            const NextRows coming(next, next.values, tile.values, token);
            const uint16_t *even = tile.values[token] + dim, *odd = tile.values[token + 1] + dim;
            const __m512i even_low = _mm512_loadu_si512(even), even_high = _mm512_loadu_si512(even + 32);
            const __m512i odd_low = _mm512_loadu_si512(odd), odd_high = _mm512_loadu_si512(odd + 32);
            const __m512i pairs[4] = {
                _mm512_permutex2var_epi16(even_low, low, odd_low), _mm512_permutex2var_epi16(even_low, high, odd_low),
                _mm512_permutex2var_epi16(even_high, low, odd_high), _mm512_permutex2var_epi16(even_high, high, odd_high)};
            for (int64_t row = 0; row < 2; ++row) {
                coming.fetch(row, dim * int64_t(sizeof(uint16_t)));
                coming.fetch(row, dim * int64_t(sizeof(uint16_t)) + 64);
            }
#pragma GCC unroll 4
            for (int query = 0; query < COUNT; ++query) {
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(int(weights[(query * TILE_TOKENS + token) / 2]));
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) total[query][v] = _mm512_dpbf16_ps(total[query][v], (__m512bh)pairs[v], weight);
            }
        }
        for (int query = 0; query < COUNT; ++query)
            for (int v = 0; v < 4; ++v) {
                float* to = output + query * padded_dim + dim + 16 * v;
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(shrink[query]), total[query][v]));
            }
    }
}

template <int COUNT>
void attend_few(const TileRows<uint16_t>& tile, int64_t start, const Stretch& stretch, int64_t first, int64_t group,
                const uint32_t* queries, bool rounded, AttentionScratch<BFloat16>& scratch, const TileRows<uint16_t>& next) {
    const int64_t head_dim = scratch.head_dim, head_words = head_dim / 2, padded_dim = scratch.padded_dim;
    score_few<COUNT>(tile, head_words, queries + first * head_words, scratch.scores.data(), next);
    weigh(first, COUNT, stretch, start, tile.width, group, rounded, scratch);
    add_values_of_few<COUNT>(tile, head_dim, scratch.weights.data(), scratch.shrink.data(), &scratch.output[size_t(first * padded_dim)],
                             padded_dim, next);
}

// As attend_to_tile.
inline void attend_few_to_tile(const TileRows<uint16_t>& tile, int64_t start, const Stretch& stretch, int64_t group,
                               const uint32_t* queries, bool rounded, AttentionScratch<BFloat16>& scratch,
                               const TileRows<uint16_t>& next) {
    const int64_t unseeing = start > stretch.position ? (start - stretch.position) * group : 0, seeing = stretch.count - unseeing;
    const RowTiles parts(seeing, QUERIES_IN_REGISTERS);
    for (int64_t part = 0; part < parts.count; ++part) {
        const int64_t first = stretch.first + unseeing + parts.first(part);
        const TileRows<uint16_t>& asked = part == 0 ? next : tile;
        switch (parts.height(part)) {
            case 1: attend_few<1>(tile, start, stretch, first, group, queries, rounded, scratch, asked); break;
            case 2: attend_few<2>(tile, start, stretch, first, group, queries, rounded, scratch, asked); break;
            case 3: attend_few<3>(tile, start, stretch, first, group, queries, rounded, scratch, asked); break;
            default: attend_few<4>(tile, start, stretch, first, group, queries, rounded, scratch, asked);
        }
    }
}

#endif

}  // namespace pdserve
