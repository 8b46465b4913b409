// SPDX-License-Identifier: Apache-2.0
#include "rms_norm.h"

#include <cmath>
#include <vector>

#include "arrays.h"
#include "thread_pool.h"

namespace ktx {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kRowsPerTask = 16;  // a few microseconds of work

float sum_of_squares(const float* x, int64_t d) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  for (int64_t j = 0; i + j < d; ++j) lanes[j] += x[i + j] * x[i + j];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

}  // namespace

void rms_norm(int64_t rows, int64_t d, const void* x, bool x_bf16, const float* weight, float eps, void* out,
              bool out_bf16) {
  const InputRows in{x, x_bf16, d};
  const OutputRows result{out, out_bf16, d};
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    std::vector<float> buffer(static_cast<size_t>(2 * d));
    float* scaled = buffer.data() + d;
    for (int64_t t = task * kRowsPerTask; t < rows && t < (task + 1) * kRowsPerTask; ++t) {
      const float* row = in.row(t, d, buffer.data());
      const float factor = 1.0f / std::sqrt(sum_of_squares(row, d) / static_cast<float>(d) + eps);
      for (int64_t i = 0; i < d; ++i) scaled[i] = row[i] * factor * weight[i];
      result.write(t, 0, scaled, d);
    }
  });
}

}  // namespace ktx
