// A whole step of a Llama-family decoder, behind a plain C interface: rows in, hidden rows out, keys and values into the pool.
//
// Each matrix is held in the model's type or in few bits (matrix.h); with the latter, rows are rounded to 8 bits before its product.
//
//     per layer   norm | qkv | turn, write KV | attend | output, + residual | norm | gate, up, silu | down, + residual
//
// A process may have a part of the model: some layers, some heads of each, some columns of the feed-forward part. Then the two sums
// of a layer are not added to the rows but handed out, for the caller to add up what all parts have; he asks for half layers.
//
// Each `|` is a barrier of the team, and one more is where rows are rounded for a product. Matrix products are shared out by output
// panels, everything else by rows; who computes what changes no bit. Residuals are fp32; what enters a product is rounded to the
// model's type, as are keys and values.
//
// With few rows a barrier costs more than what is between two of them, so most are left out: each member norms and rounds all rows
// for itself, and who attends for a KV head turns and writes it first.
//
//     per layer   norm, qkv | turn, write KV, attend | output, + residual | norm, gate, up, silu | down, + residual
#include <algorithm>
#include <new>

#include "team.h"

#include "best_token.h"
#include "company.h"
#include "machine_limits.h"
#include "matrix.h"
#include "rotary.h"
#include "stages.h"

namespace pdserve {

// Mirrors common/engine/native/library.py; all matrices are in panels, all vectors fp32 and padded with zeros to 32.
struct LayerWeights {
    const float* attention_norm;
    Matrix qkv;
    const float* qkv_bias;  // may be null
    Matrix output;
    const float* output_bias;  // may be null
    const float* mlp_norm;
    Matrix gate_up;  // a panel is 16 gates and their 16 ups
    Matrix down;
};

struct Description {
    int64_t bytes_per_value;  // 2: bf16, 4: fp32
    int64_t kv_bits;          // 8: keys and values in 8 bits (rounded_kv.h); 0: in the model's type
    int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, ffn_size, vocab_size;
    int64_t num_positions, block_tokens, num_blocks, num_threads;
    int64_t head_size;                   // outputs of the head
    double norm_epsilon;
    Matrix embedding;  // [vocab][hidden]
    const LayerWeights* layers;
    const float* final_norm;
    Matrix head;
    const float* cosines;  // [position][head_dim / 2]
    const float* sines;
    void* pool;
};

struct Step {
    int64_t num_rows, num_sequences, table_width;
    const int64_t* token_ids;
    const int64_t* positions;
    const int64_t* first_rows;  // [sequence], and num_rows at the end
    const int64_t* tables;      // [sequence][table_width]
    float* hidden;              // [row][hidden size, rounded up to 32]; in and out
    int64_t first_layer, end_layer;
    int64_t embeds;  // hidden is made from the tokens first
    int64_t halves;  // of each layer: ATTENTION, FEED_FORWARD or both
    float* partial;  // as hidden: takes the sum of the half layer, and hidden stays as it is. Null: hidden takes it
};

enum Half : int64_t { ATTENTION = 1, FEED_FORWARD = 2 };

enum Outcome : int { DONE = 0, OUT_OF_MEMORY = 1, BAD_INPUT = 2 };

class AnyDecoder {
public:
    virtual ~AnyDecoder() = default;
    virtual Outcome forward(const Step& step) = 0;
    virtual Outcome logits(const float* hidden, int64_t num_rows, float* to) = 0;
    virtual Outcome pick(const float* hidden, int64_t num_rows, const uint32_t* const* may_come, int64_t* to) = 0;
    virtual void use_threads(int64_t wanted) = 0;
    virtual void watch(double* seconds) = 0;
    virtual Limits limits() = 0;
};

template <class Element>
class Decoder final : public AnyDecoder {
    using Stored = typename Element::Stored;
    static constexpr int64_t PER_WORD = Element::PER_WORD;

public:
    explicit Decoder(const Description& model)
        : model_(model),
          layers_(model.layers, model.layers + model.num_layers),
          group_(model.num_heads / model.num_kv_heads),
          hidden_stride_(round_up(model.hidden_size, PANEL)),
          qkv_size_((model.num_heads + 2 * model.num_kv_heads) * model.head_dim),
          qkv_stride_(round_up(qkv_size_, PANEL)),
          attended_size_(model.num_heads * model.head_dim),
          inner_size_(round_up(model.ffn_size, PANEL / 2)),
          normed_stride_(spaced(model.hidden_size)),
          attended_stride_(spaced(attended_size_)),
          inner_stride_(spaced(inner_size_)),
          pool_{static_cast<Stored*>(model.pool), model.block_tokens, model.head_dim,
                model.num_kv_heads,               model.num_layers,   row_values<Stored>(model.head_dim, model.kv_bits == 8),
                model.kv_bits == 8},
          team_(int(model.num_threads)),
          scratch_(size_t(model.num_threads), AttentionScratch<Element>(group_, model.head_dim)),
          own_(size_t(model.num_threads)) {
        for (Own& own : own_) {
            own.normed.resize(size_t(FEW_ROWS_APART * normed_stride_ / PER_WORD));
            own.rows.reserve(FEW_ROWS_APART, widest());
        }
    }

