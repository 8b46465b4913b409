// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "arrays.h"
#include "weights.h"

namespace ktx {

// out[t, l, :] = w[l] @ x[t, l, :] for t < tokens and every leading index l of the weights: x is [tokens, lead, k], out
// [tokens, lead, n], contiguous. `precise` adds the product with what the quantization of x lost, quantized in turn:
// activations of 15 bits in place of 8, for twice the arithmetic.
void matmul(const Weights& w, int64_t tokens, const void* x, bool x_bf16, void* out, bool out_bf16, bool precise);

}  // namespace ktx
