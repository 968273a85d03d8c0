#include "step.h"

#include <climits>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <cstdlib>

void* map_memory(size_t bytes) {
#if defined(__linux__)
    const size_t huge = 2u << 20;
    if (bytes >= huge) {
        bytes = (bytes + huge - 1) / huge * huge;
        void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) throw std::bad_alloc();
        madvise(data, bytes, MADV_HUGEPAGE);
        return data;
    }
#endif
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!data) throw std::bad_alloc();
    return data;
}
void unmap_memory(void* data, size_t bytes) {
#if defined(__linux__)
    const size_t huge = 2u << 20;
    if (bytes >= huge) { munmap(data, (bytes + huge - 1) / huge * huge); return; }
#endif
    std::free(data);
}

static bool any_type(const Model& m, bool (*test)(const Matrix&)) {
    if (test(m.head)) return true;
    for (int l = 0; l < m.layers; l++) {
        const Layer& a = m.layer[l];
        for (const Matrix* w : {&a.query_down, &a.query, &a.latent, &a.up, &a.value_up, &a.out, &a.gate, &a.up_gate, &a.down, &a.expert_gate_up, &a.expert_down})
            if (w->rows && test(*w)) return true;
    }
    return false;
}

Stack::Stack(const Model& model, int threads) : m(model), pool(threads) {
    narrow = any_type(m, [](const Matrix& w) { return w.type == BF16; });
    quantised = any_type(m, [](const Matrix& w) { return is_quantised(w); });
    for (int i = 0; i < threads; i++) own.push_back(std::make_unique<Private>());
}

constexpr int PIECE = 32;  // weight rows computed at a time: one group of what is computed from them
// Few tokens: blocks of hidden columns whose activations are computed at once. That is a chain of operations during which memory rests; with
// a chain for each 74 KB of weights two threads read 51 of 58 GB/s, with four chains side by side 54.
constexpr int BLOCKS = 4, FEW = 8;
// Bytes of sums that a task of the down products keeps in the first-level cache: the more rows it computes, the longer it reads in one place.
constexpr size_t DOWN_BYTES = 32u << 10;

// Floats of results that tasks of the absorbed reading may leave to be merged; beyond them a task takes all spans of its group.
constexpr size_t MOST_SPAN_FLOATS = 16u << 20;

