// Keys and values of a sequence in the pool, in tiles of 64 tokens that start at multiples of 64, read in place.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace pdserve {

constexpr int64_t TILE_TOKENS = 64;
constexpr int64_t TILE_STEP = 32;  // a tile is that, or twice that, wide

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

// Where the keys and values of one tile lie; past the end of the sequence, rows of zeros up to whole panels.
template <class Stored>
struct TileRows {
    int64_t width = 0;
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
    tile.width = round_up(held, TILE_STEP);
    for (; found < tile.width; ++found) tile.keys[found] = tile.values[found] = nothing;
}

// Asks for the memory of a few tokens of a tile that will be used next. A little at a time, between what computes: the queue for
// memory is short, and who asks for more has to wait for it.
template <class Stored>
inline void fetch(const TileRows<Stored>& tile, int64_t first, int64_t end, int64_t row_values) {
    for (int64_t token = first; token < end && token < tile.width; ++token)
        for (int64_t offset = 0; offset < row_values * int64_t(sizeof(Stored)); offset += 64) {
            __builtin_prefetch(reinterpret_cast<const char*>(tile.keys[token]) + offset, 0, 2);
            __builtin_prefetch(reinterpret_cast<const char*>(tile.values[token]) + offset, 0, 2);
        }
}

}  // namespace pdserve
