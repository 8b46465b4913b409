// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ktx {
namespace {

struct Choice {
  const char* name;
  bool runs;
  const Kernels* kernels;
  const AttentionKernels* bf16;  // for bfloat16 caches
};

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const Choice choices[] = {
      {"avx512", avx512, &kAvx512Kernels, &kAttentionInt16},
      {"avx2", avx2, &kAvx2Kernels, kAvx2Kernels.attention},
      {"portable", true, &kPortableKernels, kPortableKernels.attention},
  };
#else
  const Choice choices[] = {{"portable", true, &kPortableKernels, kPortableKernels.attention}};
#endif
  const char* variable = std::getenv("KTX_ISA");
  const std::string wanted = variable ? variable : "";
  std::string names;
  for (const Choice& choice : choices) {
    if (wanted.empty() && choice.runs) return choice;
    if (wanted == choice.name) {
      if (choice.runs) return choice;
      throw std::runtime_error("KTX_ISA=" + wanted + ": this CPU does not have these instructions");
    }
    names += (names.empty() ? "" : ", ") + std::string(choice.name);
  }
  throw std::runtime_error("KTX_ISA=" + wanted + " is not one of " + names);
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }

const AttentionKernels& attention_kernels(bool cache_bf16) {
  return cache_bf16 ? *chosen().bf16 : *chosen().kernels->attention;
}

const char* isa_name() { return chosen().name; }

}  // namespace ktx