void Stack::reserve() {
    rows = step->rows;
    int absorbed_rows = 0, most_expanded = 0;
    groups.clear(); group_span.clear(); head_task.clear(); absorbed_row.clear();
    int all_spans = 0;
    const size_t size = (size_t)LANES * rounded(m.latent) + 2 * LANES;
    for (int s = 0; s < step->segments; s++) {
        const Segment& segment = step->segment[s];
        if (segment.expanded) {
            most_expanded = std::max(most_expanded, segment.rows);
            for (int h = 0; h < m.heads; h++) head_task.push_back({s, h});
            continue;
        }
        for (int t = 0; t < segment.rows; t++) absorbed_row.push_back(segment.first_row + t);
        const int lines = segment.rows * m.heads;
        for (int first = 0; first < lines; first += LANES) {
            const int count = std::min(LANES, lines - first);
            const int end = segment.position + (first + count - 1) / m.heads + 1;
            groups.push_back({s, (int)((size_t)absorbed_rows * m.heads + first), count, spans_for(end), 0});
            all_spans += groups.back().spans;
        }
        absorbed_rows += segment.rows;
    }
    // few spans: a task each, so that all threads have some; results beyond the caches cost more than they bring
    at_once = all_spans < 4 * RUN * pool.size ? 1 : all_spans / RUN * size <= MOST_SPAN_FLOATS ? RUN : INT_MAX / 2;
    for (int g = 0; g < (int)groups.size(); g++) {
        groups[g].result = group_span.size() * size;
        for (int span = 0; span < groups[g].spans; span += at_once) group_span.push_back({g, span});
    }
    identity.resize((size_t)std::max(rows * std::max(1, m.chosen), absorbed_rows * m.heads));
    for (size_t i = 0; i < identity.size(); i++) identity[i] = (int)i;
    x = x_.get((size_t)rows * padded(m.hidden));
    cosine = cosine_.get((size_t)rows * m.rope / 2);
    sine = sine_.get((size_t)rows * m.rope / 2);
    query = query_.get((size_t)rows * (rounded(m.heads * (m.nope + m.rope))));
    latent = latent_.get((size_t)rows * rounded(m.latent + m.rope));
    normed = normed_.get(rows, m.hidden, narrow, quantised);
    if (m.query_latent) query_latent = query_latent_.get(rows, m.query_latent, narrow, quantised);
    nope = nope_.get(absorbed_rows * m.heads, m.nope, false, quantised);
    absorbed = absorbed_.get((size_t)absorbed_rows * m.heads * entry_width(m) + LANES);
    spans = spans_.get(group_span.size() * size);
    mixed = mixed_.get(absorbed_rows * m.heads, m.latent, narrow, quantised);
    heads = heads_.get(rows, m.heads * m.value, narrow, quantised);
    gates = gates_.get((size_t)rows * std::max(1, m.chosen));
    chosen = chosen_.get((size_t)rows * std::max(1, m.chosen));
    affinity = affinity_.get((size_t)rows * std::max(1, m.experts));
    int widest = 0, widest_expert = 0;
    for (int l = 0; l < m.layers; l++) {
        widest = std::max(widest, (int)m.layer[l].gate.rows);
        widest_expert = std::max(widest_expert, (int)m.layer[l].expert_width);
    }
    const int pieces = (m.hidden + PIECE - 1) / PIECE;
    down_rows = PIECE * std::max(1, std::min(pieces / (2 * pool.size), (int)(DOWN_BYTES / (rows * PIECE * sizeof(float)))));
    if (widest) always = always_.get(rows, widest, narrow, quantised);
    if (widest_expert) hidden = hidden_.get(rows * m.chosen, widest_expert, narrow, quantised);
    last = last_.get(std::max(1, step->logit_rows), m.hidden, narrow, quantised);
    for (auto& p : own) {
        const size_t span_rows = (size_t)SPAN * (entry_width(m) + 2 * LANES);
        p->wide.get(span_rows);
        p->thin.get(span_rows);
        p->scores.get((size_t)SPAN * LANES + 2 * size + 8 * (size_t)std::max(rounded(m.latent), rounded(m.value)));
        p->panel.get((size_t)(entry_width(m) + 2 * LANES) * LANES);
        if (most_expanded) p->more.get(expanded_floats(m, most_expanded));
        p->out.get(std::max((size_t)rows * 2 * down_rows + (size_t)2 * (m.experts + m.groups + LANES), (size_t)FEW * BLOCKS * 2 * PIECE));
    }
}

void Stack::run(const Step& given, const Cache& storage) {
    step = &given;
    cache = &storage;
    reserve();
    pool.run([](void* stack, Worker& w) { ((Stack*)stack)->work(w); }, this);
}

// y[i * stride + r] = (or +=) weight row r times row i of x. Ends without a barrier.
void Stack::product(Worker& w, const Matrix& matrix, const Rows& in, int count, float* y, size_t stride, bool add) {
    const int pieces = (matrix.rows + PIECE - 1) / PIECE;
    const int64_t bytes = (int64_t)PIECE * in.width * (matrix.type == F32 ? 4 : matrix.type == BF16 ? 2 : 1);
    const int64_t grain = std::max<int64_t>(1, std::min<int64_t>((64 << 10) / bytes, pieces / (4 * pool.size)));
    float* out = own[w.index]->out.get(0);
    w.share(pieces, grain, [&](int64_t p) {
        const int row = (int)p * PIECE, some = std::min(PIECE, matrix.rows - row);
        multiply(matrix, row, some, in, identity.data(), count, out, PIECE);
        for (int i = 0; i < count; i++) {
            float* to = y + (size_t)i * stride + row;
            if (add) for (int r = 0; r < some; r++) to[r] += out[(size_t)i * PIECE + r];
            else std::memcpy(to, out + (size_t)i * PIECE, some * sizeof(float));
        }
    });
}

