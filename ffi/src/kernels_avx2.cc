// SPDX-License-Identifier: Apache-2.0
#include "simd_avx2.h"

#include "isa.h"
#include "kernel_table.h"

namespace ktx {
const Kernels kAvx2Kernels = make_kernels();
}  // namespace ktx
