// SPDX-License-Identifier: Apache-2.0
// The ggml weight types the kernels read, and the shape of their blocks.
#pragma once

#include <cstdint>

namespace ktx {

// Numbers are those of the GGUF format.
enum class Type : int32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kIQ4_XS = 23,
  kBF16 = 30,
};

// What a kernel wants to know of its activations besides the int8 values and their scales.
enum class Aux : int32_t {
  kNone,        // floating-point weights: activations stay float32
  kStart,       // int32 a 32: -offset * sum of the 32 values
  kStart16,     // int32 a 16: the same, of 16 values
  kSums,        // int16 a 32: sum of the 32 values (minima of K-quants)
  kSums16,      // int16 a 16
  kScaledSums,  // float a 32: scale * sum of the 32 values (minima of the _1 types)
};

struct TypeInfo {
  Type type;
  const char* name;
  int32_t block_size;  // elements
  int32_t type_size;   // bytes of a block in a file
  int32_t group;       // activations share a scale by this many; 0: not quantized
  Aux aux;
  int32_t offset;  // subtracted from the unsigned levels the kernels decode
};

// nullptr if the type is not one the kernels read.
inline const TypeInfo* type_info(int32_t number) {
  static constexpr TypeInfo kTypes[] = {
      {Type::kF32, "F32", 1, 4, 0, Aux::kNone, 0},
      {Type::kF16, "F16", 1, 2, 0, Aux::kNone, 0},
      {Type::kBF16, "BF16", 1, 2, 0, Aux::kNone, 0},
      {Type::kQ4_0, "Q4_0", 32, 18, 32, Aux::kStart, 8},
      {Type::kQ4_1, "Q4_1", 32, 20, 32, Aux::kScaledSums, 0},
      {Type::kQ5_0, "Q5_0", 32, 22, 32, Aux::kStart, 16},
      {Type::kQ5_1, "Q5_1", 32, 24, 32, Aux::kScaledSums, 0},
      {Type::kQ8_0, "Q8_0", 32, 34, 32, Aux::kStart, 128},
      {Type::kIQ4_NL, "IQ4_NL", 32, 18, 32, Aux::kStart, 128},
      {Type::kQ2_K, "Q2_K", 256, 84, 256, Aux::kSums16, 0},
      {Type::kQ3_K, "Q3_K", 256, 110, 256, Aux::kStart16, 4},
      {Type::kQ4_K, "Q4_K", 256, 144, 256, Aux::kSums, 0},
      {Type::kQ5_K, "Q5_K", 256, 176, 256, Aux::kSums, 0},
      {Type::kQ6_K, "Q6_K", 256, 210, 256, Aux::kStart16, 32},
      {Type::kIQ4_XS, "IQ4_XS", 256, 136, 256, Aux::kStart, 128},
  };
  for (const TypeInfo& info : kTypes) {
    if (static_cast<int32_t>(info.type) == number) return &info;
  }
  return nullptr;
}

inline const TypeInfo& type_info(Type type) { return *type_info(static_cast<int32_t>(type)); }

}  // namespace ktx
