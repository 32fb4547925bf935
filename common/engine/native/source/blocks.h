// rows x matrix for matrices in blocks of 32 inputs, as GGUF files hold them: 8 or 4 bits a weight, a scale, perhaps a minimum.
//
//     panel     [block of the input][32 scales, in half precision | 32 minima, likewise, if there are any | words of 32 outputs]
//     8 bits    word k of 8: weights of inputs 4k ... 4k + 3, each + 128                  weight = scale * (byte - 128)
//     4 bits    word k of 4: those inputs in the low halves of its bytes, those from      weight = scale * (half byte - 8), or
//               16 + 4k on in the high ones: the bytes of a GGUF block as they are                 scale * half byte + minimum
//     rows      in tiles of up to 6: [tile][block][8 words of 4 values in 8 bits | scale | rest][row of the tile]
//
// The rest is what a row's values add up to: a multiple of it is where a block's sum begins, or with minima it is their factor.
// A block's sum is exact in 32-bit integers; blocks are added in fp32, in order. So a row's result does not depend on the rows
// beside it, bit by bit. Halves of bytes are unpacked in registers, once per tile of rows.
#pragma once

#include "halves.h"
#include "quantised.h"

namespace pdserve {

constexpr int BLOCK = 32;
constexpr int BLOCK_WORDS = BLOCK / 4;
constexpr int BLOCK_RECORD = BLOCK_WORDS + 2;  // words of a row, per block
// Integer sums, fp32 sums and weights stay in registers. Measured: higher tiles, whose fp32 sums do not, are slower, and those that
// leave no register for the unpacked halves take twice the time.
constexpr int BLOCK_ROWS = LANES == 16 ? 6 : LANES == 8 ? 2 : 1;

template <int BITS, bool MINIMA>
struct BlockFormat {
    static constexpr int64_t HEAD_WORDS = (MINIMA ? 2 : 1) * PANEL / 2;
    static constexpr int64_t PANEL_WORDS = HEAD_WORDS + BITS * PANEL;  // of a panel, per block
    static constexpr int32_t ZERO = MINIMA ? 0 : BITS == 8 ? 128 : 8;
};

inline RowTiles block_tiles(int64_t num_rows) { return RowTiles(num_rows, BLOCK_ROWS); }

// Rows in 8 bits, a scale for each 32 values.
struct BlockRows {
    std::vector<uint32_t> words;

    void reserve(int64_t num_rows, int64_t blocks) {
        const size_t count = size_t(num_rows * blocks * BLOCK_RECORD);
        if (words.size() < count) words.resize(count);
    }

    const uint32_t* of_tile(int64_t first_row, int64_t blocks) const { return &words[size_t(first_row * blocks * BLOCK_RECORD)]; }

    // As QuantisedRows::set, of `num_rows` in all. `zero` is the weights' (BlockFormat::ZERO).
    template <class Element>
    void set(int64_t num_rows, int64_t row, const typename Element::Stored* from, int64_t width, int32_t zero) {
        const RowTiles tiles = block_tiles(num_rows);
        const int64_t tile = tiles.of_row(row), height = tiles.height(tile), first_row = tiles.first(tile);
        const int64_t blocks = (width + BLOCK - 1) / BLOCK;
        uint32_t* to = &words[size_t(first_row * blocks * BLOCK_RECORD + row - first_row)];
        for (int64_t block = 0; block < blocks; ++block, to += BLOCK_RECORD * height) {
            const int64_t first = block * BLOCK, count = width - first < BLOCK ? width - first : BLOCK;
            int8_t steps[BLOCK];
            const Rounded rounded = round_values<Element, BLOCK>(from + first, count, steps);
            for (int word = 0; word < BLOCK_WORDS; ++word) memcpy(to + word * height, steps + 4 * word, 4);
            to[BLOCK_WORDS * height] = as_bits(rounded.scale);
            to[(BLOCK_WORDS + 1) * height] = zero ? uint32_t(-zero * rounded.total) : as_bits(rounded.scale * float(rounded.total));
        }
    }
};

template <int BITS, bool MINIMA, int ROWS>
void multiply_blocks_tile(const uint32_t* rows, int64_t blocks, const uint32_t* panel, Ahead ahead, PanelSums& sums) {
    using Format = BlockFormat<BITS, MINIMA>;
    Floats sum[ROWS][VECTORS] = {};
    for (int64_t block = 0; block < blocks; ++block, panel += Format::PANEL_WORDS, rows += BLOCK_RECORD * ROWS) {
        const uint32_t *scales = rows + BLOCK_WORDS * ROWS, *rests = scales + ROWS;
        Integers total[ROWS][VECTORS];
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) total[row][v] = MINIMA ? Integers{} : Integers{} + int32_t(rests[row]);
#pragma GCC unroll 10
        for (int64_t words = 0; words < Format::PANEL_WORDS; words += PANEL) fetch<ROWS>(ahead);
        const auto add_products = [&](const Words* weights, const uint32_t* values) {
#pragma GCC unroll 16
            for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) total[row][v] = dot_bytes(total[row][v], weights[v], values[row]);
        };
#pragma GCC unroll 8
        for (int k = 0; k < BITS; ++k) {
            Words word[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) word[v] = load(panel + Format::HEAD_WORDS + k * PANEL + v * LANES);
            if constexpr (BITS == 4) {
                Words half[VECTORS];
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) half[v] = word[v] & 0x0f0f0f0fu;
                add_products(half, rows + k * ROWS);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) half[v] = (word[v] >> 4) & 0x0f0f0f0fu;
                add_products(half, rows + (4 + k) * ROWS);
            } else {
                add_products(word, rows + k * ROWS);
            }
        }
        const uint16_t* head = reinterpret_cast<const uint16_t*>(panel);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            const Floats weight_scale = load_halves(head + v * LANES);
            const Floats minimum = MINIMA ? load_halves(head + PANEL + v * LANES) : Floats{};
