// Attention of a few rows over blocks in the KV pool, for one KV head: of one sequence, or of several that begin with the same
// blocks. Keys and values are read in place.
//
//     queries   | token 0: heads of the group | token 1: ... |        the rows of two small matrix products
//     company   tiles of the common blocks are turned once for the queries of all, then each goes on alone with tiles of its own
//     KV tile   64 tokens, starting at multiples of 64: keys turned into panels of 32 tokens, values into panels of 32 dimensions;
//               few queries have a way of their own to the same bits (few_queries.h)
//
// Softmax goes tile by tile in KV order; tiles do not depend on where a chunk or a block begins. So a row's result does not depend
// on the rows beside it.
#pragma once

#include "few_queries.h"

namespace pdserve {

static_assert(TILE_STEP % PANEL == 0);

// panel[word][token] = word `word` of token `token`, for 32 tokens.
inline void turn(const uint32_t* const* tokens, int64_t num_words, uint32_t* panel) {
    int64_t word = 0;
#if defined(__AVX512F__)
    for (; word + 16 <= num_words; word += 16) {
        for (int half = 0; half < PANEL; half += 16) {
            __m512i row[16];
            for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(tokens[half + i] + word);
            transpose(row);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + (word + i) * PANEL + half, row[i]);
        }
    }
#endif
    for (int token = 0; token < PANEL; ++token)
        for (int64_t rest = word; rest < num_words; ++rest) {
            uint32_t value;
            memcpy(&value, tokens[token] + rest, sizeof value);
            panel[rest * PANEL + token] = value;
        }
}

// What many queries of a stretch have come to after a tile: its keys and values are turned once, in memory, for all of them.
template <class Element>
void attend_to_tile(const TileRows<typename Element::Stored>& tile, int64_t start, const Stretch& stretch, int64_t group,
                    const uint32_t* queries, bool rounded, AttentionScratch<Element>& scratch,
                    const TileRows<typename Element::Stored>& next, int64_t next_row_values) {
    using Stored = typename Element::Stored;
    const int64_t head_dim = scratch.head_dim, head_words = head_dim / Element::PER_WORD, padded_dim = scratch.padded_dim;
    const int64_t panels = tile.width / PANEL, width = tile.width, width_words = width / Element::PER_WORD;
    for (int64_t panel = 0; panel < panels; ++panel) {
        turn(reinterpret_cast<const uint32_t* const*>(tile.keys + panel * PANEL), head_words,
             scratch.keys.data() + panel * head_words * PANEL);
        fetch(next, panel * 8, panel * 8 + 8, next_row_values);
    }
    for (int64_t dim = 0; dim < head_dim; dim += PANEL) {
        uint32_t* to = scratch.values.data() + dim * width_words;
        for (int64_t word = 0; word < width_words; ++word, to += PANEL) {
            const Stored* const* tokens = tile.values + word * Element::PER_WORD;
            if (dim == 0) fetch(next, 16 + 2 * word, 18 + 2 * word, next_row_values);
            if (dim + PANEL <= head_dim)
                Element::interleave(tokens, dim, PANEL, to);
            else
                Element::interleave(tokens, dim, head_dim - dim, to);
        }
    }

    // Rows that stand before this tile see nothing of it.
    const int64_t unseeing = start > stretch.position ? (start - stretch.position) * group : 0;
    const int64_t first = stretch.first + unseeing, last = stretch.first + stretch.count, seeing = last - first;
    for (int64_t panel = 0; panel < panels; ++panel)
        multiply_panel<Element>(seeing, queries + first * head_words, head_words,
                                scratch.keys.data() + panel * head_words * PANEL, head_words,
                                [&](int64_t offset, int64_t rows, const PanelSums& sums) {
                                    for (int64_t row = 0; row < rows; ++row)
                                        memcpy(&scratch.scores[size_t((first + offset + row) * TILE_TOKENS + panel * PANEL)],
                                               sums.of[row], PANEL * sizeof(float));
                                });
    weigh(first, last, stretch, start, width, group, rounded, scratch);
    for (int64_t dim = 0; dim < padded_dim; dim += PANEL)
        multiply_panel<Element>(seeing, &scratch.weights[size_t(first * (TILE_TOKENS / Element::PER_WORD))],
                                TILE_TOKENS / Element::PER_WORD, scratch.values.data() + dim * width_words, width_words,
                                [&](int64_t offset, int64_t rows, const PanelSums& sums) {
                                    for (int64_t row = 0; row < rows; ++row) {
                                        const int64_t query = first + offset + row;
                                        float* output = &scratch.output[size_t(query * padded_dim + dim)];
                                        const Floats shrink = all(scratch.shrink[size_t(query)]);
                                        for (int i = 0; i < PANEL; i += LANES)
                                            store(output + i, fused(load(output + i), shrink, load(sums.of[row] + i)));
                                    }
                                });
}

