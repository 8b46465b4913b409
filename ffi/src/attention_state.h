// SPDX-License-Identifier: Apache-2.0
// The running softmax of 16 heads (lanes), shared by the attention kernels. Included after a simd_*.h.
#pragma once

#include "attention_kernels.h"
#include "math_kernels.h"

namespace ktx {
namespace {

constexpr float kLowest = -3.0e38f;  // below every score; finite, so that differences are not NaN

struct State {
  float* top;   // [16] largest score so far
  float* sum;   // [16] sum of exp(score - top)
  float* mean;  // [16, padded_latent] the same weights times latents

  explicit State(float* p) : top(p), sum(p + kHeadLanes), mean(p + 2 * kHeadLanes) {}
};

void reset_state(const LatentShape& shape, float* p) {
  const State s(p);
  store_f(s.top, set_f(kLowest));
  store_f(s.sum, zero_f());
  for (int64_t i = 0; i < kHeadLanes * shape.padded_latent(); i += 16) store_f(s.mean + i, zero_f());
}

// Scores [64, 16] become weights relative to the largest score so far; returns in `fade` [16] what earlier weights are
// to be multiplied by.
KTX_INLINE void softmax_tile(float* scores, int valid, const State& s, float* fade) {
  const F32 before = load_f(s.top);
  F32 top = before;
  for (int i = 0; i < valid; ++i) top = max_f(load_f(scores + 16 * i), top);
  const F32 kept = exp_f(sub_f(before, top));
  F32 sum = zero_f();
  for (int i = 0; i < valid; ++i) {
    const F32 weight = exp_f(sub_f(load_f(scores + 16 * i), top));
    store_f(scores + 16 * i, weight);
    sum = add_f(sum, weight);
  }
  store_f(s.top, top);
  store_f(s.sum, fma_f(load_f(s.sum), kept, sum));
  store_f(fade, kept);
}

void merge_states(const LatentShape& shape, const float* later, float* tops, float* mean, int first, int last) {
  const State b(const_cast<float*>(later));
  const F32 top_a = load_f(tops);
  const F32 top = max_f(top_a, load_f(b.top));
  alignas(64) float fade_a[kHeadLanes];
  alignas(64) float fade_b[kHeadLanes];
  store_f(fade_a, exp_f(sub_f(top_a, top)));
  store_f(fade_b, exp_f(sub_f(load_f(b.top), top)));
  store_f(tops, top);
  float* sum = tops + kHeadLanes;
  store_f(sum, fma_f(load_f(b.sum), load_f(fade_b), mul_f(load_f(sum), load_f(fade_a))));
  const int64_t width = shape.padded_latent();
  for (int h = first; h < last; ++h) {
    for (int64_t i = h * width; i < (h + 1) * width; i += 16) {
      const F32 earlier = mul_f(load_f(mean + i), set_f(fade_a[h]));
      store_f(mean + i, fma_f(load_f(b.mean + i), set_f(fade_b[h]), earlier));
    }
  }
}

}  // namespace
}  // namespace ktx
