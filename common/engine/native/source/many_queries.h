// Attention of many queries to a tile, whose keys and values are turned around once for all of them.
//
//     keys      [word of a key][token]: a lane is a token               values   [pair of tokens][dimension]: a lane is a dimension
//     queries   a few at a time, all sums in registers: scores of the tile -> weights -> outputs
//
// What a few queries need of scores and weights stays in the first-level cache beside the turned tile. A score, or an output, is one
// chain of multiply-adds over k = 0, 1, 2, ..., whichever queries go together.
#pragma once

#include "rows.h"
#include "transpose.h"
#include "weighing.h"

namespace pdserve {

static_assert(TILE_STEP % PANEL == 0 && PANEL % LANES == 0);

constexpr int SUM_VECTORS = 4;                    // of a query that are in registers at a time
constexpr int SUM_QUERIES = LANES == 16 ? 6 : 2;  // that have them there together
static_assert(SUM_QUERIES <= QUERIES_TOGETHER);

// to[word * TILE_TOKENS + token] = word `word` of token `token`.
inline void turn_keys(const uint32_t* const* tokens, int64_t num_tokens, int64_t num_words, uint32_t* to) {
    int64_t word = 0;
#if defined(__AVX512F__)
    for (; word + 16 <= num_words; word += 16)
        for (int64_t token = 0; token < num_tokens; token += 16) {
            __m512i row[16];
            for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(tokens[token + i] + word);
            transpose(row);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (word + i) * TILE_TOKENS + token, row[i]);
        }
#endif
    for (; word < num_words; ++word)
        for (int64_t token = 0; token < num_tokens; ++token) memcpy(to + word * TILE_TOKENS + token, tokens[token] + word, sizeof *to);
}

// Rows of `input` against VECTORS vectors of columns; finish(row, vector, sum) for each.
template <class Element, int ROWS, int VECTORS, class Finish>
inline void multiply_columns(const uint32_t* input, int64_t row_words, const uint32_t* columns, int64_t stride_words,
                             int64_t num_words, const Finish& finish) {
    Floats total[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < num_words; ++k) {
        Words words[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) words[v] = load(columns + k * stride_words + v * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) total[row][v] = Element::dot(total[row][v], words[v], input[row * row_words + k]);
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) finish(row, v, total[row][v]);
}

// The same of `width` columns, a multiple of PANEL; finish(row, column, sum).
template <class Element, int ROWS, class Finish>
inline void multiply_all_columns(const uint32_t* input, int64_t row_words, const uint32_t* columns, int64_t stride_words,
                                 int64_t num_words, int64_t width, const Finish& finish) {
    int64_t first = 0;
    const auto tell = [&](int row, int vector, Floats sum) { finish(row, first + vector * LANES, sum); };
    for (; first + SUM_VECTORS * LANES <= width; first += SUM_VECTORS * LANES)
        multiply_columns<Element, ROWS, SUM_VECTORS>(input, row_words, columns + first, stride_words, num_words, tell);
    if constexpr (SUM_VECTORS * LANES > PANEL)
        if (first < width)
            multiply_columns<Element, ROWS, PANEL / LANES>(input, row_words, columns + first, stride_words, num_words, tell);
}

template <class Element, int ROWS>
void attend_in_registers(int64_t first, int64_t width, int64_t start, const Stretch& stretch, int64_t group, const uint32_t* queries,
                         bool rounded, AttentionScratch<Element>& scratch) {
    const int64_t head_words = scratch.head_dim / Element::PER_WORD, padded_dim = scratch.padded_dim;
    multiply_all_columns<Element, ROWS>(
        queries + first * head_words, head_words, scratch.keys.data(), TILE_TOKENS, head_words, width,
        [&](int row, int64_t token, Floats sum) { store(&scratch.scores[size_t(row * TILE_TOKENS + token)], sum); });
    weigh(first, ROWS, stretch, start, width, group, rounded, scratch);
    float* output = &scratch.output[size_t(first * padded_dim)];
    multiply_all_columns<Element, ROWS>(
        scratch.weights.data(), WEIGHT_WORDS<Element>, scratch.values.data(), padded_dim, width / Element::PER_WORD, padded_dim,
        [&](int row, int64_t dim, Floats sum) {
            float* to = output + row * padded_dim + dim;
            store(to, fused(load(to), all(scratch.shrink[size_t(row)]), sum));
        });
}

// `rows` queries go together, a number known only at run time.
template <class Element, int ROWS = SUM_QUERIES>
inline void attend_some(int64_t rows, int64_t first, int64_t width, int64_t start, const Stretch& stretch, int64_t group,
                        const uint32_t* queries, bool rounded, AttentionScratch<Element>& scratch) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS)
            return attend_some<Element, ROWS - 1>(rows, first, width, start, stretch, group, queries, rounded, scratch);
    }
    attend_in_registers<Element, ROWS>(first, width, start, stretch, group, queries, rounded, scratch);
}

// What many queries of a stretch have come to after a tile. The next one is asked for meanwhile.
template <class Element>
void attend_many_to_tile(const TileRows<typename Element::Stored>& tile, int64_t start, const Stretch& stretch, int64_t group,
                         const uint32_t* queries, bool rounded, AttentionScratch<Element>& scratch,
                         const TileRows<typename Element::Stored>& next, int64_t next_row_values) {
    const int64_t head_dim = scratch.head_dim;
    turn_keys(reinterpret_cast<const uint32_t* const*>(tile.keys), tile.width, head_dim / Element::PER_WORD, scratch.keys.data());
    for (int64_t word = 0; word < tile.width / Element::PER_WORD; ++word)
        Element::interleave(tile.values + word * Element::PER_WORD, 0, head_dim, scratch.values.data() + word * scratch.padded_dim);

    // Rows that stand before this tile see nothing of it.
    const int64_t unseeing = start > stretch.position ? (start - stretch.position) * group : 0;
    const RowTiles parts(stretch.count - unseeing, SUM_QUERIES);
    for (int64_t part = 0; part < parts.count; ++part) {
        fetch(next, TILE_TOKENS * part / parts.count, TILE_TOKENS * (part + 1) / parts.count, next_row_values);
        attend_some<Element>(parts.height(part), stretch.first + unseeing + parts.first(part), tile.width, start, stretch, group,
                             queries, rounded, scratch);
    }
}

}  // namespace pdserve
