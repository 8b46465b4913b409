// SPDX-License-Identifier: Apache-2.0
// C++ tests, to be run under sanitizers: every operation on buffers of exactly the size it may touch.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "attention.h"
#include "cache_write.h"
#include "dequantize.h"
#include "embed.h"
#include "experts.h"
#include "half.h"
#include "isa.h"
#include "matmul.h"
#include "thread_pool.h"

namespace {

std::mt19937 g_random(1);

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

constexpr ktx::Type kTypes[] = {ktx::Type::kF32,  ktx::Type::kF16,    ktx::Type::kBF16,  ktx::Type::kQ4_0,
                                ktx::Type::kQ4_1, ktx::Type::kQ5_0,   ktx::Type::kQ5_1,  ktx::Type::kQ8_0,
                                ktx::Type::kQ2_K, ktx::Type::kQ3_K,   ktx::Type::kQ4_K,  ktx::Type::kQ5_K,
                                ktx::Type::kQ6_K, ktx::Type::kIQ4_NL, ktx::Type::kIQ4_XS};

std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> distribution;
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = distribution(g_random);
  return out;
}

// Random blocks; exponents of 16-bit floats are kept small by clearing their top bits wherever they may lie.
std::vector<uint8_t> random_blocks(const ktx::TypeInfo& type, int64_t rows, int64_t k) {
  std::vector<uint8_t> out(static_cast<size_t>(rows * k / type.block_size * type.type_size));
  for (uint8_t& b : out) b = static_cast<uint8_t>(g_random() & 0xff);
  if (type.block_size == 1) {
    const std::vector<float> values = normal(rows * k);
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t bits = ktx::bits_from_float(values[i]);
      if (type.type == ktx::Type::kF32) ktx::store_u32(&out[4 * i], bits);
      if (type.type == ktx::Type::kBF16) ktx::store_u16(&out[2 * i], static_cast<uint16_t>(bits >> 16));
      if (type.type == ktx::Type::kF16) ktx::store_u16(&out[2 * i], static_cast<uint16_t>(0x2c00 | (bits & 0x83ff)));
    }
    return out;
  }
  for (size_t i = 0; i < out.size(); i += static_cast<size_t>(type.type_size)) {
    const bool minima = type.aux == ktx::Aux::kSums || type.aux == ktx::Aux::kScaledSums;
    size_t at[] = {0, 2};
    if (type.type == ktx::Type::kQ6_K) at[0] = 208;
    if (type.type == ktx::Type::kQ3_K) at[0] = 108;
    if (type.type == ktx::Type::kQ2_K) at[0] = 80, at[1] = 82;
    ktx::store_u16(&out[i + at[0]], 0x2000);
    if (minima || type.type == ktx::Type::kQ2_K) ktx::store_u16(&out[i + at[1]], 0x1c00);
  }
  return out;
}

struct Loaded {
  std::vector<uint8_t> raw;
  uint32_t handle;
  std::shared_ptr<const ktx::Weights> weights;
  std::vector<float> values;

  Loaded(ktx::Type number, int64_t lead, int64_t n, int64_t k, bool repack) {
    const ktx::TypeInfo& type = ktx::type_info(number);
    raw = random_blocks(type, lead * n, k);
    const int64_t row = k / type.block_size * type.type_size;
    ktx::BlocksView view{raw.data(), {}, row, nullptr};
    for (int64_t i = 0; i < lead; ++i) view.lead.push_back(raw.data() + i * n * row);
    handle = ktx::register_weights(type, {lead, n, k}, view, repack);
    weights = ktx::find_weights(handle);
    values.resize(static_cast<size_t>(lead * n * k));
    for (int64_t i = 0; i < lead * n; ++i) {
      ktx::dequantize_row(number, raw.data() + i * row, k / type.block_size, &values[static_cast<size_t>(i * k)]);
    }
  }
  ~Loaded() { ktx::release_weights(handle); }
};

double relative_error(const std::vector<float>& a, const std::vector<double>& b) {
  double difference = 0.0;
  double norm = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / norm);
}

