// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "types.h"

namespace ktx {

// One row of `blocks` consecutive ggml blocks to float32, bit-equal to gguf-py's dequantize.
void dequantize_row(Type type, const uint8_t* row, int64_t blocks, float* out);

}  // namespace ktx
