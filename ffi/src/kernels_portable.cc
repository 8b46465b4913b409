// SPDX-License-Identifier: Apache-2.0
#include "simd_portable.h"

#include "isa.h"
#include "kernel_table.h"

namespace ktx {
const Kernels kPortableKernels = make_kernels();
}  // namespace ktx