void test_matmul() {
  for (ktx::Type type : kTypes) {
    const int64_t block = ktx::type_info(type).block_size;
    for (int64_t tokens : {1, 3, 19}) {
      for (bool repack : {true, false}) {
        const int64_t lead = 2;
        const int64_t n = 37;
        const int64_t k = block == 1 ? 53 : 3 * block;
        const Loaded w(type, lead, n, k, repack);
        const std::vector<float> x = normal(tokens * lead * k);
        std::vector<float> y(static_cast<size_t>(tokens * lead * n));
        ktx::matmul(*w.weights, tokens, x.data(), false, y.data(), false, tokens == 3);
        std::vector<double> expected;
        for (int64_t t = 0; t < tokens * lead; ++t) {
          for (int64_t i = 0; i < n; ++i) {
            double sum = 0.0;
            for (int64_t j = 0; j < k; ++j) {
              sum += static_cast<double>(x[static_cast<size_t>(t * k + j)]) *
                     w.values[static_cast<size_t>((t % lead * n + i) * k + j)];
            }
            expected.push_back(sum);
          }
        }
        CHECK(relative_error(y, expected) < 0.02);
      }
    }
  }
}

void test_experts() {
  const int64_t e = 3;
  const int64_t f = 320;
  const int64_t d = 256;
  const Loaded gate(ktx::Type::kQ4_K, e, f, d, true);
  const Loaded up(ktx::Type::kQ6_K, e, f, d, false);
  const Loaded down(ktx::Type::kQ5_0, e, d, f, true);
  for (int64_t tokens : {1, 70}) {
    const std::vector<float> x = normal(tokens * d);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < 2 * tokens; ++i) ids.push_back(static_cast<int32_t>(g_random() % 5) - 1);
    const std::vector<float> weights = normal(2 * tokens);
    for (bool precise : {false, true}) {
      std::vector<float> y(static_cast<size_t>(tokens * d), NAN);
      ktx::experts({*gate.weights, *up.weights, *down.weights, 0, tokens, 2, ids.data(), weights.data(), x.data(),
                    false, y.data(), false, precise});
      for (float value : y) CHECK(std::isfinite(value));
      std::vector<float> first(static_cast<size_t>(d));
      ktx::experts({*gate.weights, *up.weights, *down.weights, 0, 1, 2, ids.data(), weights.data(), x.data(), false,
                    first.data(), false, precise});
      for (size_t i = 0; i < first.size(); ++i) CHECK(first[i] == y[i]);
    }
  }
}

// Hidden values inside a wider `down` give what the narrow one gives.
void test_experts_placed() {
  const int64_t f = 96;
  const int64_t d = 256;
  const int64_t offset = 176;
  const Loaded gate(ktx::Type::kQ4_K, 2, f, d, true);
  const Loaded up(ktx::Type::kQ4_K, 2, f, d, true);
  const Loaded down(ktx::Type::kQ6_K, 2, d, 512, true);
  for (int64_t tokens : {1, 40}) {
    const std::vector<float> x = normal(tokens * d);
    const std::vector<int32_t> ids(static_cast<size_t>(tokens), 1);
    const std::vector<float> weights(static_cast<size_t>(tokens), 1.0f);
    std::vector<float> y(static_cast<size_t>(tokens * d), NAN);
    ktx::experts({*gate.weights, *up.weights, *down.weights, offset, tokens, 1, ids.data(), weights.data(), x.data(),
                  false, y.data(), false, false});
    const auto dot = [&](const Loaded& w, int64_t row) {
      double sum = 0.0;
      for (int64_t j = 0; j < d; ++j) {
        const size_t at = static_cast<size_t>((f + row) * d + j);
        sum += static_cast<double>(w.values[at]) * static_cast<double>(x[static_cast<size_t>(j)]);
      }
      return sum;
    };
    std::vector<float> first(y.begin(), y.begin() + d);
    std::vector<double> expected(static_cast<size_t>(d), 0.0);
    for (int64_t h = 0; h < f; ++h) {
      const double g = dot(gate, h);
      const double hidden = g / (1.0 + std::exp(-g)) * dot(up, h);
      for (int64_t i = 0; i < d; ++i) {
        expected[static_cast<size_t>(i)] += hidden * down.values[static_cast<size_t>((d + i) * 512 + offset + h)];
      }
    }
    CHECK(relative_error(first, expected) < 0.03);
  }
}