// Rows of `in` in the form that `matrix` wants, columns behind the last set to 0 first.
static void finish_row(const Rows& in, int i, int columns, const Matrix& matrix) {
    std::memset(in.f32 + (size_t)i * in.width + columns, 0, (in.width - columns) * sizeof(float));
    prepare(in, i, matrix.type);
}

void Stack::work(Worker& w) {
    const int width = padded(m.hidden), half = m.rope / 2;
    w.share(rows, 8, [&](int64_t i) {
        std::memset(x + i * width, 0, width * sizeof(float));
        embed(m.embedding, step->tokens[i], x + i * width);
        for (int j = 0; j < half; j++) {
            const float angle = (float)step->positions[i] * m.frequencies[j];
            cosine[i * half + j] = std::cos(angle) * m.rotation_scale;
            sine[i * half + j] = std::sin(angle) * m.rotation_scale;
        }
    });
    w.barrier();
    int moe_index = 0;
    for (int l = 0; l < m.layers; l++) {
        attention(w, m.layer[l], l);
        feed_forward(w, m.layer[l], moe_index);
        moe_index += m.layer[l].router.rows > 0;
    }
    logits(w);
}

void Stack::attention(Worker& w, const Layer& layer, int index) {
    const int width = padded(m.hidden);
    w.share(rows, 1, [&](int64_t i) {
        rms_norm(x + i * width, layer.attention_norm, m.norm_eps, normed.f32 + i * normed.width);
        const Matrix& first = layer.query_down.rows ? layer.query_down : layer.query;
        finish_row(normed, (int)i, m.hidden, first);
        if (layer.latent.type != first.type) prepare(normed, (int)i, layer.latent.type);
    });
    w.barrier();
    project(w, layer, index);
    attend(w, layer, index);
    // back to the residual stream
    w.share(rows, 1, [&](int64_t i) { finish_row(heads, (int)i, m.heads * m.value, layer.out); });
    w.barrier();
    product(w, layer.out, heads, rows, x, width, true);
    w.barrier();
}

// Queries, latents and rotated keys of all rows; the latter two go into the cache.
void Stack::project(Worker& w, const Layer& layer, int index) {
    const int head_width = m.nope + m.rope, query_stride = rounded(m.heads * head_width), latent_stride = rounded(m.latent + m.rope);
    product(w, layer.latent, normed, rows, latent, latent_stride, false);
    if (layer.query_down.rows) {
        product(w, layer.query_down, normed, rows, query_latent.f32, query_latent.width, false);
        w.barrier();
        w.share(rows, 1, [&](int64_t i) {
            float* at = query_latent.f32 + i * query_latent.width;
            rms_norm(at, layer.query_norm, m.latent_norm_eps, at);
            finish_row(query_latent, (int)i, m.query_latent, layer.query);
        });
        w.barrier();
    }
    product(w, layer.query, layer.query_down.rows ? query_latent : normed, rows, query, query_stride, false);
    w.barrier();
    const int half = m.rope / 2;
    w.share(rows, 1, [&](int64_t i) {
        float* entry = latent + i * latent_stride;
        float line[LANES + 8192];  // library.py refuses larger latents
        rms_norm(entry, layer.latent_norm, m.latent_norm_eps, line);
        rotate(entry + m.latent, m.rope, cosine + i * half, sine + i * half);
        const Segment* segment = step->segment;
        while (i >= segment->first_row + segment->rows) segment++;
        const int position = step->positions[i];
        const size_t block = (size_t)index * cache->blocks + segment->table[position / BLOCK];
        encode(*cache, cache->data + (block * BLOCK + position % BLOCK) * cache->entry_bytes, line, m.latent, entry + m.latent, m.rope);
        for (int h = 0; h < m.heads; h++) {
            float* q = query + i * query_stride + (size_t)h * head_width;
            rotate(q + m.nope, m.rope, cosine + i * half, sine + i * half);
            for (int k = 0; k < head_width; k++) q[k] *= m.softmax_scale;
        }
    });
    w.barrier();
}