    Outcome forward(const Step& step) override {
        for (int64_t row = 0; row < step.num_rows; ++row)
            if (step.token_ids[row] < 0 || step.token_ids[row] >= model_.vocab_size || step.positions[row] < 0 ||
                step.positions[row] >= model_.num_positions)
                return BAD_INPUT;
        for (int64_t i = 0; i < step.num_sequences * step.table_width; ++i)
            if (step.tables[i] < 0 || step.tables[i] >= model_.num_blocks) return BAD_INPUT;
        reserve(step.num_rows);
        companies_.plan(step.num_sequences, step.first_rows, step.positions, step.tables, step.table_width, model_.block_tokens, group_,
                        team_.size());
        clock_.begin();
        team_.run([&](int member) {
            if (step.embeds) {
                embed(step, member);
                end(EMBED, member);
            }
            for (int64_t layer = step.first_layer; layer < step.end_layer; ++layer) compute(step, layer, member);
        });
        return DONE;
    }

    Outcome logits(const float* hidden, int64_t num_rows, float* to) override {
        reserve(num_rows);
        clock_.begin();
        team_.run([&](int member) {
            product(member, num_rows, normed(hidden, model_.final_norm), model_.head, model_.head_size,
                    [&](int64_t row, int64_t first, const float* sums) {
                        const int64_t rest = model_.head_size - first, count = rest < PANEL ? rest : PANEL;
                        memcpy(to + row * model_.head_size + first, sums, size_t(count) * sizeof(float));
                    });
            end(HEAD, member);
        });
        return DONE;
    }

    Outcome pick(const float* hidden, int64_t num_rows, const uint32_t* const* may_come, int64_t* to) override {
        reserve(num_rows);
        for (Own& own : own_) own.best.assign(size_t(num_rows), BestToken{});
        clock_.begin();
        team_.run([&](int member) {
            BestToken* best = own_[size_t(member)].best.data();
            product(member, num_rows, normed(hidden, model_.final_norm), model_.head, model_.head_size,
                    [&](int64_t row, int64_t first, const float* sums) {
                        const uint32_t* words = may_come[row];
                        best[row].see(sums, first, model_.head_size - first, words ? words[first / PANEL] : ~0u);
                    });
            end(HEAD, member);
        });
        for (int64_t row = 0; row < num_rows; ++row) {
            BestToken best;
            for (const Own& own : own_) best.merge(own.best[size_t(row)]);
            to[row] = best.found();
        }
        return DONE;
    }

    void use_threads(int64_t wanted) override { team_.use(wanted); }

    void watch(double* seconds) override { clock_.watch(seconds); }