#pragma GCC unroll 16
            for (int row = 0; row < ROWS; ++row) {
                if constexpr (MINIMA) sum[row][v] = fused(minimum, all(as_float(rests[row])), sum[row][v]);
                sum[row][v] = fused(to_floats(total[row][v]) * all(as_float(scales[row])), weight_scale, sum[row][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(sums.of[row] + v * LANES, sum[row][v]);
}

template <int BITS, bool MINIMA, int ROWS = BLOCK_ROWS>
inline void multiply_blocks_rows(int64_t height, const uint32_t* rows, int64_t blocks, const uint32_t* panel, Ahead ahead,
                                 PanelSums& sums) {
    if constexpr (ROWS > 1) {
        if (height < ROWS) return multiply_blocks_rows<BITS, MINIMA, ROWS - 1>(height, rows, blocks, panel, ahead, sums);
    }
    multiply_blocks_tile<BITS, MINIMA, ROWS>(rows, blocks, panel, ahead, sums);
}

// As multiply_panel.
template <int BITS, bool MINIMA, class Finish>
inline void multiply_blocks_panel(int64_t num_rows, const BlockRows& input, int64_t blocks, const PanelAt& panel,
                                  const Finish& finish) {
    const RowTiles tiles = block_tiles(num_rows);
    const int64_t panel_bytes = blocks * BlockFormat<BITS, MINIMA>::PANEL_WORDS * int64_t(sizeof(uint32_t));
    PanelSums sums;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t first = tiles.first(tile), height = tiles.height(tile);
        const Ahead ahead = Ahead::of(panel, panel_bytes, tile, tiles.count, height);
        multiply_blocks_rows<BITS, MINIMA>(height, input.of_tile(first, blocks), blocks, panel.here, ahead, sums);
        finish(first, height, sums);
    }
}

// The weights of one output, as they are.
template <int BITS, bool MINIMA>
void weights_of_output(const uint32_t* matrix, int64_t output, int64_t width, float* to) {
    using Format = BlockFormat<BITS, MINIMA>;
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
    const uint32_t* panel = matrix + output / PANEL * blocks * Format::PANEL_WORDS;
    for (int64_t i = 0; i < width; i += BLOCK, panel += Format::PANEL_WORDS) {
        const uint16_t* head = reinterpret_cast<const uint16_t*>(panel) + output % PANEL;
        const float scale = widen_half(head[0]), minimum = MINIMA ? widen_half(head[PANEL]) : 0.0f;
        const int64_t count = width - i < BLOCK ? width - i : BLOCK;
        for (int64_t j = 0; j < count; ++j) {
            const int64_t word = BITS == 8 ? j / 4 : j / 4 % 4;
            const uint32_t bits = panel[Format::HEAD_WORDS + word * PANEL + output % PANEL] >> (8 * (j % 4));
            const int32_t value = BITS == 8 ? int32_t(bits & 0xffu) : int32_t(j < 16 ? bits & 0x0fu : bits >> 4 & 0x0fu);
            to[i + j] = scale * float(value - Format::ZERO) + minimum;
        }
    }
}

}  // namespace pdserve
