// SPDX-License-Identifier: Apache-2.0
#include "checks.h"
#include "embed.h"
#include "handlers.h"

namespace ktx {
namespace {

xla::ffi::Error run(AnyBuffer ids, AnyBuffer handle, AnyResult out) {
  return guarded("ktx_embed", [&] {
    const auto w = check_weights(handle, "weights");
    if (w->shape.size() != 2 || w->repacked) {
      fail("weights must be [V, D] with repack=False, but are " + describe(*w) + (w->repacked ? ", repacked" : ""));
    }
    check_rank(ids, "ids", 1);
    check_type(ids, "ids", xla::ffi::S32);
    const bool out_bf16 = check_float(*out, "the result");
    check_rank(*out, "the result", 2);
    check_dim(*out, "the result", 0, dim(ids, 0), "the number of ids");
    check_dim(*out, "the result", 1, w->k, "for weights " + describe(*w));
    const int32_t* id = ids.typed_data<int32_t>();
    for (int64_t i = 0; i < dim(ids, 0); ++i) {
      if (id[i] < 0 || id[i] >= w->n) {
        fail("id " + std::to_string(id[i]) + " at " + std::to_string(i) + " is outside weights " + describe(*w));
      }
    }
    embed(*w, id, dim(ids, 0), out->untyped_data(), out_bf16);
  });
}

}  // namespace
}  // namespace ktx

XLA_FFI_DEFINE_HANDLER_SYMBOL(ktx_embed, ktx::run,
                              xla::ffi::Ffi::Bind().Arg<ktx::AnyBuffer>().Arg<ktx::AnyBuffer>().Ret<ktx::AnyBuffer>());