// Queries through W^UK (appendix C), for weights as published: out[l] = sum over channels of q[channel] * w[channel][l].
template <int32_t TYPE>
static void absorb(const Model& m, const Matrix& up, int head, const float* const* q, int count, float* const* out) {
    const size_t first = (size_t)head * (m.nope + m.value) * m.latent;
    for (int l = 0; l < m.latent; l += 4 * LANES) for (int i = 0; i < count; i += 4) {
        vf acc[4][4] = {};
        const int real = std::min(4, count - i), columns = std::min(4 * LANES, m.latent - l);
        for (int channel = 0; channel < m.nope; channel++) {
            const size_t at = first + (size_t)channel * m.latent + l;
            for (int j = 0; j < 4 && j * LANES < columns; j++) {
                const int some = std::min(LANES, columns - j * LANES);
                vf weight;
                if (TYPE == F32) weight = some == LANES ? load((const float*)up.data + at + j * LANES) : load_some((const float*)up.data + at + j * LANES, some);
                else weight = some == LANES ? load_bf16((const uint16_t*)up.data + at + j * LANES) : load_bf16_some((const uint16_t*)up.data + at + j * LANES, some);
                for (int r = 0; r < real; r++) acc[r][j] += splat(q[i + r][channel]) * weight;
            }
        }
        for (int r = 0; r < real; r++) for (int j = 0; j < 4 && j * LANES < columns; j++)
            std::memcpy(out[i + r] + l + j * LANES, &acc[r][j], std::min(LANES, columns - j * LANES) * sizeof(float));
    }
}

void Stack::attend(Worker& w, const Layer& layer, int index) {
    if (layer.up.type == BF16) attend_as<true>(w, layer, index);
    else attend_as<false>(w, layer, index);
}

// Where the blocks of a span lie; those that a group does not have are its last.
void Stack::next_blocks(int layer, const Group& group, int span, const uint8_t** blocks) const {
    const Segment& segment = step->segment[group.segment];
    const int last = (segment.position + segment.rows - 1) / BLOCK;
    for (int b = 0; b < SPAN / BLOCK; b++)
        blocks[b] = cache->data + ((size_t)layer * cache->blocks + segment.table[std::min(last, span_start(span) / BLOCK + b)]) * BLOCK * cache->entry_bytes;
}

