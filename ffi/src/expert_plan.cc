// SPDX-License-Identifier: Apache-2.0
#include "expert_plan.h"

namespace ktx {

ExpertPlan::ExpertPlan(const Kernels& kernels, const int32_t* ids, const float* weights, int64_t tokens, int64_t top_k,
                       int64_t experts, int each) {
  std::vector<int64_t> start(static_cast<size_t>(experts) + 1, 0);
  const auto valid = [experts](int32_t id) { return id >= 0 && id < experts; };
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    if (valid(ids[i])) ++start[static_cast<size_t>(ids[i]) + 1];
  }
  for (size_t e = 0; e < static_cast<size_t>(experts); ++e) {
    const int64_t rows = start[e + 1];
    start[e + 1] += start[e];
    if (rows == 0) continue;
    const int64_t first = static_cast<int64_t>(tiles.size());
    padded_rows = append_tiles(kernels, start[e], rows, padded_rows, &tiles, each);
    groups.push_back({static_cast<int64_t>(e), first, static_cast<int64_t>(tiles.size())});
  }
  token.resize(static_cast<size_t>(start.back()));
  weight.resize(static_cast<size_t>(start.back()));
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    if (!valid(ids[i])) continue;
    const size_t row = static_cast<size_t>(start[static_cast<size_t>(ids[i])]++);
    token[row] = i / top_k;
    weight[row] = weights[i];
  }
}

}  // namespace ktx
