// SPDX-License-Identifier: Apache-2.0
#include "checks.h"
#include "handlers.h"
#include "matmul.h"

namespace ktx {
namespace {

// x [T, K] with weights [N, K], or x [T, H, K] with weights [H, N, K].
xla::ffi::Error run(AnyBuffer x, AnyBuffer handle, AnyResult out, bool precise) {
  return guarded("ktx_matmul", [&] {
    const auto w = check_weights(handle, "weights");
    const size_t rank = w->shape.size();
    if (rank != 2 && rank != 3) fail("weights must be [N, K] or [H, N, K], but are " + describe(*w));
    const std::string with = "for weights " + describe(*w);
    const bool x_bf16 = check_float(x, "x");
    const bool out_bf16 = check_float(*out, "the result");
    check_rank(x, "x", rank);
    check_rank(*out, "the result", rank);
    check_dim(x, "x", rank - 1, w->k, with);
    check_dim(*out, "the result", rank - 1, w->n, with);
    check_dim(*out, "the result", 0, dim(x, 0), "the rows of x");
    if (rank == 3) {
      check_dim(x, "x", 1, w->lead, with);
      check_dim(*out, "the result", 1, w->lead, with);
    }
    matmul(*w, dim(x, 0), x.untyped_data(), x_bf16, out->untyped_data(), out_bf16, precise);
  });
}

}  // namespace
}  // namespace ktx

XLA_FFI_DEFINE_HANDLER_SYMBOL(ktx_matmul, ktx::run,
                              xla::ffi::Ffi::Bind()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Ret<ktx::AnyBuffer>()
                                  .Attr<bool>("precise"));