    Limits limits() override { return measure_limits<Element>(team_); }

private:
    // What a member has for itself where it shares few rows.
    struct Own {
        std::vector<uint32_t> normed;
        ProductRows rows;
        std::vector<BestToken> best;  // of the rows of the head
    };

    static constexpr int64_t FEW_ROWS_APART = 4;

    // Whether each member prepares the rows of products for itself.
    bool is_apart(int64_t num_rows) const { return team_.size() > 1 && num_rows <= FEW_ROWS_APART; }

    // Every member's; what follows may rely on what all of them did.
    void end(Stage stage, int member) {
        team_.barrier(member);
        clock_.lap(member, stage);
    }

    // The distance of rows of a product's input: whole vectors, and never such that all rows fall into one set of the cache.
    static int64_t spaced(int64_t width) { return round_up(width, PANEL) + PANEL; }

    // Buffers only grow; what lies in them is valid within a step.
    void reserve(int64_t num_rows) {
        if (num_rows <= reserved_rows_) return;
        normed_.resize(size_t(num_rows * normed_stride_ / PER_WORD));
        qkv_.resize(size_t(num_rows * qkv_stride_));
        queries_.resize(size_t(num_rows * attended_size_ / PER_WORD));
        attended_.resize(size_t(num_rows * attended_stride_ / PER_WORD));
        inner_.resize(size_t(num_rows * inner_stride_ / PER_WORD));
        rows_.reserve(num_rows, widest());
        reserved_rows_ = num_rows;
    }

    // Input of a product.
    int64_t widest() const { return std::max({model_.hidden_size, attended_size_, inner_size_}); }

    template <class Part>
    void share_rows(int member, int64_t count, const Part& part) {
        team_.share(member, count, [&](int64_t i, int64_t) { part(i); });
    }

    // What a product is of: rows of `input`, or rows [row][hidden_stride_] that are normed first, into `input` or each member's own.
    struct Input {
        std::vector<uint32_t>& rows;
        int64_t stride, width;  // in values
        const float* from = nullptr;
        const float* weight = nullptr;
    };

    Input normed(const float* from, const float* weight) { return {normed_, normed_stride_, model_.hidden_size, from, weight}; }

    // Every member calls it; the input must be complete.
    template <class Finish>
    void product(int member, int64_t num_rows, const Input& input, const Matrix& matrix, int64_t num_outputs, const Finish& finish) {
        const bool apart = is_apart(num_rows);
        const int64_t parts = ProductRows::num_parts(matrix.held, num_rows), stride_words = input.stride / PER_WORD;
        Own& own = own_[size_t(member)];
        std::vector<uint32_t>& rows = apart && input.from ? own.normed : input.rows;
        ProductRows& prepared = apart ? own.rows : rows_;
        const auto norm = [&](int64_t row) { norm_row(input.from, row, input.weight, rows); };
        const auto prepare = [&](int64_t part) {
            prepared.template prepare<Element>(matrix.held, num_rows, part, rows.data(), stride_words, input.width);
        };
        if (!apart && input.from) {
            share_rows(member, num_rows, norm);
            end(NORM, member);
        }
        if (!apart && parts) {
            share_rows(member, parts, prepare);
            team_.barrier(member);
        }
        const auto ready = [&] {
            if (!apart) return;
            for (int64_t row = 0; row < num_rows && input.from; ++row) norm(row);
            for (int64_t part = 0; part < parts; ++part) prepare(part);
        };
        team_.share(member, (num_outputs + PANEL - 1) / PANEL, ready, [&](int64_t panel, int64_t next) {
            const auto finish_rows = [&](int64_t first, int64_t count, const PanelSums& sums) {
                for (int64_t row = 0; row < count; ++row) finish(first + row, panel * PANEL, sums.of[row]);
            };
            multiply_any_panel<Element>(num_rows, rows.data(), stride_words, prepared, matrix, input.width, panel, next, finish_rows);
        });
    }