template <bool NARROW> void Stack::attend_as(Worker& w, const Layer& layer, int index) {
    const int head_width = m.nope + m.rope, query_stride = rounded(m.heads * head_width), width = entry_width(m), key_at = rounded(m.latent);
    const int tokens = (int)absorbed_row.size();
    const bool as_published = layer.key_up.rows == 0;
    // 1. queries of the absorbed reading, in latent space: [token, head][entry width]
    if (tokens && !as_published) {
        w.share((int64_t)tokens * m.heads, 4, [&](int64_t i) {
            std::memcpy(nope.f32 + i * nope.width, query + (size_t)absorbed_row[i / m.heads] * query_stride + (i % m.heads) * head_width, m.nope * sizeof(float));
            finish_row(nope, (int)i, m.nope, layer.key_up);
        });
        w.barrier();
    }
    if (tokens) w.share((int64_t)m.heads * ((tokens + 7) / 8), 1, [&](int64_t task) {
        const int head = (int)(task % m.heads), from = (int)(task / m.heads) * 8, count = std::min(8, tokens - from);
        const float* q[8];
        float* out[8];
        int32_t line[8];
        for (int i = 0; i < count; i++) {
            q[i] = query + (size_t)absorbed_row[from + i] * query_stride + (size_t)head * head_width;
            line[i] = (from + i) * m.heads + head;
            out[i] = absorbed + (size_t)line[i] * width;
            std::memset(out[i] + m.latent, 0, (width - m.latent) * sizeof(float));
            std::memcpy(out[i] + key_at, q[i] + m.nope, m.rope * sizeof(float));
        }
        if (!as_published) {
            float* y = own[w.index]->scores.get(0);
            const int stride = (m.latent + TILE - 1) / TILE * TILE;
            multiply(layer.key_up, head * stride, m.latent, nope, line, count, y, stride);
            for (int i = 0; i < count; i++) std::memcpy(out[i], y + (size_t)i * stride, m.latent * sizeof(float));
        } else if (NARROW) absorb<BF16>(m, layer.up, head, q, count, out);
        else absorb<F32>(m, layer.up, head, q, count, out);
    });
    w.barrier();
    // 2. attention
    Private& mine = *own[w.index];
    Scratch scratch{mine.wide.get(0), mine.scores.get(0), mine.panel.get(0), mine.more.get(0), mine.thin.get(0)};
    const size_t size = (size_t)LANES * rounded(m.latent) + 2 * LANES;
    w.share((int64_t)head_task.size(), 1, [&](int64_t task) {
        const Segment& segment = step->segment[head_task[task].first];
        const int head = head_task[task].second;
        Expanded e{&m, cache, &layer, &segment, index, head, query + (size_t)segment.first_row * query_stride + (size_t)head * head_width, (size_t)query_stride,
                   heads.f32 + (size_t)segment.first_row * heads.width + (size_t)head * m.value, (size_t)heads.width};
        expanded_head<NARROW>(e, scratch);
    });
    w.share((int64_t)group_span.size(), 1, [&](int64_t task) {
        const Group& group = groups[group_span[task].first];
        const Segment& segment = step->segment[group.segment];
        vi limit;
        int end = 0;
        for (int i = 0; i < LANES; i++) {
            const int line = group.first + std::min(i, group.count - 1);
            limit[i] = step->positions[absorbed_row[line / m.heads]];
            end = std::max(end, limit[i] + 1);
        }
        pack_queries<NARROW>(absorbed + (size_t)group.first * width, group.count, width, scratch.panel);
        // the spans of a run are merged, then the runs, whoever computes them
        const int latent = rounded(m.latent), first = group_span[task].second, stop = std::min(group.spans, first + at_once);
        float *result = spans + (size_t)task * size, *run = scratch.scores + (size_t)SPAN * LANES, *one = run + size;
        for (int span = first; span < stop; span++) {
            float* to = span == first ? result : span % RUN == 0 ? run : one;
            const int from = span_start(span), until = std::min(end, span_start(span + 1));
            const uint8_t* ahead[SPAN / BLOCK];
            if (span + 1 < stop) next_blocks(index, group, span + 1, ahead);
            else { const auto& next = group_span[std::min<int64_t>(task + 1, group_span.size() - 1)]; next_blocks(index, groups[next.first], next.second, ahead); }
            absorbed_span<NARROW>(m, *cache, index, segment.table, from, until, limit, scratch.panel, scratch, ahead, to);
            if (to == one) merge_span(one, latent, span - first < RUN ? result : run);
            if (span - first >= RUN && (span % RUN == RUN - 1 || span + 1 == stop)) merge_span(run, latent, result);
        }
    });
    w.barrier();
    if (!tokens) return;
    w.share((int64_t)groups.size(), 1, [&](int64_t g) {
        const Group& group = groups[g];
        float* all = spans + group.result;
        if (at_once == 1)
            for (int span = 1; span < group.spans; span++)
                if (span % RUN) merge_span(all + span * size, rounded(m.latent), all + span / RUN * RUN * size);
        for (int task = RUN / std::min(at_once, RUN); task * at_once < group.spans && at_once <= RUN; task += RUN / at_once)
            merge_span(all + task * size, rounded(m.latent), all);
        const float* total = all + (size_t)LANES * rounded(m.latent) + LANES;
        for (int i = 0; i < group.count; i++) {
            float* to = mixed.f32 + (size_t)(group.first + i) * mixed.width;
            for (int c = 0; c < m.latent; c++) to[c] = all[(size_t)i * rounded(m.latent) + c] / total[i];
            finish_row(mixed, group.first + i, m.latent, as_published ? layer.up : layer.value_up);
        }
    });
    w.barrier();
    // 3. values out of latent space
    w.share((int64_t)m.heads * ((tokens + 7) / 8), 1, [&](int64_t task) {
        const int head = (int)(task % m.heads), from = (int)(task / m.heads) * 8, count = std::min(8, tokens - from);
        int32_t line[8];
        for (int i = 0; i < count; i++) line[i] = (from + i) * m.heads + head;
        const int stride = (m.value + TILE - 1) / TILE * TILE;
        float* y = scratch.scores;
        if (as_published) multiply(layer.up, head * (m.nope + m.value) + m.nope, m.value, mixed, line, count, y, stride);
        else multiply(layer.value_up, head * stride, m.value, mixed, line, count, y, stride);
        for (int i = 0; i < count; i++)
            std::memcpy(heads.f32 + (size_t)absorbed_row[from + i] * heads.width + (size_t)head * m.value, y + (size_t)i * stride, m.value * sizeof(float));
    });
    w.barrier();
}

