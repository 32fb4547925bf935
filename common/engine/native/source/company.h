// Which rows of a step attend together: those of one sequence, and single rows of sequences that begin with the same blocks.
//
//     sequences, by their tables    | 7 8 9 2 | 7 8 9 4 5 | 7 8 9 6 |  | 3 1 |
//     companies                      \________ 3 shared _________/     \_____/
//
// Keys and values of shared tiles are turned once for all of a company: with few rows each, that is most of what attention takes.
// Tables are compared, not contents: equal blocks are equal memory. Who is in company with whom changes no bit.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"

namespace pdserve {

struct Company {
    int64_t first_member, num_members;  // in Companies::members
    int64_t shared;                     // tokens, a whole number of tiles
};

struct Member {
    int64_t sequence, first_row, num_rows;
};

class Companies {
public:
    std::vector<Company> all;
    std::vector<Member> members;

    // Companies of `group` queries a row, of so many queries at most where several sequences meet. `num_sharing` computes at a time.
    void plan(int64_t num_sequences, const int64_t* first_rows, const int64_t* positions, const int64_t* tables, int64_t table_width,
              int64_t block_tokens, int64_t group, int64_t num_sharing) {
        all.clear();
        members.clear();
        few_.clear();
        const int64_t at_once = group > QUERIES_AT_ONCE ? 1 : QUERIES_AT_ONCE / group;
        for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
            const int64_t first = first_rows[sequence], rows = first_rows[sequence + 1] - first;
            if (rows > 0 && 2 * rows <= at_once) {
                few_.push_back({sequence, first, rows, tables + sequence * table_width, positions[first] / block_tokens});
                continue;
            }
            const RowTiles parts(rows, at_once);
            for (int64_t part = 0; part < parts.count; ++part) {
                all.push_back({int64_t(members.size()), 1, 0});
                members.push_back({sequence, first + parts.first(part), parts.height(part)});
            }
        }
        std::sort(few_.begin(), few_.end(), [](const Few& one, const Few& other) {
            return std::lexicographical_compare(one.table, one.table + one.whole_blocks, other.table, other.table + other.whole_blocks);
        });
        for (size_t first = 0; first < few_.size();) {
            // Whoever joins may shorten what is shared, but not what is spared.
            size_t end = first + 1;
            int64_t shared = tiles(few_[first].whole_blocks, block_tokens);
            for (; end < few_.size(); ++end) {
                const int64_t common = std::min(shared, tiles(num_common(few_[end - 1], few_[end]), block_tokens));
                const int64_t count = int64_t(end - first);
                if (common == 0 || common * count < shared * (count - 1)) break;
                shared = common;
            }
            join(first, end, end - first > 1 ? shared * TILE_TOKENS : 0, at_once, num_sharing);
            first = end;
        }
    }

private:
    struct Few {
        int64_t sequence, first_row, num_rows;
        const int64_t* table;
        int64_t whole_blocks;  // that lie before its rows
    };

    static int64_t tiles(int64_t blocks, int64_t block_tokens) { return blocks * block_tokens / TILE_TOKENS; }

    static int64_t num_common(const Few& one, const Few& other) {
        const int64_t most = std::min(one.whole_blocks, other.whole_blocks);
        int64_t count = 0;
        while (count < most && one.table[count] == other.table[count]) ++count;
        return count;
    }

    // In as many companies as it takes, of nearly as many sequences each, and enough for all who compute.
    void join(size_t begin, size_t end, int64_t shared, int64_t at_once, int64_t num_sharing) {
        int64_t most_rows = 1;
        for (size_t i = begin; i < end; ++i) most_rows = std::max(most_rows, few_[i].num_rows);
        const int64_t count = int64_t(end - begin), most = std::max<int64_t>(1, at_once / most_rows);
        const int64_t wanted = count >= FEWEST_APART * num_sharing ? (count + num_sharing - 1) / num_sharing : count;
        const RowTiles parts(count, std::min(most, wanted));
        for (int64_t part = 0; part < parts.count; ++part) {
            all.push_back({int64_t(members.size()), parts.height(part), parts.height(part) > 1 ? shared : 0});
            for (int64_t i = parts.first(part); i < parts.first(part + 1); ++i) {
                const Few& one = few_[begin + size_t(i)];
                members.push_back({one.sequence, one.first_row, one.num_rows});
            }
        }
    }

    static constexpr int64_t FEWEST_APART = 4;  // sequences, before a company is divided so that all have something to do

    std::vector<Few> few_;
};

}  // namespace pdserve