void test_attention() {
  for (bool bf16 : {true, false}) {
    for (int64_t latent : {8, 64, 96}) {
      const int64_t tokens = 7;
      const int64_t heads = 18;
      const int64_t rope = 10;
      const int64_t page = 7;
      const int64_t pages = 170;
      const int64_t width = latent + rope;
      std::vector<float> cache = normal(pages * page * width);
      std::vector<uint16_t> bits;
      for (float value : cache) bits.push_back(ktx::float_to_bf16(value));
      std::vector<int32_t> table;
      for (int64_t i = 0; i < pages; ++i) table.push_back(static_cast<int32_t>((i * 7) % pages));
      const std::vector<int32_t> sequence = {0, 0, -1, 0, 0, 0, -1};
      const std::vector<int32_t> positions = {0, 1, 5, 63, 64, static_cast<int32_t>(pages * page - 1), -7};
      const std::vector<float> q = normal(tokens * heads * latent);
      const std::vector<float> r = normal(tokens * heads * rope);
      std::vector<float> out(q.size(), NAN);
      const void* data = bf16 ? static_cast<const void*>(bits.data()) : cache.data();
      ktx::mla_attention({tokens,
                          heads,
                          {latent, rope},
                          q.data(),
                          r.data(),
                          false,
                          data,
                          bf16,
                          pages,
                          page,
                          table.data(),
                          1,
                          pages,
                          sequence.data(),
                          positions.data(),
                          0.2f,
                          out.data()});
      for (float value : out) CHECK(std::isfinite(value));
      // One row: its latent, the same for all heads; of a bfloat16 cache to the levels of its largest value.
      float largest = 0.0f;
      for (int64_t i = 0; i < latent; ++i) largest = std::max(largest, std::fabs(cache[static_cast<size_t>(i)]));
      for (int64_t i = 0; i < heads * latent; ++i) {
        const float expected =
            bf16 ? ktx::bf16_to_float(bits[static_cast<size_t>(i % latent)]) : cache[static_cast<size_t>(i % latent)];
        const float tolerance = bf16 ? largest / 2047.0f : 1e-6f * std::fabs(expected);
        CHECK(std::fabs(out[static_cast<size_t>(i)] - expected) <= tolerance);
        CHECK(out[static_cast<size_t>(2 * heads * latent + i)] == 0.0f);
      }
    }
  }
}

void test_embed_and_cache() {
  const Loaded w(ktx::Type::kQ6_K, 1, 5, 512, false);
  const std::vector<int32_t> ids = {4, 0, 4};
  std::vector<float> rows(3 * 512);
  ktx::embed(*w.weights, ids.data(), 3, rows.data(), false);
  for (size_t i = 0; i < 512; ++i) CHECK(rows[i] == w.values[4 * 512 + i]);
  std::vector<uint16_t> cache(4 * 8, 7);
  const std::vector<float> values(2 * 8, 1.0f);
  const std::vector<int32_t> slots = {3, -5};
  ktx::cache_write(cache.data(), true, values.data(), false, slots.data(), 2, 8);
  CHECK(cache[0] == 7 && cache[3 * 8] == 0x3f80);
}

void test_pool() {
  for (int n : {1, 2, 7}) {
    ktx::set_threads(n);
    std::atomic<int64_t> sum{0};
    std::vector<std::thread> callers;
    for (int c = 0; c < 5; ++c) {
      callers.emplace_back([&sum] {
        for (int i = 0; i < 50; ++i) {
          ktx::parallel_for(13, [&sum](int64_t j) {
            ktx::parallel_for(3, [&sum, j](int64_t) { sum.fetch_add(j, std::memory_order_relaxed); });
          });
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK(sum.load() == 5 * 50 * 3 * 78);
  }
}

}  // namespace

int main() {
  std::printf("%s\n", ktx::isa_name());
  test_pool();
  ktx::set_threads(3);
  test_matmul();
  test_experts();
  test_experts_placed();
  test_attention();
  test_embed_and_cache();
  return 0;
}
