// What Python hands over: the layout of a model, its cache and one step. library.py declares the same structures for ctypes.
#pragma once
#include "matrix.h"

struct Vector { int32_t type, size; const void* data; };  // F32 or BF16

struct Layer {
    Vector attention_norm, query_norm, latent_norm, feed_forward_norm;
    Matrix query_down;            // W^DQ; no rows: queries are not compressed
    Matrix query;                 // W^UQ and W^QR, or W^Q
    Matrix latent;                // W^DKV and W^KR
    Matrix up;                    // kv_b_proj, F32 or BF16: per head W^UK, then W^UV
    Matrix key_up, value_up;      // of a quantised model, per head W^UK transposed, W^UV; no rows: absorb with `up`
    Matrix out;                   // W^O
    Matrix router;                // centroids, F32 or BF16; no rows: a dense layer
    Matrix gate, up_gate, down;   // of the dense network or of all shared experts as one; no rows: none
    Matrix expert_gate_up;        // experts stacked, each `expert_stride` gate rows, then as many up rows; quantised: 32 of each by turns
    Matrix expert_down;           // experts stacked, hidden rows (filled up) each
    int32_t expert_stride, expert_width;
};

struct Model {
    int32_t hidden, layers, heads, nope, rope, value, latent, query_latent, vocab;
    int32_t experts, chosen, groups, reachable, renormalise;  // reachable < groups: group-limited routing
    float norm_eps, latent_norm_eps, softmax_scale, rotation_scale, gate_scale;
    const float* frequencies;     // [rope / 2] radians per token
    const Layer* layer;
    Vector final_norm;
    Matrix embedding, head;
};

enum CacheFormat : int32_t { CACHE_F32 = 0, CACHE_BF16 = 1, CACHE_8 = 2, CACHE_6 = 3 };
constexpr int BLOCK = 64;  // tokens

struct Cache {
    int32_t format, entry_bytes, blocks, reserved;
    uint8_t* data;                // [layers, blocks, BLOCK, entry_bytes]
};

// Neighbouring tokens of one sequence, attended to in one reading.
struct Segment {
    int32_t first_row, rows, position, expanded;  // rows of the step; position of the first
    const int32_t* table;         // blocks of the sequence
};

struct Step {
    int32_t rows, segments, logit_rows, want_experts;
    const int32_t* tokens;        // [rows]
    const int32_t* positions;     // [rows]
    const Segment* segment;
    const int32_t* logit_row;     // [logit_rows] rows whose logits are wanted
    float* logits;                // [logit_rows, vocab]
    int32_t* best;                // [logit_rows] first of the largest below `used`
    float* best_logit;            // [logit_rows]
    int32_t used;                 // ids that may be chosen
    int32_t reserved;
    int32_t* experts;             // [MoE layers, rows, chosen], where wanted
};
