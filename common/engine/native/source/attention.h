// Attention of a few rows over blocks in the KV pool, for one KV head: of one sequence, or of several that begin with the same
// blocks. Keys and values are read in place.
//
//     queries   | token 0: heads of the group | token 1: ... |        the rows of two small matrix products
//     company   tiles of the common blocks are turned once for the queries of all, then each goes on alone with tiles of its own
//     KV tile   64 tokens, starting at multiples of 64: keys turned into panels of 32 tokens, values into panels of 32 dimensions
//
// Softmax is online, in fp32, tile by tile in KV order; tiles do not depend on where a chunk or a block begins. A masked token has
// weight zero and adds nothing. So a row's result does not depend on the rows beside it.
//
// Keys and values in 8 bits (rounded_kv.h) are made values of the model's type tile by tile, without their scales: those of keys
// go to the scores, those of values to the weights.
#pragma once

#include "product.h"
#include "rounded_kv.h"

namespace pdserve {

constexpr int64_t TILE_TOKENS = 64;
constexpr int64_t QUERIES_AT_ONCE = 64;  // rows of a chunk are worked off in groups of about so many queries

// The pool as [block][layer][kv_head][K,V][token][head_dim, or a rounded row].
template <class Element>
struct Pool {
    using Stored = typename Element::Stored;
    Stored* values;
    int64_t block_tokens, head_dim, num_kv_heads, num_layers;
    int64_t row_values;  // of the room of a row
    bool rounded;

    Stored* keys_of(int64_t block, int64_t layer, int64_t kv_head) const {
        return values + ((block * num_layers + layer) * num_kv_heads + kv_head) * 2 * block_tokens * row_values;
    }
    int64_t values_offset() const { return block_tokens * row_values; }
};

// Consecutive rows of one sequence, the first of them at `position`. The result of head g of row r goes to
// `to + r * row_stride + g * head_dim`.
template <class Stored>
struct Attending {
    const int64_t* table;
    int64_t position, num_rows;
    Stored* to;
};

// What one thread needs to attend; sized once for a model.
template <class Element>
struct AttentionScratch {
    using Stored = typename Element::Stored;
    int64_t most_queries, padded_dim;
    std::vector<Attending<Stored>> company;
    std::vector<uint32_t> queries;  // of several sequences, side by side
    std::vector<float> scores, output, highest, total, shrink;
    std::vector<uint32_t> keys, values, weights;
    std::vector<Stored> nothing, widened;
    std::vector<float> key_scales, value_scales;

