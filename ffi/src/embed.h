// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "weights.h"

namespace ktx {

// Row ids[i] of the weights [v, d], which keep their raw blocks, to row i of `out` [n, d]. Ids must lie in [0, v).
void embed(const Weights& w, const int32_t* ids, int64_t n, void* out, bool out_bf16);

}  // namespace ktx
