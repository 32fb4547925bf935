// A matrix of weights in any of the ways in which one is held, and its product with rows.
//
//     PLAIN              in the model's type (product.h); as an embedding: rows in the model's type, not panels
//     GROUPS_8           8 bits, a scale for each 64 inputs (quantised.h)
//     BLOCKS_8, _4, _4_MINIMA   blocks of 32 inputs (blocks.h)
//
// Each matrix of a model may be held in its own way. Where it is not PLAIN, rows are rounded to 8 bits before the product.
#pragma once

#include "blocks.h"

namespace pdserve {

enum Held : int64_t { PLAIN = 0, GROUPS_8 = 1, BLOCKS_8 = 2, BLOCKS_4 = 3, BLOCKS_4_MINIMA = 4 };

struct Matrix {
    const uint32_t* panels;
    int64_t held;
};

inline int64_t num_blocks(int64_t width) { return (width + BLOCK - 1) / BLOCK; }
inline int64_t num_groups(int64_t width) { return (width + GROUP - 1) / GROUP; }

// The input of one product as its matrix wants it: rounded, or for a plain one packed if there are several tiles of it.
class ProductRows {
public:
    void reserve(int64_t num_rows, int64_t widest) {
        groups_.reserve(num_rows, num_groups(widest));
        blocks_.reserve(num_rows, num_blocks(widest));
        const size_t count = num_rows > TILE_ROWS ? size_t(num_rows * widest) : 0;  // words are no wider than values
        if (packed_.size() < count) packed_.resize(count);
    }

    // How many parts there are to prepare, each by anybody, before anybody multiplies.
    static int64_t num_parts(int64_t held, int64_t num_rows) {
        if (held != PLAIN) return num_rows;
        return num_rows > TILE_ROWS ? RowTiles(num_rows, TILE_ROWS).count : 0;
    }

    template <class Element>
    void prepare(int64_t held, int64_t num_rows, int64_t part, const uint32_t* input, int64_t stride_words, int64_t width) {
        if (held != PLAIN) {
            const auto* row = reinterpret_cast<const typename Element::Stored*>(input + part * stride_words);
            return round<Element>(held, num_rows, part, row, width);
        }
        const RowTiles tiles(num_rows, TILE_ROWS);
        const int64_t num_words = (width + Element::PER_WORD - 1) / Element::PER_WORD, first = tiles.first(part);
        pack_tile(input + first * stride_words, stride_words, tiles.height(part), num_words, packed_.data() + first * num_words);
    }

    const QuantisedRows& groups() const { return groups_; }
    const BlockRows& blocks() const { return blocks_; }
    const uint32_t* packed() const { return packed_.data(); }

private:
    template <class Element>
    void round(int64_t held, int64_t num_rows, int64_t row, const typename Element::Stored* from, int64_t width) {
        switch (held) {
            case GROUPS_8: return groups_.set<Element>(num_rows, row, from, width);
            case BLOCKS_8: return blocks_.set<Element>(num_rows, row, from, width, BlockFormat<8, false>::ZERO);
            case BLOCKS_4: return blocks_.set<Element>(num_rows, row, from, width, BlockFormat<4, false>::ZERO);
            default: return blocks_.set<Element>(num_rows, row, from, width, BlockFormat<4, true>::ZERO);
        }
    }

    QuantisedRows groups_;
    BlockRows blocks_;
    std::vector<uint32_t> packed_;
};

// Words of a panel of a matrix that is so wide.
template <class Element>
inline int64_t panel_words(int64_t held, int64_t width) {
    switch (held) {
        case GROUPS_8: return num_groups(width) * PANEL_GROUP_WORDS;
        case BLOCKS_8: return num_blocks(width) * BlockFormat<8, false>::PANEL_WORDS;
        case BLOCKS_4: return num_blocks(width) * BlockFormat<4, false>::PANEL_WORDS;
        case BLOCKS_4_MINIMA: return num_blocks(width) * BlockFormat<4, true>::PANEL_WORDS;
        default: return (width + Element::PER_WORD - 1) / Element::PER_WORD * PANEL;
    }
}

// As multiply_panel, of panel number `panel`; `next` is the thread's next one. `rows` hold the same as `input` where they were prepared.
template <class Element, class Finish>
inline void multiply_any_panel(int64_t num_rows, const uint32_t* input, int64_t stride_words, const ProductRows& rows,
                               const Matrix& matrix, int64_t width, int64_t panel, int64_t next, const Finish& finish) {
    const int64_t blocks = num_blocks(width), words = panel_words<Element>(matrix.held, width);
    const PanelAt at{matrix.panels + panel * words, matrix.panels + next * words};
    switch (matrix.held) {
        case GROUPS_8: return multiply_quantised_panel(num_rows, rows.groups(), num_groups(width), at, finish);
        case BLOCKS_8: return multiply_blocks_panel<8, false>(num_rows, rows.blocks(), blocks, at, finish);
        case BLOCKS_4: return multiply_blocks_panel<4, false>(num_rows, rows.blocks(), blocks, at, finish);
        case BLOCKS_4_MINIMA: return multiply_blocks_panel<4, true>(num_rows, rows.blocks(), blocks, at, finish);
        default:
            if (num_rows > TILE_ROWS) return multiply_panel<Element, true>(num_rows, rows.packed(), 0, at, words / PANEL, finish);
            return multiply_panel<Element>(num_rows, input, stride_words, at, words / PANEL, finish);
    }
}

// A row of an embedding in fp32.
template <class Element>
inline void row_of_embedding(const Matrix& embedding, int64_t row, int64_t width, float* to) {
    switch (embedding.held) {
        case BLOCKS_8: return weights_of_output<8, false>(embedding.panels, row, width, to);
        case BLOCKS_4: return weights_of_output<4, false>(embedding.panels, row, width, to);
        case BLOCKS_4_MINIMA: return weights_of_output<4, true>(embedding.panels, row, width, to);
        default: {
            const auto* from = reinterpret_cast<const typename Element::Stored*>(embedding.panels) + row * width;
            for (int64_t i = 0; i < width; ++i) to[i] = Element::widen(from[i]);
        }
    }
}

}  // namespace pdserve
