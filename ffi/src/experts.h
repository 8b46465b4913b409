// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "weights.h"

namespace ktx {

struct ExpertsCall {
  const Weights& gate;  // [E, F, D]
  const Weights& up;    // [E, F, D]
  const Weights& down;  // [E, D, K], K >= offset + F
  int64_t offset;       // of the F hidden values in K, a multiple of 16; the rest of K is zero
  int64_t tokens;
  int64_t top_k;
  const int32_t* ids;    // [tokens, top_k]; outside [0, E): adds nothing
  const float* weights;  // [tokens, top_k]
  const void* x;         // [tokens, D]
  bool x_bf16;
  void* out;  // [tokens, D]
  bool out_bf16;
  bool precise;  // fifteen bits of x and of the hidden values in place of eight, as in matmul
};

// out[t] = sum over j of weights[t, j] * down(silu(gate(x[t])) * up(x[t])) of expert ids[t, j], in ascending order of
// experts.
void experts(const ExpertsCall& call);

}  // namespace ktx
