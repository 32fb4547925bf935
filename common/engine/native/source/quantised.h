// rows x matrix for matrices of 8-bit weights: groups of 64 inputs have a scale of their own, on either side.
//
//     panel     [group of the input][a scale per output: 32 fp32 | word k of 16: 32 outputs x 4 weights, each + 128]
//     rows      in tiles: [tile][group][16 words of 4 values in 8 bits | scale | -128 x the sum of the values][row of the tile]
//
// A group's sum is exact in 32-bit integers; groups are added in fp32, in order. So a row's result does not depend on the rows
// beside it, bit by bit, and its rounding to 8 bits depends on the row alone. Weights are unsigned because the machine's
// multiply-add takes one unsigned side; what that adds is the same for all outputs and is taken off before a group's sum begins.
#pragma once

#include <vector>

#include "product.h"
#include "rounding.h"

namespace pdserve {

constexpr int GROUP = 64;
constexpr int GROUP_WORDS = GROUP / 4;
constexpr int64_t PANEL_GROUP_WORDS = PANEL + GROUP_WORDS * PANEL;  // of a panel, per group
// Measured: up to so many rows one tile is faster than two, though its sums do not stay in registers (8 rows by a fifth, 10 by
// nothing; 14 rows are slower by a tenth).
constexpr int QUANTISED_ROWS = LANES == 16 ? 10 : LANES == 8 ? 4 : 2;
constexpr int RESIDENT_ROWS = LANES == 16 ? 7 : QUANTISED_ROWS / 2;  // of a tile that needs no memory for its sums

// sum + four products of unsigned weights and signed values, in every lane.
inline Integers dot_bytes(Integers sum, Words weights, uint32_t values) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(int(values)));
#else
    for (int byte = 0; byte < 4; ++byte) {
        const int32_t value = int8_t(values >> (8 * byte));
        sum += (Integers)((weights >> (8 * byte)) & 0xffu) * value;
    }
    return sum;
#endif
}

inline Floats to_floats(Integers values) { return __builtin_convertvector(values, Floats); }

constexpr int GROUP_RECORD = GROUP_WORDS + 2;  // words of a row, per group

// Many rows are cut into low tiles, which multiply faster; few into one high tile, for one pass over the weights is worth more.
inline RowTiles quantised_tiles(int64_t num_rows) {
    return RowTiles(num_rows, num_rows > QUANTISED_ROWS ? RESIDENT_ROWS : QUANTISED_ROWS);
}

// Rows in 8 bits, a scale for each 64 values.
struct QuantisedRows {
    std::vector<uint32_t> words;

    void reserve(int64_t num_rows, int64_t groups) {
        const size_t count = size_t(num_rows * groups * GROUP_RECORD);
        if (words.size() < count) words.resize(count);
    }

    const uint32_t* of_tile(int64_t first_row, int64_t groups) const { return &words[size_t(first_row * groups * GROUP_RECORD)]; }

    // Rounds `width` values to the nearest of 255 steps per group; what is missing of the last group is zero.
    template <class Element>
    void set(int64_t num_rows, int64_t row, const typename Element::Stored* from, int64_t width) {
        const RowTiles tiles = quantised_tiles(num_rows);
        const int64_t tile = tiles.of_row(row), height = tiles.height(tile), first_row = tiles.first(tile);
        const int64_t groups = (width + GROUP - 1) / GROUP;
        uint32_t* to = &words[size_t(first_row * groups * GROUP_RECORD + row - first_row)];
        for (int64_t group = 0; group < groups; ++group, to += GROUP_RECORD * height) {
            const int64_t first = group * GROUP, count = width - first < GROUP ? width - first : GROUP;
            int8_t steps[GROUP];
            const Rounded rounded = round_values<Element, GROUP>(from + first, count, steps);
            for (int word = 0; word < GROUP_WORDS; ++word) memcpy(to + word * height, steps + 4 * word, 4);
            to[GROUP_WORDS * height] = as_bits(rounded.scale);
            to[(GROUP_WORDS + 1) * height] = uint32_t(-128 * rounded.total);
        }
    }
};

// Low tiles hold a group's sums and the sums of all groups in registers, higher ones the latter in memory: the same operations in
// the same order.
template <int ROWS>
void multiply_quantised_tile(const uint32_t* rows, int64_t groups, const uint32_t* panel, Ahead ahead, PanelSums& sums) {
    constexpr bool IN_REGISTERS = ROWS <= RESIDENT_ROWS;
    Floats held[ROWS][VECTORS] = {};
    if constexpr (!IN_REGISTERS)
        for (int row = 0; row < ROWS; ++row)
            for (int v = 0; v < VECTORS; ++v) store(sums.of[row] + v * LANES, Floats{});
    for (int64_t group = 0; group < groups; ++group, rows += GROUP_RECORD * ROWS) {
        const uint32_t* weights = panel + group * PANEL_GROUP_WORDS;
        const uint32_t *scales = rows + GROUP_WORDS * ROWS, *offsets = scales + ROWS;
        Integers total[ROWS][VECTORS];
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v)
                total[row][v] = Integers{} + int32_t(offsets[row]);
        fetch<ROWS>(ahead);
        for (int64_t k = 0; k < GROUP_WORDS; ++k) {
            fetch<ROWS>(ahead);
            Words word[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) word[v] = load(weights + (1 + k) * PANEL + v * LANES);
#pragma GCC unroll 16
            for (int row = 0; row < ROWS; ++row) {
                const uint32_t values = rows[k * ROWS + row];
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) total[row][v] = dot_bytes(total[row][v], word[v], values);
            }
        }
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Floats scale = all(as_float(scales[row]));
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                const Floats weight_scale = load(reinterpret_cast<const float*>(weights) + v * LANES);
                const Floats scaled = to_floats(total[row][v]) * scale;
                if constexpr (IN_REGISTERS) {
                    held[row][v] = fused(scaled, weight_scale, held[row][v]);
                } else {
                    float* sum = sums.of[row] + v * LANES;
                    store(sum, fused(scaled, weight_scale, load(sum)));
                }
            }
        }
    }
    if constexpr (IN_REGISTERS)
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) store(sums.of[row] + v * LANES, held[row][v]);
}

template <int ROWS = QUANTISED_ROWS>
inline void multiply_quantised_rows(int64_t height, const uint32_t* rows, int64_t groups, const uint32_t* panel, Ahead ahead,
                                    PanelSums& sums) {
    if constexpr (ROWS > 1) {
        if (height < ROWS) return multiply_quantised_rows<ROWS - 1>(height, rows, groups, panel, ahead, sums);
    }
    multiply_quantised_tile<ROWS>(rows, groups, panel, ahead, sums);
}

// As multiply_panel.
template <class Finish>
inline void multiply_quantised_panel(int64_t num_rows, const QuantisedRows& input, int64_t groups, const PanelAt& panel,
                                     const Finish& finish) {
    const RowTiles tiles = quantised_tiles(num_rows);
    PanelSums sums;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t first = tiles.first(tile), height = tiles.height(tile);
        const Ahead ahead = Ahead::of(panel, groups * PANEL_GROUP_WORDS * int64_t(sizeof(uint32_t)), tile, tiles.count, height);
        multiply_quantised_rows(height, input.of_tile(first, groups), groups, panel.here, ahead, sums);
        finish(first, height, sums);
    }
}

}  // namespace pdserve