    void embed(const Step& step, int member) {
        share_rows(member, step.num_rows, [&](int64_t row) {
            float* to = step.hidden + row * hidden_stride_;
            row_of_embedding<Element>(model_.embedding, step.token_ids[row], model_.hidden_size, to);
            for (int64_t i = model_.hidden_size; i < hidden_stride_; ++i) to[i] = 0.0f;
        });
    }

    void norm_row(const float* rows, int64_t row, const float* weight, std::vector<uint32_t>& normed) const {
        const float* from = rows + row * hidden_stride_;
        Floats squares = {};
        for (int64_t i = 0; i < hidden_stride_; i += LANES) squares = fused(load(from + i), load(from + i), squares);
        const float mean = sum(squares) / float(model_.hidden_size);
        const Floats scale = all(1.0f / __builtin_sqrtf(mean + float(model_.norm_epsilon)));
        Stored* to = reinterpret_cast<Stored*>(normed.data()) + row * normed_stride_;
        for (int64_t i = 0; i < hidden_stride_; i += PANEL) {
            float part[PANEL];
            for (int j = 0; j < PANEL; j += LANES) store(part + j, load(from + i + j) * scale * load(weight + i + j));
            Element::narrow(part, to + i, PANEL);
        }
    }

    // What becomes of a product that ends a half layer.
    auto add_up(const Step& step, const float* bias) const {
        return [&step, this, bias](int64_t row, int64_t first, const float* sums) {
            const int64_t offset = row * hidden_stride_ + first;
            for (int i = 0; i < PANEL; i += LANES) {
                const Floats sum = bias ? load(sums + i) + load(bias + first + i) : load(sums + i);
                if (step.partial)
                    store(step.partial + offset + i, sum);
                else
                    store(step.hidden + offset + i, load(step.hidden + offset + i) + sum);
            }
        };
    }

    void compute(const Step& step, int64_t layer, int member) {
        if (step.halves & ATTENTION) attention_half(step, layer, member);
        if (step.halves & FEED_FORWARD) feed_forward_half(step, layer, member);
    }

    void attention_half(const Step& step, int64_t layer, int member) {
        const LayerWeights& weights = layers_[size_t(layer)];
        const int64_t rows = step.num_rows;
        product(member, rows, normed(step.hidden, weights.attention_norm), weights.qkv, qkv_size_,
                [&](int64_t row, int64_t first, const float* sums) {
                    float* to = &qkv_[size_t(row * qkv_stride_ + first)];
                    for (int i = 0; i < PANEL; i += LANES)
                        store(to + i, weights.qkv_bias ? load(sums + i) + load(weights.qkv_bias + first + i) : load(sums + i));
                });
        end(QKV, member);
        // So few rows of a sequence are in one company, hence nobody else's queries need what is written for them.
        const bool at_once = is_apart(rows) && rows * group_ <= QUERIES_AT_ONCE;
        if (!at_once) {
            for (int64_t sequence = 0; sequence < step.num_sequences; ++sequence) {
                const int64_t first = step.first_rows[sequence];
                const int64_t* table = step.tables + sequence * step.table_width;
                share_rows(member, step.first_rows[sequence + 1] - first, [&](int64_t i) {
                    for (int64_t kv_head = 0; kv_head < model_.num_kv_heads; ++kv_head)
                        turn_and_write(step, layer, first + i, table, kv_head);
                });
            }
            end(TURN_AND_WRITE, member);
        }
        team_.share(member, int64_t(companies_.all.size()) * model_.num_kv_heads, [&](int64_t i, int64_t next) {
            const Company& company = companies_.all[size_t(i / model_.num_kv_heads)];
            const int64_t kv_head = i % model_.num_kv_heads;
            if (at_once) turn_and_write(step, layer, company, kv_head);
            attend_together(step, layer, company, kv_head, scratch_[size_t(member)], upcoming(step, layer, next));
        });
        end(ATTEND, member);
        product(member, rows, {attended_, attended_stride_, attended_size_}, weights.output, model_.hidden_size,
                add_up(step, weights.output_bias));
        end(OUTPUT, member);
    }

