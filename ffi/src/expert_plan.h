// SPDX-License-Identifier: Apache-2.0
// Tokens grouped by the experts they chose.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"

namespace ktx {

// Rows are the (token, choice) pairs of valid experts, sorted by expert, then by token and choice.
struct ExpertPlan {
  struct Group {
    int64_t expert;
    int64_t tile_first;
    int64_t tile_last;
  };
  std::vector<int64_t> token;  // of each row
  std::vector<float> weight;   // of each row
  std::vector<Tile> tiles;     // of each group in turn, `each` rows of a kernel for a row
  std::vector<Group> groups;   // experts with at least one row, ascending
  int64_t padded_rows = 0;

  ExpertPlan(const Kernels& kernels, const int32_t* ids, const float* weights, int64_t tokens, int64_t top_k,
             int64_t experts, int each);
};

}  // namespace ktx
