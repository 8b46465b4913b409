// SPDX-License-Identifier: Apache-2.0
#include "simd_avx512.h"

#include "isa.h"
#include "kernel_table.h"

namespace ktx {
const Kernels kAvx512Kernels = make_kernels();
}  // namespace ktx