    void feed_forward_half(const Step& step, int64_t layer, int member) {
        const LayerWeights& weights = layers_[size_t(layer)];
        const int64_t rows = step.num_rows;
        product(member, rows, normed(step.hidden, weights.mlp_norm), weights.gate_up, 2 * inner_size_,
                [&](int64_t row, int64_t first, const float* sums) {
                    float gated[PANEL / 2];
                    for (int i = 0; i < PANEL / 2; i += LANES) {
                        const Floats gate = load(sums + i);
                        store(gated + i, gate / (exponential(-gate) + 1.0f) * load(sums + PANEL / 2 + i));
                    }
                    Element::narrow(gated, reinterpret_cast<Stored*>(inner_.data()) + row * inner_stride_ + first / 2, PANEL / 2);
                });
        end(GATE_UP, member);
        product(member, rows, {inner_, inner_stride_, inner_size_}, weights.down, model_.hidden_size, add_up(step, nullptr));
        end(DOWN, member);
    }

    // Where a unit of attention begins to read; units are companies by KV heads.
    Upcoming upcoming(const Step& step, int64_t layer, int64_t unit) const {
        const size_t company = size_t(unit / model_.num_kv_heads);
        if (company >= companies_.all.size()) return {};
        const Member& of = companies_.members[size_t(companies_.all[company].first_member)];
        const int64_t end = step.positions[of.first_row] + of.num_rows;
        return {step.tables + of.sequence * step.table_width, layer, unit % model_.num_kv_heads, end};
    }

    void attend_together(const Step& step, int64_t layer, const Company& company, int64_t kv_head, AttentionScratch<Element>& scratch,
                         const Upcoming& upcoming) {
        const Member* members = &companies_.members[size_t(company.first_member)];
        const int64_t row_words = group_ * model_.head_dim / PER_WORD;
        const uint32_t* queries = &queries_[size_t((kv_head * step.num_rows + members[0].first_row) * row_words)];
        if (company.num_members > 1) {
            uint32_t* to = scratch.queries.data();
            for (int64_t i = 0; i < company.num_members; ++i) {
                const uint32_t* from = &queries_[size_t((kv_head * step.num_rows + members[i].first_row) * row_words)];
                to = std::copy(from, from + members[i].num_rows * row_words, to);
            }
            queries = scratch.queries.data();
        }
        scratch.company.clear();
        for (int64_t i = 0; i < company.num_members; ++i) {
            Stored* to = reinterpret_cast<Stored*>(attended_.data()) + members[i].first_row * attended_stride_;
            scratch.company.push_back({step.tables + members[i].sequence * step.table_width, step.positions[members[i].first_row],
                                       members[i].num_rows, to + kv_head * group_ * model_.head_dim});
        }
        attend<Element>(pool_, layer, kv_head, scratch.company, company.shared, group_, queries, scratch, attended_stride_, upcoming);
    }

    // Of all rows of a company.
    void turn_and_write(const Step& step, int64_t layer, const Company& company, int64_t kv_head) {
        for (int64_t i = 0; i < company.num_members; ++i) {
            const Member& of = companies_.members[size_t(company.first_member + i)];
            const int64_t* table = step.tables + of.sequence * step.table_width;
            for (int64_t row = of.first_row; row < of.first_row + of.num_rows; ++row) turn_and_write(step, layer, row, table, kv_head);
        }
    }

