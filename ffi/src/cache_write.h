// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ktx {

// Writes row t of `rows` [tokens, width] to row slots[t] of `cache` [cache_rows, width], in order of t; a negative slot
// is skipped. Slots must be below cache_rows. Types: float32 or bfloat16 each.
void cache_write(void* cache, bool cache_bf16, const void* rows, bool rows_bf16, const int32_t* slots, int64_t tokens,
                 int64_t width);

}  // namespace ktx