// The feed-forward network ------------------------------------------------------------------------------------------------------------

// List what has to be computed: the network that every token passes, then each expert that was chosen, in order.
void Stack::collect_units(const Layer& layer) {
    units.clear();
    if (layer.gate.rows) units.push_back({&layer.gate, &layer.up_gate, &layer.down, 0, 0, PIECE, 0, layer.gate.rows, rows, identity.data(), nullptr, 0, 1});
    if (layer.router.rows) {
        const int all = rows * m.chosen;
        counts.assign(m.experts + 1, 0);
        expert_token.resize(all);
        expert_weight.resize(all);
        for (int i = 0; i < all; i++) counts[chosen[i] + 1]++;
        for (int e = 0; e < m.experts; e++) counts[e + 1] += counts[e];
        const bool by_turns = is_quantised(layer.expert_gate_up);
        const int to_up = by_turns ? PIECE : layer.expert_stride, stride = is_quantised(layer.expert_down) ? (m.hidden + TILE - 1) / TILE * TILE : m.hidden;
        for (int e = 0; e < m.experts; e++) {
            const int first = counts[e], count = counts[e + 1] - first, row = 2 * e * layer.expert_stride;
            if (count) units.push_back({&layer.expert_gate_up, &layer.expert_gate_up, &layer.expert_down, row, row + to_up, by_turns ? 2 * PIECE : PIECE, e * stride,
                                        layer.expert_width, count, expert_token.data() + first, expert_weight.data() + first, first, 1});
        }
        for (int i = 0; i < all; i++) {
            const int at = counts[chosen[i]]++;
            expert_token[at] = i / m.chosen;
            expert_weight[at] = gates[i];
        }
    }
    int all = 0;
    for (const Unit& unit : units) all += (unit.width + PIECE - 1) / PIECE;
    const int blocks = std::max(1, std::min(BLOCKS, all / (32 * pool.size)));  // so few that threads end together
    unit_task.assign(1, 0);
    for (Unit& unit : units) {
        unit.blocks = unit.count <= FEW ? blocks : 1;
        unit_task.push_back(unit_task.back() + (unit.width + unit.blocks * PIECE - 1) / (unit.blocks * PIECE));
    }
}

// silu(gate x) * up x for some blocks of hidden columns, in the form that the down product wants.
void Stack::hidden_blocks(const Unit& unit, int task, float* y) {
    const int first = task * unit.blocks * PIECE, all = std::min(unit.blocks * PIECE, unit.width - first), stride = 2 * unit.blocks * PIECE;
    float* up = y + unit.blocks * PIECE;
    const int run = unit.block_rows == PIECE ? all : PIECE;  // rows of one of the two that lie together
    for (int row = 0; row < all; row += run) {
        const int some = std::min(run, all - row), at = (first + row) / PIECE * unit.block_rows, next = (first + row + run) / PIECE * unit.block_rows;
        multiply(*unit.gate, unit.gate_row + at, some, normed, unit.token, unit.count, y + row, stride, tile_at(*unit.up, unit.up_row + at));
        multiply(*unit.up, unit.up_row + at, some, normed, unit.token, unit.count, up + row, stride, tile_at(*unit.gate, unit.gate_row + next));
    }
    for (int row = 0; row < all; row += PIECE) for (int i = 0; i < unit.count; i++)
        activate(unit, i, first + row, std::min(PIECE, all - row), y + (size_t)i * stride + row, up + (size_t)i * stride + row);
}

