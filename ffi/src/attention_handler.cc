// SPDX-License-Identifier: Apache-2.0
#include "attention.h"
#include "checks.h"
#include "handlers.h"

namespace ktx {
namespace {

// The cache holds float32, or the bits of bfloat16 as uint16; true if the latter.
bool check_cache(const AnyBuffer& cache) {
  check_rank(cache, "cache", 3);
  if (cache.element_type() == xla::ffi::F32) return false;
  if (cache.element_type() == xla::ffi::U16 || cache.element_type() == xla::ffi::BF16) return true;
  fail("cache must be f32, bf16, or u16 with the bits of bf16, but is " + describe(cache));
}

void check_tokens(const AnyBuffer& b, const char* name, int64_t tokens) {
  check_rank(b, name, 1);
  check_type(b, name, xla::ffi::S32);
  check_dim(b, name, 0, tokens, "the tokens of q_latent");
}

xla::ffi::Error run(AnyBuffer q_latent, AnyBuffer q_rope, AnyBuffer cache, AnyBuffer block_tables, AnyBuffer sequence,
                    AnyBuffer positions, AnyResult out, float scale) {
  return guarded("ktx_mla_attention", [&] {
    check_rank(q_latent, "q_latent", 3);
    check_rank(q_rope, "q_rope", 3);
    check_rank(*out, "the result", 3);
    check_rank(block_tables, "block_tables", 2);
    check_type(block_tables, "block_tables", xla::ffi::S32);
    const bool q_bf16 = check_float(q_latent, "q_latent");
    const bool cache_bf16 = check_cache(cache);
    check_type(q_rope, "q_rope", q_latent.element_type());
    check_type(*out, "the result", q_latent.element_type());
    check_dim(q_rope, "q_rope", 0, dim(q_latent, 0), "as q_latent " + describe(q_latent));
    check_dim(q_rope, "q_rope", 1, dim(q_latent, 1), "as q_latent " + describe(q_latent));
    const LatentShape shape{dim(q_latent, 2), dim(q_rope, 2)};
    check_dim(cache, "cache", 2, shape.latent + shape.rope, "the widths of q_latent and q_rope");
    for (size_t axis = 0; axis < 3; ++axis) check_dim(*out, "the result", axis, dim(q_latent, axis), "as q_latent");
    check_tokens(sequence, "sequence", dim(q_latent, 0));
    check_tokens(positions, "positions", dim(q_latent, 0));
    try {
      mla_attention({dim(q_latent, 0), dim(q_latent, 1), shape, q_latent.untyped_data(), q_rope.untyped_data(), q_bf16,
                     cache.untyped_data(), cache_bf16, dim(cache, 0), dim(cache, 1), block_tables.typed_data<int32_t>(),
                     dim(block_tables, 0), dim(block_tables, 1), sequence.typed_data<int32_t>(),
                     positions.typed_data<int32_t>(), scale, out->untyped_data()});
    } catch (const std::invalid_argument& e) {
      fail(e.what());
    }
  });
}

}  // namespace
}  // namespace ktx

XLA_FFI_DEFINE_HANDLER_SYMBOL(ktx_mla_attention, ktx::run,
                              xla::ffi::Ffi::Bind()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Ret<ktx::AnyBuffer>()
                                  .Attr<float>("scale"));
