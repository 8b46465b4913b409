// SPDX-License-Identifier: Apache-2.0
// Which kernels this machine runs.
#pragma once

#include "kernels.h"

namespace ktx {

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
extern const AttentionKernels kAttentionInt16;
#endif
extern const Kernels kPortableKernels;

// The best kernels the CPU has, or those named by the environment's KTX_ISA (avx512, avx2, portable).
// Throws std::runtime_error if KTX_ISA names something unknown, or something the CPU does not have.
const Kernels& kernels();

// The attention kernels for a bfloat16 or a float32 cache.
const AttentionKernels& attention_kernels(bool cache_bf16);

// The name of the choice.
const char* isa_name();

}  // namespace ktx
