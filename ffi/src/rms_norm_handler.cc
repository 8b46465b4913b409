// SPDX-License-Identifier: Apache-2.0
#include "checks.h"
#include "handlers.h"
#include "rms_norm.h"

namespace ktx {
namespace {

xla::ffi::Error run(AnyBuffer x, AnyBuffer weight, AnyResult out, float eps) {
  return guarded("ktx_rms_norm", [&] {
    const bool x_bf16 = check_float(x, "x");
    const bool out_bf16 = check_float(*out, "the result");
    check_rank(x, "x", 2);
    check_rank(*out, "the result", 2);
    check_rank(weight, "weight", 1);
    check_type(weight, "weight", xla::ffi::F32);
    check_dim(weight, "weight", 0, dim(x, 1), "the width of x " + describe(x));
    for (size_t axis = 0; axis < 2; ++axis) check_dim(*out, "the result", axis, dim(x, axis), "as x");
    rms_norm(dim(x, 0), dim(x, 1), x.untyped_data(), x_bf16, weight.typed_data<float>(), eps, out->untyped_data(),
             out_bf16);
  });
}

}  // namespace
}  // namespace ktx

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ktx_rms_norm, ktx::run,
    xla::ffi::Ffi::Bind().Arg<ktx::AnyBuffer>().Arg<ktx::AnyBuffer>().Ret<ktx::AnyBuffer>().Attr<float>("eps"));