// What `some` of 32 results of gate and up for a unit's row i become, from hidden column `column` on.
void Stack::activate(const Unit& unit, int i, int column, int some, float* gate, float* up) {
    const Rows& to = unit.weight ? hidden : always;
    const size_t line = unit.first_hidden + i, at = line * to.width + column, group = at / GROUP;
    std::fill(gate + some, gate + PIECE, 0.0f);
    std::fill(up + some, up + PIECE, 0.0f);
    for (int k = 0; k < PIECE; k += LANES) {
        const vf product = silu(load(gate + k)) * load(up + k);
        store(to.f32 + at + k, product);
        if (unit.down->type == BF16) store_bf16(to.bf16 + at + k, product);
    }
    if (is_quantised(*unit.down)) quantise_group(to.f32 + at, to.i8 + at, to.scale + group, to.total + group);
}

void Stack::feed_forward(Worker& w, const Layer& layer, int moe_index) {
    const int width = padded(m.hidden);
    float* y = own[w.index]->out.get(0);
    w.share(rows, 1, [&](int64_t i) {
        rms_norm(x + i * width, layer.feed_forward_norm, m.norm_eps, normed.f32 + i * normed.width);
        finish_row(normed, (int)i, m.hidden, layer.gate.rows ? layer.gate : layer.expert_gate_up);
        if (layer.gate.rows && layer.router.rows && layer.expert_gate_up.type != layer.gate.type) prepare(normed, (int)i, layer.expert_gate_up.type);
    });
    w.barrier();
    if (layer.router.rows) {  // in two loops: of a single row, too, all threads read the centroids
        const int some = 8, pieces = (m.experts + some - 1) / some;
        w.share((int64_t)rows * pieces, rows >= 8 ? pieces : 1, [&](int64_t task) {
            const int64_t i = task / pieces;
            const int e = (int)(task % pieces) * some;
            const float* row = normed.f32 + i * normed.width;
            if (layer.router.type == F32) eight_dots<F32>(layer.router, e, row, affinity + i * m.experts + e);
            else eight_dots<BF16>(layer.router, e, row, affinity + i * m.experts + e);
        });
        w.barrier();
        w.share(rows, 8, [&](int64_t i) { route(m, affinity + i * m.experts, chosen + i * m.chosen, gates + i * m.chosen, y); });
        w.barrier();
    }
    if (w.index == 0) {
        collect_units(layer);
        if (step->want_experts && layer.router.rows)
            std::memcpy(step->experts + (size_t)moe_index * rows * m.chosen, chosen, (size_t)rows * m.chosen * sizeof(int32_t));
    }
    w.barrier();
    w.share(unit_task.back(), 1, [&](int64_t task) {
        const size_t u = std::upper_bound(unit_task.begin(), unit_task.end(), task) - unit_task.begin() - 1;
        hidden_blocks(units[u], (int)(task - unit_task[u]), y);
    });
    w.barrier();
    w.share((m.hidden + down_rows - 1) / down_rows, 1, [&](int64_t p) {
        const int row = (int)p * down_rows, some = std::min(down_rows, m.hidden - row);
        float *total = y, *part = y + (size_t)rows * down_rows;
        std::memset(total, 0, (size_t)rows * down_rows * sizeof(float));
        for (size_t u = 0; u < units.size(); u++) {
            const Unit &unit = units[u], &next = units[u + 1 < units.size() ? u + 1 : 0];
            const void* then = tile_at(*next.down, next.down_row + row + (u + 1 < units.size() ? 0 : some));
            multiply(*unit.down, unit.down_row + row, some, unit.weight ? hidden : always, identity.data() + unit.first_hidden, unit.count, part, down_rows, then);
            for (int i = 0; i < unit.count; i++) {
                float* to = total + (size_t)unit.token[i] * down_rows;
                const vf weight = splat(unit.weight ? unit.weight[i] : 1.0f);
                for (int k = 0; k < some; k += LANES) store(to + k, load(to + k) + load(part + (size_t)i * down_rows + k) * weight);
            }
        }
        for (int i = 0; i < rows; i++) for (int r = 0; r < some; r++) x[(size_t)i * width + row + r] += total[(size_t)i * down_rows + r];
    });
    w.barrier();
}

