// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "layout.h"

namespace ktx {

// Interleaves up to 16 rows of `blocks` ggml blocks into the panel `out` of panel_bytes(type, blocks) bytes (layout.h).
// Row r begins at `rows + r * row_stride`; rows from `n_rows` on become zero.
void pack_panel(Type type, const uint8_t* rows, int64_t row_stride, int n_rows, int64_t blocks, uint8_t* out);

}  // namespace ktx
