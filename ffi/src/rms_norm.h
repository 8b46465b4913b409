// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ktx {

// out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight, for rows of d values, float32 or bfloat16; sums are float32 and
// run in the same order for every row, however many there are.
void rms_norm(int64_t rows, int64_t d, const void* x, bool x_bf16, const float* weight, float eps, void* out,
              bool out_bf16);

}  // namespace ktx
