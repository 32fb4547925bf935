// Attention of a few rows over blocks in the KV pool, for one KV head: of one sequence, or of several that begin with the same
// blocks. Keys and values are read in place.
//
//     queries   | token 0: heads of the group | token 1: ... |        the rows of two small matrix products
//     company   tiles of the common blocks are turned once for the queries of all, then each goes on alone with tiles of its own
//     KV tile   64 tokens, starting at multiples of 64: turned once for many queries (many_queries.h), or read by each of few
//               (few_queries.h), to the same bits
//
// Softmax goes tile by tile in KV order; tiles do not depend on where a chunk or a block begins. So a row's result does not depend
// on the rows beside it.
#pragma once

#include "few_queries.h"
#include "many_queries.h"

namespace pdserve {

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
        attend_many_to_tile<Element>(tile, start, stretch, group, queries, pool.rounded, scratch, next, pool.row_values);
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
