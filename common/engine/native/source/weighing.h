// What a query has come to, tile by tile: an online softmax, in fp32, in KV order.
//
//     scores of a tile -> weights, and by how much what came before has to shrink      highest, total: of all tiles so far
//
// A masked token has weight zero and adds nothing. Keys and values in 8 bits (rounded_kv.h) are made values of the model's type tile
// by tile, without their scales: those of keys go to the scores, those of values to the weights.
#pragma once

#include <vector>

#include "element.h"
#include "kv_tiles.h"
#include "product.h"
#include "rounded_kv.h"

namespace pdserve {

constexpr int64_t QUERIES_AT_ONCE = 96;  // rows of a chunk are worked off in groups of about so many queries
constexpr int QUERIES_TOGETHER = 16;     // at most, from their scores of a tile to what they have come to after it

// Consecutive rows of one sequence, the first of them at `position`. The result of head g of row r goes to
// `to + r * row_stride + g * head_dim`.
template <class Stored>
struct Attending {
    const int64_t* table;
    int64_t position, num_rows;
    Stored* to;
};

// Some queries of a sequence, and the tokens that they see: queries [first, first + count), of which the first stands at `position`,
// over tokens [begin, end), of which the first begins a tile.
struct Stretch {
    const int64_t* table;
    int64_t begin, end, position, first, count;

    // Up to where it sees.
    int64_t seen_by(int64_t query, int64_t group) const { return position + (query - first) / group + 1; }
};

// Where somebody will read soon: the first tile of a sequence, in one layer and head. No table: nowhere that is known.
struct Upcoming {
    const int64_t* table = nullptr;
    int64_t layer = 0, kv_head = 0, end = 0;
};

// What one thread needs to attend; sized once for a model.
template <class Element>
struct AttentionScratch {
    using Stored = typename Element::Stored;
    int64_t most_queries, head_dim, padded_dim;
    std::vector<Attending<Stored>> company;
    std::vector<uint32_t> queries;  // of several sequences, side by side
    std::vector<float> output, highest, total;
    std::vector<uint32_t> keys, values;  // of a tile that is turned
    std::vector<float> scores, shrink;   // of queries that are worked off together, as are their weights
    std::vector<uint32_t> weights;
    std::vector<Stored> nothing, widened;
    std::vector<float> key_scales, value_scales;

    AttentionScratch(int64_t group, int64_t head_dim)
        : most_queries(group > QUERIES_AT_ONCE ? group : QUERIES_AT_ONCE),
          head_dim(head_dim),
          padded_dim(round_up(head_dim, PANEL)),
          queries(size_t(most_queries * head_dim)),
          output(size_t(most_queries * padded_dim)),
          highest(size_t(most_queries)),
          total(size_t(most_queries)),
          keys(size_t(TILE_TOKENS * head_dim)),
          values(size_t(TILE_TOKENS * padded_dim)),
          scores(size_t(QUERIES_TOGETHER * TILE_TOKENS)),
          shrink(size_t(QUERIES_TOGETHER)),
          weights(size_t(QUERIES_TOGETHER * TILE_TOKENS)),
          nothing(size_t(head_dim + 8)),
          widened(size_t(2 * TILE_TOKENS * head_dim)),
          key_scales(size_t(TILE_TOKENS)),
          value_scales(size_t(TILE_TOKENS)) {}
};

template <class Element>
constexpr int64_t WEIGHT_WORDS = TILE_TOKENS / Element::PER_WORD;  // of a query

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

// Scores of `count` queries from `first` on, over a tile of `COUNT` vectors, become weights in the model's type; what they have come to
// so far is brought up to date. Two passes, for neither of which one query has to wait for another.
template <class Element, int COUNT>
void weigh_vectors(int64_t first, int count, const Stretch& stretch, int64_t start, int64_t group, bool rounded,
                   AttentionScratch<Element>& scratch) {
    Integers lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const Floats never = all(-__builtin_inff());
    const Floats scale = all(1.44269504f / __builtin_sqrtf(float(scratch.head_dim)));  // of powers of two, not of e
    Floats scales[COUNT];
    for (int i = 0; i < COUNT; ++i) scales[i] = rounded ? scale * load(&scratch.key_scales[size_t(i * LANES)]) : scale;
    float *highest = &scratch.highest[size_t(first)], *total = &scratch.total[size_t(first)];
    float now_highest[QUERIES_TOGETHER], *shrink = scratch.shrink.data();
    for (int query = 0; query < count; ++query) {
        float* scores = &scratch.scores[size_t(query * TILE_TOKENS)];
        const int64_t seen = stretch.seen_by(first + query, group) - start;
        Floats best = all(highest[query]);
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; ++i) {
            Floats value = load(scores + i * LANES) * scales[i];
            if (seen < COUNT * LANES) value = lane + i * LANES < Integers{} + int(seen) ? value : never;
            best = larger(value, best);
            store(scores + i * LANES, value);
        }
        now_highest[query] = largest(best);
        shrink[query] = highest[query] - now_highest[query];
        highest[query] = now_highest[query];
    }
    for (int query = 0; query < count; query += LANES) store(shrink + query, power_of_two(load(shrink + query)));
    for (int query = 0; query < count; ++query) {
        float* scores = &scratch.scores[size_t(query * TILE_TOKENS)];
        auto* weights = reinterpret_cast<typename Element::Stored*>(&scratch.weights[size_t(query * WEIGHT_WORDS<Element>)]);
        Floats added = {};
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; ++i) {
            const Floats weight = power_of_two(load(scores + i * LANES) - now_highest[query]);
            added += weight;
            Element::narrow(rounded ? weight * load(&scratch.value_scales[size_t(i * LANES)]) : weight, weights + i * LANES);
        }
        total[query] = total[query] * shrink[query] + sum(added);
    }
}

// The same of a tile of any width.
template <class Element>
inline void weigh(int64_t first, int count, const Stretch& stretch, int64_t start, int64_t width, int64_t group, bool rounded,
                  AttentionScratch<Element>& scratch) {
    if (width == TILE_TOKENS)
        weigh_vectors<Element, TILE_TOKENS / LANES>(first, count, stretch, start, group, rounded, scratch);
    else
        weigh_vectors<Element, TILE_STEP / LANES>(first, count, stretch, start, group, rounded, scratch);
}

}  // namespace pdserve