void Stack::logits(Worker& w) {
    const int count = step->logit_rows, width = padded(m.hidden);
    if (!count) return;
    w.share(count, 1, [&](int64_t i) {
        rms_norm(x + (size_t)step->logit_row[i] * width, m.final_norm, m.norm_eps, last.f32 + i * last.width);
        finish_row(last, (int)i, m.hidden, m.head);
    });
    w.barrier();
    product(w, m.head, last, count, step->logits, m.vocab, false);
    w.barrier();
    w.share(count, 1, [&](int64_t i) {
        const float* line = step->logits + i * m.vocab;
        vf largest = splat(-INFINITY), bad = splat(0.0f);  // a NaN or an infinity makes it a NaN
        vi at = splat(0);
        int v = 0;
        for (; v + LANES <= step->used; v += LANES) {
            const vf here = load(line + v);
            const vi more = here > largest;
            largest = select(more, here, largest);
            at = (more & splat(v)) | (~more & at);
            bad += here * 0.0f;
        }
        int best = -1;
        for (int k = 0; k < LANES && v; k++) {
            const int id = at[k] + k;
            if (best < 0 || line[id] > line[best] || (line[id] == line[best] && id < best)) best = id;
        }
        float rest = sum(bad);
        for (; v < step->used; v++) { if (best < 0 || line[v] > line[best]) best = v; rest += line[v] * 0.0f; }
        step->best[i] = best;
        step->best_logit[i] = rest == 0.0f ? line[best] : NAN;
    });
}

// The interface -----------------------------------------------------------------------------------------------------------------------

enum { DONE = 0, NO_MEMORY = 1, OUT_OF_RANGE = 2 };

static bool in_range(const Model& m, const Step& step, const Cache& cache) {
    int row = 0;
    for (int s = 0; s < step.segments; s++) {
        const Segment& segment = step.segment[s];
        if (segment.first_row != row || segment.rows < 1 || segment.position < 0) return false;
        row += segment.rows;
        const int end = segment.position + segment.rows;
        for (int b = 0; b * BLOCK < end; b++) if (segment.table[b] < 0 || segment.table[b] >= cache.blocks) return false;
        for (int i = 0; i < segment.rows; i++) if (step.positions[segment.first_row + i] != segment.position + i) return false;
    }
    for (int i = 0; i < step.rows; i++) if (step.tokens[i] < 0 || step.tokens[i] >= m.vocab) return false;
    for (int i = 0; i < step.logit_rows; i++) if (step.logit_row[i] < 0 || step.logit_row[i] >= step.rows) return false;
    return row == step.rows && step.used > 0 && step.used <= m.vocab;
}

extern "C" {
void* dsv2_open(const Model* model, int32_t threads) {
    try { return new Stack(*model, threads); } catch (const std::exception&) { return nullptr; }
}
void dsv2_close(void* stack) { delete (Stack*)stack; }
// y[i, r] = product of weight row r and row i of x, a single thread's: what a step is made of, for those who want a part of it.
int32_t dsv2_multiply(const Matrix* w, const float* x, int32_t count, float* y) {
    try {
        RowsBuffer buffer;
        const Rows rows = buffer.get(count, w->cols, w->type == BF16, is_quantised(*w));
        const int stride = (w->rows + TILE - 1) / TILE * TILE;
        std::vector<float> out((size_t)count * stride);
        std::vector<int32_t> at(count);
        for (int i = 0; i < count; i++) {
            std::memcpy(rows.f32 + (size_t)i * rows.width, x + (size_t)i * w->cols, w->cols * sizeof(float));
            finish_row(rows, i, w->cols, *w);
            at[i] = i;
        }
        multiply(*w, 0, w->rows, rows, at.data(), count, out.data(), stride);
        for (int i = 0; i < count; i++) std::memcpy(y + (size_t)i * w->rows, out.data() + (size_t)i * stride, w->rows * sizeof(float));
    } catch (const std::exception&) { return NO_MEMORY; }
    return DONE;
}
int32_t dsv2_step(void* stack, const Model* model, const Step* step, const Cache* cache) {
    if (!in_range(*model, *step, *cache)) return OUT_OF_RANGE;
    try { ((Stack*)stack)->run(*step, *cache); } catch (const std::exception&) { return NO_MEMORY; }
    return DONE;
}
}
