// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ktx {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs;
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const Choice choices[] = {{&kAvx512Kernels, avx512}, {&kAvx2Kernels, avx2}, {&kPortableKernels, true}};
#else
  const Choice choices[] = {{&kPortableKernels, true}};
#endif
  const char* wanted = std::getenv("KTX_ISA");
  std::string names;
  for (const Choice& choice : choices) {
    if (wanted == nullptr || *wanted == '\0') {
      if (choice.runs) return *choice.kernels;
      continue;
    }
    if (std::string(wanted) != choice.kernels->name) {
      names += std::string(names.empty() ? "" : ", ") + choice.kernels->name;
      continue;
    }
    if (choice.runs) return *choice.kernels;
    throw std::runtime_error("KTX_ISA=" + std::string(wanted) + ": this CPU does not have these instructions");
  }
  throw std::runtime_error("KTX_ISA=" + std::string(wanted ? wanted : "") + " is not one of " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* isa_name() { return kernels().name; }

}  // namespace ktx