// Attends to all tiles of a stretch. What its queries have come to is kept in the scratch.
template <class Element>
void walk(const Pool<Element>& pool, int64_t layer, int64_t kv_head, const Stretch& stretch, int64_t group, const uint32_t* queries,
          AttentionScratch<Element>& scratch, const Upcoming& upcoming) {
    TileRows<typename Element::Stored> tiles[2];
    const auto* nothing = scratch.nothing.data();
    if (stretch.begin < stretch.end)
        locate(pool, layer, kv_head, stretch.table, stretch.begin, stretch.end, nothing, tiles[stretch.begin / TILE_TOKENS % 2]);
    for (int64_t start = stretch.begin; start < stretch.end; start += TILE_TOKENS) {
        auto &tile = tiles[start / TILE_TOKENS % 2], &next = tiles[(start / TILE_TOKENS + 1) % 2];
        next.width = 0;
        if (start + TILE_TOKENS < stretch.end)
            locate(pool, layer, kv_head, stretch.table, start + TILE_TOKENS, stretch.end, nothing, next);
        else if (upcoming.table)
            locate(pool, upcoming.layer, upcoming.kv_head, upcoming.table, 0, upcoming.end, nothing, next);
        if (pool.rounded) widen<Element>(tile, pool.head_dim, scratch);
#if defined(PDSERVE_FEW_QUERIES)
        if constexpr (Element::PER_WORD == 2)
            if (suits_few_queries(pool.head_dim, stretch.count)) {
                attend_few_to_tile(tile, start, stretch, group, queries, pool.rounded, scratch, next);
                continue;
            }
#endif
        attend_to_tile<Element>(tile, start, stretch, group, queries, pool.rounded, scratch, next, pool.row_values);
    }
}

// `queries` holds the heads of all rows of the company, already turned, in its order. The first `shared` tokens, a whole number of
// tiles, lie in the same blocks for all of them and before all rows.
template <class Element>
void attend(const Pool<Element>& pool, int64_t layer, int64_t kv_head,
            const std::vector<Attending<typename Element::Stored>>& company, int64_t shared, int64_t group, const uint32_t* queries,
            AttentionScratch<Element>& scratch, int64_t row_stride, const Upcoming& upcoming) {
    const int64_t head_dim = pool.head_dim, padded_dim = scratch.padded_dim;
    int64_t num_queries = 0;
    for (const auto& own : company) num_queries += own.num_rows * group;
    for (int64_t query = 0; query < num_queries; ++query) {
        scratch.highest[query] = -__builtin_inff();
        scratch.total[query] = 0.0f;
    }
    memset(scratch.output.data(), 0, size_t(num_queries * padded_dim) * sizeof(float));
    walk(pool, layer, kv_head, {company[0].table, 0, shared, shared, 0, num_queries}, group, queries, scratch, {});
    int64_t first = 0;
    for (const auto& own : company) {
        const Stretch stretch{own.table, shared, own.position + own.num_rows, own.position, first, own.num_rows * group};
        walk(pool, layer, kv_head, stretch, group, queries, scratch, &own == &company.back() ? upcoming : Upcoming{});
        for (int64_t query = 0; query < own.num_rows * group; ++query) {
            float* output = &scratch.output[(first + query) * padded_dim];
            const Floats share = all(1.0f / scratch.total[first + query]);
            for (int64_t i = 0; i < padded_dim; i += LANES) store(output + i, load(output + i) * share);
            Element::narrow(output, own.to + query / group * row_stride + query % group * head_dim, head_dim);
        }
        first += own.num_rows * group;
    }
}

}  // namespace pdserve
