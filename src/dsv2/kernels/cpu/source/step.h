// One step of the whole layer stack: rows of tokens in, logits of some of them out. All threads run `Stack::work` together.
//
// A row's result depends on its own sequence alone: products, norms and attention compute a row independently of the others, and an
// expert's results are added to a token in the order of the experts.
#pragma once
#include <memory>
#include "attention.h"
#include "pool.h"

// Memory that grows and is never given back before the end; large pieces ask for huge pages.
template <class T> class Buffer {
  public:
    ~Buffer();
    T* get(size_t count);  // 64 bytes more than asked for may be read

  private:
    T* data = nullptr;
    size_t room = 0;
};
void* map_memory(size_t bytes);
void unmap_memory(void* data, size_t bytes);
template <class T> Buffer<T>::~Buffer() { if (data) unmap_memory(data, room * sizeof(T)); }
template <class T> T* Buffer<T>::get(size_t count) {
    count += 64;
    if (count > room) {
        if (data) unmap_memory(data, room * sizeof(T));
        data = nullptr;
        room = 0;
        data = (T*)map_memory(count * sizeof(T));
        room = count;
    }
    return data;
}

struct RowsBuffer {
    Buffer<float> f32, scale;
    Buffer<uint16_t> bf16;
    Buffer<int8_t> i8;
    Buffer<int32_t> total;
    Rows get(int rows, int columns, bool narrow, bool quantised) {
        const int width = padded(columns);
        const size_t all = (size_t)rows * width;
        Rows x{width, f32.get(all), nullptr, nullptr, nullptr, nullptr};
        if (narrow) x.bf16 = bf16.get(all);
        if (quantised) { x.i8 = i8.get(all); x.scale = scale.get(all / GROUP); x.total = total.get(all / GROUP); }
        return x;
    }
};

// A network of two products whose hidden rows are those of some tokens: an expert, or what every token passes.
struct Unit {
    const Matrix *gate, *up, *down;
    int gate_row, up_row, block_rows, down_row, width, count;  // block_rows: from one block of gate (or up) rows to the next
    const int32_t* token;         // [count] rows of the step
    const float* weight;          // [count] gates; null: every token passes it, its hidden rows lie in `always`
    int first_hidden;             // row of its first token in `hidden`
    int blocks;                   // blocks of hidden columns that one task computes
};

class Stack {
  public:
    Stack(const Model& model, int threads);
    void run(const Step& step, const Cache& cache);

  private:
    void reserve();
    void work(Worker& w);
    void attention(Worker& w, const Layer& layer, int index);
    void project(Worker& w, const Layer& layer, int index);
    void attend(Worker& w, const Layer& layer, int index);
    void feed_forward(Worker& w, const Layer& layer, int moe_index);
    void collect_units(const Layer& layer);
    void logits(Worker& w);
    void hidden_blocks(const Unit& unit, int task, float* y);
    void activate(const Unit& unit, int i, int column, int some, float* gate, float* up);
    void product(Worker& w, const Matrix& m, const Rows& x, int count, float* y, size_t stride, bool add);
    template <bool NARROW> void attend_as(Worker& w, const Layer& layer, int index);

    Model m;
    Pool pool;
    bool narrow, quantised;       // which forms of activations some matrix wants
    const Step* step = nullptr;
    const Cache* cache = nullptr;
    int rows = 0;
    int down_rows = 0;            // results that one task of the down products computes
    int at_once = 1;              // spans that one task computes and merges: one, a run of them, or all of a group
    std::vector<int32_t> identity, absorbed_row;  // rows of the absorbed segments
    struct Group { int segment, first, count, spans; size_t result; };  // sixteen (token, head) rows of the absorbed reading
    std::vector<Group> groups;
    void next_blocks(int layer, const Group& group, int span, const uint8_t** blocks) const;
    std::vector<std::pair<int, int>> group_span;  // group and first span of each absorbed task
    std::vector<std::pair<int, int>> head_task;   // segment and head of each expanded task
    std::vector<Unit> units;
    std::vector<int64_t> unit_task;               // first task of each unit in the first phase
    std::vector<int32_t> counts, expert_token;
    std::vector<float> expert_weight;
    // buffers by content; [rows, ...] unless said
    Buffer<float> x_, cosine_, sine_, query_, latent_, absorbed_, spans_, gates_, affinity_;
    Buffer<int32_t> chosen_;
    RowsBuffer normed_, query_latent_, nope_, mixed_, heads_, hidden_, always_, last_;
    float *x, *cosine, *sine, *query, *latent, *absorbed, *spans, *gates, *affinity;
    int32_t* chosen;
    Rows normed, query_latent, nope, mixed, heads, hidden, always, last;
    struct Private { Buffer<float> wide, scores, panel, more, out; Buffer<uint16_t> thin; };
    std::vector<std::unique_ptr<Private>> own;
};
