// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most, measured: the kernels are judged by their share of it.
#pragma once

#include <cstddef>

namespace ktx {

// Bytes a second that all threads together read from memory, over `bytes` (to be larger than the caches).
double measure_read_bandwidth(size_t bytes);

// Products of int8 a second on all threads, from registers; 0 where the instruction set in use has no such instruction.
double measure_int8_peak();

// Products of bfloat16 a second on all threads, from registers; 0 likewise.
double measure_bf16_peak();

}  // namespace ktx
