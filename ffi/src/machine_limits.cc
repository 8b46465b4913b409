// SPDX-License-Identifier: Apache-2.0
#include "machine_limits.h"

#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>

#include "isa.h"
#include "memory.h"
#include "thread_pool.h"

namespace ktx {
namespace {

template <typename Function>
double seconds(Function f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

constexpr int64_t kRounds = 200000;
constexpr int64_t kChains = 16;  // independent sums, so that latency does not count

#if defined(__x86_64__)
#define KTX_REPEAT_16(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15)

void int8_products() {
  int64_t n = kRounds;
#define KTX_PRODUCT(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
  asm volatile("1:\n" KTX_REPEAT_16(KTX_PRODUCT) "dec %0\n jnz 1b\n vzeroupper"
               : "+r"(n)
               :
               : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                 "xmm12", "xmm13", "xmm14", "xmm15", "cc");
#undef KTX_PRODUCT
}

void bf16_products() {
  int64_t n = kRounds;
#define KTX_ZERO(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n"
#define KTX_PRODUCT(i) "vdpbf16ps %%zmm16, %%zmm16, %%zmm" #i "\n"
  asm volatile(KTX_REPEAT_16(KTX_ZERO) "vpxorq %%zmm16, %%zmm16, %%zmm16\n 1:\n" KTX_REPEAT_16(
                   KTX_PRODUCT) "dec %0\n jnz 1b\n vzeroupper"
               : "+r"(n)
               :
               : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                 "xmm12", "xmm13", "xmm14", "xmm15", "cc");
#undef KTX_PRODUCT
#undef KTX_ZERO
}

double product_rate(void (*products)(), double per_instruction) {
  const int64_t tasks = 4 * threads();
  const double time = seconds([&] { parallel_for(tasks, [&](int64_t) { products(); }); });
  return static_cast<double>(tasks * kRounds * kChains) * per_instruction / time;
}
#endif

}  // namespace

double measure_read_bandwidth(size_t bytes) {
  static Buffer buffer;
  if (buffer.size() != bytes) {
    buffer = Buffer(bytes);
    std::memset(buffer.data(), 1, bytes);
  }
  constexpr size_t kPiece = 1 << 20;
  const int64_t pieces = static_cast<int64_t>(bytes / kPiece);
  const double time = seconds([&] {
    parallel_for(pieces, [&](int64_t i) {
      const uint64_t* p = reinterpret_cast<const uint64_t*>(buffer.data() + static_cast<size_t>(i) * kPiece);
      uint64_t sum = 0;
      for (size_t j = 0; j < kPiece / 8; j += 8) {
        __builtin_prefetch(p + j + 512, 0, 0);  // as the kernels do: plain loads alone get less
        for (size_t c = 0; c < 8; ++c) sum ^= p[j + c];
      }
      asm volatile("" : : "r"(sum));  // the sum is wanted
    });
  });
  return static_cast<double>(pieces) * kPiece / time;
}

double measure_int8_peak() {
#if defined(__x86_64__)
  if (std::string(isa_name()) == "avx512") return product_rate(int8_products, 64.0);
#endif
  return 0.0;
}

double measure_bf16_peak() {
#if defined(__x86_64__)
  if (std::string(isa_name()) == "avx512" && __builtin_cpu_supports("avx512bf16")) return product_rate(bf16_products, 32.0);
#endif
  return 0.0;
}

}  // namespace ktx