    AttentionScratch(int64_t group, int64_t head_dim)
        : most_queries(group > QUERIES_AT_ONCE ? group : QUERIES_AT_ONCE),
          padded_dim(round_up(head_dim, PANEL)),
          queries(size_t(most_queries * head_dim)),
          scores(size_t(most_queries * TILE_TOKENS)),
          output(size_t(most_queries * padded_dim)),
          highest(size_t(most_queries)),
          total(size_t(most_queries)),
          shrink(size_t(most_queries)),
          keys(size_t(TILE_TOKENS * head_dim)),
          values(size_t(TILE_TOKENS * padded_dim)),
          weights(size_t(most_queries * TILE_TOKENS)),
          nothing(size_t(head_dim + 8)),
          widened(size_t(2 * TILE_TOKENS * head_dim)),
          key_scales(size_t(TILE_TOKENS)),
          value_scales(size_t(TILE_TOKENS)) {}
};

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

// Where the keys and values of one tile lie; past the end of the sequence, rows of zeros up to whole panels.
template <class Stored>
struct TileRows {
    int64_t width;
    const Stored *keys[TILE_TOKENS], *values[TILE_TOKENS];
};

// Finds a tile's rows, block by block.
template <class Element>
void locate(const Pool<Element>& pool, int64_t layer, int64_t kv_head, const int64_t* table, int64_t start, int64_t end,
            const typename Element::Stored* nothing, TileRows<typename Element::Stored>& tile) {
    const int64_t held = end - start < TILE_TOKENS ? end - start : TILE_TOKENS;
    int64_t block = start / pool.block_tokens, offset = start % pool.block_tokens, found = 0;
    for (; found < held; ++block, offset = 0) {
        const int64_t rest = pool.block_tokens - offset, count = held - found < rest ? held - found : rest;
        const auto* keys = pool.keys_of(table[block], layer, kv_head) + offset * pool.row_values;
        for (int64_t i = 0; i < count; ++i, ++found) {
            tile.keys[found] = keys + i * pool.row_values;
            tile.values[found] = tile.keys[found] + pool.values_offset();
        }
    }
    tile.width = round_up(held, PANEL);
    for (; found < tile.width; ++found) tile.keys[found] = tile.values[found] = nothing;
}

// Makes rounded rows rows of the model's type, and sets their scales aside.
template <class Element>
void widen(TileRows<typename Element::Stored>& tile, int64_t head_dim, AttentionScratch<Element>& scratch) {
    auto* to = scratch.widened.data();
    const auto widen_row = [&](const auto*& row, float& scale) {
        scale = scale_of_row(row, head_dim);
        Element::from_bytes(reinterpret_cast<const int8_t*>(row), to, head_dim);
        row = to;
        to += head_dim;
    };
    for (int64_t token = 0; token < tile.width; ++token) {
        widen_row(tile.keys[token], scratch.key_scales[size_t(token)]);
        widen_row(tile.values[token], scratch.value_scales[size_t(token)]);
    }
}

// Asks for the memory of a few tokens of a tile that will be used next. A little at a time: the queue for memory is short.
template <class Stored>
inline void fetch(const TileRows<Stored>& tile, int64_t first, int64_t end, int64_t row_values) {
    for (int64_t token = first; token < end && token < tile.width; ++token)
        for (int64_t offset = 0; offset < row_values * int64_t(sizeof(Stored)); offset += 64) {
            __builtin_prefetch(reinterpret_cast<const char*>(tile.keys[token]) + offset, 0, 2);
            __builtin_prefetch(reinterpret_cast<const char*>(tile.values[token]) + offset, 0, 2);
        }
}

// Queries [first_query, first_query + num_queries) over the tokens [begin, end) of a sequence, the first of which begins a tile;
// the first of these queries stands at `position`. What they have come to is kept in the scratch.
template <class Element>
void walk(const Pool<Element>& pool, int64_t layer, int64_t kv_head, const int64_t* table, int64_t begin, int64_t end,
          int64_t position, int64_t first_query, int64_t num_queries, int64_t group, const uint32_t* queries,
          AttentionScratch<Element>& scratch) {
    using Stored = typename Element::Stored;
    constexpr int64_t PER_WORD = Element::PER_WORD;
    const int64_t head_dim = pool.head_dim, head_words = head_dim / PER_WORD, padded_dim = scratch.padded_dim;
    const Floats scale = all(1.0f / __builtin_sqrtf(float(head_dim)));
    const Floats never = all(-__builtin_inff());
    Integers lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;

    TileRows<Stored> tiles[2];
    locate(pool, layer, kv_head, table, begin, end, scratch.nothing.data(), tiles[begin / TILE_TOKENS % 2]);
    for (int64_t start = begin; start < end; start += TILE_TOKENS) {
        TileRows<Stored>& tile = tiles[start / TILE_TOKENS % 2];
        TileRows<Stored>& next = tiles[(start / TILE_TOKENS + 1) % 2];
        next.width = 0;
        if (start + TILE_TOKENS < end) locate(pool, layer, kv_head, table, start + TILE_TOKENS, end, scratch.nothing.data(), next);
        if (pool.rounded) widen<Element>(tile, head_dim, scratch);
        const int64_t panels = tile.width / PANEL, width = tile.width;
        for (int64_t panel = 0; panel < panels; ++panel) {
            turn(reinterpret_cast<const uint32_t* const*>(tile.keys + panel * PANEL), head_words,
                 scratch.keys.data() + panel * head_words * PANEL);
            fetch(next, panel * 8, panel * 8 + 8, pool.row_values);
        }
        const int64_t width_words = width / PER_WORD;
        for (int64_t dim = 0; dim < head_dim; dim += PANEL) {
            uint32_t* to = scratch.values.data() + dim * width_words;
            for (int64_t word = 0; word < width_words; ++word, to += PANEL) {
                const Stored* const* tokens = tile.values + word * PER_WORD;
                if (dim == 0) fetch(next, 16 + 2 * word, 18 + 2 * word, pool.row_values);
                if (dim + PANEL <= head_dim)
                    Element::interleave(tokens, dim, PANEL, to);
                else
                    Element::interleave(tokens, dim, head_dim - dim, to);
            }
        }

        // Rows that stand before this tile see nothing of it.
        const int64_t unseeing = start > position ? (start - position) * group : 0;
        const int64_t first = first_query + unseeing, last = first_query + num_queries, seeing = last - first;
        for (int64_t panel = 0; panel < panels; ++panel)
            multiply_panel<Element>(seeing, queries + first * head_words, head_words,
                                    scratch.keys.data() + panel * head_words * PANEL, head_words,
                                    [&](int64_t offset, int64_t rows, const PanelSums& sums) {
                                        for (int64_t row = 0; row < rows; ++row)
                                            memcpy(&scratch.scores[(first + offset + row) * TILE_TOKENS + panel * PANEL],
                                                   sums.of[row], PANEL * sizeof(float));
                                    });
        for (int64_t query = first; query < last; ++query) {
            float* scores = &scratch.scores[query * TILE_TOKENS];
            const int64_t seen = position + (query - first_query) / group + 1 - start;
            Floats best = all(scratch.highest[query]);
            for (int64_t i = 0; i < width; i += LANES) {
                const Floats scaled = load(scores + i) * (pool.rounded ? scale * load(&scratch.key_scales[size_t(i)]) : scale);
                const Floats value = lane + int(i) < Integers{} + int(seen < width ? seen : width) ? scaled : never;
                best = larger(value, best);
                store(scores + i, value);
            }
            const float highest = largest(best);
            Floats added = {};
            for (int64_t i = 0; i < width; i += LANES) {
                const Floats weight = exponential(load(scores + i) - highest);
                added += weight;
                store(scores + i, pool.rounded ? weight * load(&scratch.value_scales[size_t(i)]) : weight);
            }
            const float shrink = exponential(all(scratch.highest[query] - highest))[0];
            scratch.shrink[query] = shrink;
            scratch.highest[query] = highest;
            scratch.total[query] = scratch.total[query] * shrink + sum(added);
            Element::narrow(scores, reinterpret_cast<Stored*>(&scratch.weights[query * (TILE_TOKENS / PER_WORD)]), width);
        }
        for (int64_t dim = 0; dim < padded_dim; dim += PANEL)
            multiply_panel<Element>(seeing, &scratch.weights[first * (TILE_TOKENS / PER_WORD)], TILE_TOKENS / PER_WORD,
                                    scratch.values.data() + dim * width_words, width_words,
                                    [&](int64_t offset, int64_t rows, const PanelSums& sums) {
                                        for (int64_t row = 0; row < rows; ++row) {
                                            float* output = &scratch.output[(first + offset + row) * padded_dim + dim];
                                            const Floats shrink = all(scratch.shrink[first + offset + row]);
                                            for (int i = 0; i < PANEL; i += LANES)
                                                store(output + i, fused(load(output + i), shrink, load(sums.of[row] + i)));
                                        }
                                    });
    }
}

// `queries` holds the heads of all rows of the company, already turned, in its order. The first `shared` tokens, a whole number of
// tiles, lie in the same blocks for all of them and before all rows.
template <class Element>
void attend(const Pool<Element>& pool, int64_t layer, int64_t kv_head,
            const std::vector<Attending<typename Element::Stored>>& company, int64_t shared, int64_t group, const uint32_t* queries,
            AttentionScratch<Element>& scratch, int64_t row_stride) {
    const int64_t head_dim = pool.head_dim, padded_dim = scratch.padded_dim;
    int64_t num_queries = 0;
    for (const auto& own : company) num_queries += own.num_rows * group;
    for (int64_t query = 0; query < num_queries; ++query) {
        scratch.highest[query] = -__builtin_inff();
        scratch.total[query] = 0.0f;
    }
    memset(scratch.output.data(), 0, size_t(num_queries * padded_dim) * sizeof(float));
    walk(pool, layer, kv_head, company[0].table, 0, shared, shared, 0, num_queries, group, queries, scratch);
    int64_t first = 0;
    for (const auto& own : company) {
        walk(pool, layer, kv_head, own.table, shared, own.position + own.num_rows, own.position, first, own.num_rows * group, group,
             queries, scratch);
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