    // Queries go to [kv head][row][head of its group], so that the queries of a unit lie together; keys and values to the pool.
    void turn_and_write(const Step& step, int64_t layer, int64_t row, const int64_t* table, int64_t kv_head) {
        const int64_t head_dim = model_.head_dim, half = head_dim / 2, position = step.positions[row];
        const float* heads = &qkv_[size_t(row * qkv_stride_)];
        const float *cosines = model_.cosines + position * half, *sines = model_.sines + position * half;
        Stored* queries = reinterpret_cast<Stored*>(queries_.data()) + (kv_head * step.num_rows + row) * group_ * head_dim;
        for (int64_t i = 0; i < group_; ++i)
            turn_head<Element>(heads + (kv_head * group_ + i) * head_dim, cosines, sines, half, queries + i * head_dim);
        const int64_t block = table[position / model_.block_tokens], offset = position % model_.block_tokens * pool_.row_values;
        Stored* keys = pool_.keys_of(block, layer, kv_head) + offset;
        const float* key = heads + (model_.num_heads + kv_head) * head_dim;
        const float* value = key + model_.num_kv_heads * head_dim;
        if (pool_.rounded) {
            float turned[512];
            turn_head<Float32>(key, cosines, sines, half, turned);
            round_row(turned, head_dim, keys);
            round_row(value, head_dim, keys + pool_.values_offset());
        } else {
            turn_head<Element>(key, cosines, sines, half, keys);
            Element::narrow(value, keys + pool_.values_offset(), head_dim);
        }
    }

    const Description model_;
    const std::vector<LayerWeights> layers_;
    const int64_t group_, hidden_stride_, qkv_size_, qkv_stride_, attended_size_, inner_size_;
    const int64_t normed_stride_, attended_stride_, inner_stride_;  // in values
    const Pool<Element> pool_;
    Team team_;
    StageClock clock_;
    std::vector<AttentionScratch<Element>> scratch_;
    std::vector<Own> own_;
    Companies companies_;
    int64_t reserved_rows_ = 0;
    std::vector<uint32_t> normed_, queries_, attended_, inner_;
    std::vector<float> qkv_;
    ProductRows rows_;  // the input of the product that runs
};

}  // namespace pdserve

using namespace pdserve;

// Raised with every change of the interface below or of the layouts that it trusts.
extern "C" int64_t pdserve_interface() { return 8; }

// Libraries of one source and the same value give the same bits.
extern "C" int64_t pdserve_arithmetic() { return arithmetic(); }

// Null if there is no memory for it. Weights, tables and pool stay the caller's and must outlive the decoder.
extern "C" void* pdserve_decoder_create(const Description* model) {
    try {
        if (model->bytes_per_value == 2) return static_cast<AnyDecoder*>(new Decoder<BFloat16>(*model));
        return static_cast<AnyDecoder*>(new Decoder<Float32>(*model));
    } catch (...) {
        return nullptr;
    }
}

extern "C" void pdserve_decoder_destroy(void* decoder) { delete static_cast<AnyDecoder*>(decoder); }

// For the calls to come; as many as it was made with, at most.
extern "C" void pdserve_decoder_use_threads(void* decoder, int64_t wanted) { static_cast<AnyDecoder*>(decoder)->use_threads(wanted); }

// Seconds per stage are added to `seconds` from now on; null ends it.
extern "C" void pdserve_decoder_watch(void* decoder, double* seconds) { static_cast<AnyDecoder*>(decoder)->watch(seconds); }

extern "C" int pdserve_decoder_limits(void* decoder, Limits* to) {
    try {
        *to = static_cast<AnyDecoder*>(decoder)->limits();
        return DONE;
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
}

extern "C" int pdserve_decoder_forward(void* decoder, const Step* step) {
    try {
        return static_cast<AnyDecoder*>(decoder)->forward(*step);
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
}

extern "C" int pdserve_decoder_logits(void* decoder, const float* hidden, int64_t num_rows, float* to) {
    try {
        return static_cast<AnyDecoder*>(decoder)->logits(hidden, num_rows, to);
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
}

// The best token of each row, as `BestToken` finds it; bit i of word w of `may_come[row]` is token 32 w + i, and null is all of them.
extern "C" int pdserve_decoder_pick(void* decoder, const float* hidden, int64_t num_rows, const uint32_t* const* may_come, int64_t* to) {
    try {
        return static_cast<AnyDecoder*>(decoder)->pick(hidden, num_rows, may_come, to);
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
}
