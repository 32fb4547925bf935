// rows x matrix, for matrices cut into panels of 32 outputs.
//
//     panel p   [word k of the input][32 outputs]: 128 bytes per k, read once from start to end
//     tile      up to TILE_ROWS rows against one panel, all sums in registers
//
// An output is one chain of multiply-adds over k = 0, 1, 2, ..., whatever the tile's height: a row's result does not depend on the
// rows beside it, bit by bit. All rows of a step pass over a panel before the next panel, so weights cross the memory bus once.
#pragma once

#include "element.h"
#include "rows.h"

namespace pdserve {

constexpr int PANEL = 32;
constexpr int VECTORS = PANEL / LANES;
constexpr int TILE_ROWS = LANES == 16 ? 14 : LANES == 8 ? 2 : 1;  // as many sums as there are registers for

// How far ahead of use weights are asked for, and into which cache: low tiles wait for memory and want it close, high ones have
// time but need the first-level cache for their input. Measured; a wrong choice costs up to a third of a step. A panel that
// several tiles pass over was asked for while the tiles of the panel that the thread had before it computed, an equal part by each:
// memory and arithmetic then work at the same time.
constexpr int FEW_ROWS = 4;
constexpr int64_t AHEAD_OF_FEW_BYTES = 4096, AHEAD_OF_MANY_BYTES = 8192;

// A panel, and the one that its thread probably has after it.
struct PanelAt {
    const uint32_t *here, *next;
};

// What a tile asks for while it computes: `step` bytes for each 128 of weights that it reads, beginning at `from`.
struct Ahead {
    const char* from;
    int64_t step;

    // Of tile `tile` of `tiles`, `rows` rows high, over a panel of so many bytes.
    static Ahead of(const PanelAt& panel, int64_t panel_bytes, int64_t tile, int64_t tiles, int64_t rows) {
        const auto *here = reinterpret_cast<const char*>(panel.here), *next = reinterpret_cast<const char*>(panel.next);
        if (tiles == 1) return {here + (rows <= FEW_ROWS ? AHEAD_OF_FEW_BYTES : AHEAD_OF_MANY_BYTES), PANEL * 4};
        return {next + panel_bytes * tile / tiles, (PANEL * 4 + tiles - 1) / tiles};
    }
};

template <int ROWS>
inline void fetch(Ahead& ahead) {
    __builtin_prefetch(ahead.from, 0, ROWS <= FEW_ROWS ? 3 : 2);
    __builtin_prefetch(ahead.from + 64, 0, ROWS <= FEW_ROWS ? 3 : 2);
    ahead.from += ahead.step;
}

struct alignas(64) PanelSums {
    float of[14][PANEL];  // of the highest tile there is
};

// Rows of a packed tile are read from one stream; others are `stride_words` apart.
template <class Element, int ROWS, bool PACKED = false>
void multiply_tile(const uint32_t* input, int64_t stride_words, const uint32_t* panel, int64_t num_words, Ahead ahead,
                   PanelSums& sums) {
    Floats total[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < num_words; ++k) {
        fetch<ROWS>(ahead);
        Words weights[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) weights[v] = load(panel + k * PANEL + v * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const uint32_t word = PACKED ? input[k * ROWS + row] : input[row * stride_words + k];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) total[row][v] = Element::dot(total[row][v], weights[v], word);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(sums.of[row] + v * LANES, total[row][v]);
}

// Picks the tile of a height known only at run time.
template <class Element, bool PACKED = false, int ROWS = TILE_ROWS>
inline void multiply_rows(int64_t rows, const uint32_t* input, int64_t stride_words, const uint32_t* panel, int64_t num_words,
                          Ahead ahead, PanelSums& sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return multiply_rows<Element, PACKED, ROWS - 1>(rows, input, stride_words, panel, num_words, ahead, sums);
    }
    multiply_tile<Element, ROWS, PACKED>(input, stride_words, panel, num_words, ahead, sums);
}

// Calls finish(first row, rows, sums) for the tiles that cover `num_rows`.
template <class Element, bool PACKED = false, class Finish>
inline void multiply_panel(int64_t num_rows, const uint32_t* input, int64_t stride_words, const PanelAt& panel, int64_t num_words,
                           const Finish& finish) {
    const RowTiles tiles(num_rows, TILE_ROWS);
    PanelSums sums;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t first = tiles.first(tile), rows = tiles.height(tile);
        const Ahead ahead = Ahead::of(panel, num_words * PANEL * int64_t(sizeof(uint32_t)), tile, tiles.count, rows);
        multiply_rows<Element, PACKED>(rows, input + first * (PACKED ? num_words : stride_words), stride_words, panel.here, num_words,
                                       ahead, sums);
        finish(first, rows, sums);
    }
}

}  // namespace pdserve
