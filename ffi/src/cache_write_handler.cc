// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "cache_write.h"
#include "checks.h"
#include "handlers.h"

namespace ktx {
namespace {

xla::ffi::Error run(AnyBuffer cache, AnyBuffer rows, AnyBuffer slots, AnyResult out) {
  return guarded("ktx_cache_write", [&] {
    check_rank(cache, "cache", 3);
    check_rank(rows, "rows", 2);
    check_rank(slots, "slots", 1);
    check_type(slots, "slots", xla::ffi::S32);
    const bool cache_bf16 = cache.element_type() != xla::ffi::F32;
    if (cache_bf16 && cache.element_type() != xla::ffi::U16) check_type(cache, "cache", xla::ffi::BF16);
    const bool rows_bf16 = check_float(rows, "rows");
    check_type(*out, "the result", cache.element_type());
    check_rank(*out, "the result", 3);
    for (size_t axis = 0; axis < 3; ++axis) check_dim(*out, "the result", axis, dim(cache, axis), "as the cache");
    check_dim(rows, "rows", 1, dim(cache, 2), "the width of cache " + describe(cache));
    check_dim(slots, "slots", 0, dim(rows, 0), "the rows of rows " + describe(rows));
    const int32_t* slot = slots.typed_data<int32_t>();
    for (int64_t t = 0; t < dim(rows, 0); ++t) {
      if (slot[t] >= dim(cache, 0) * dim(cache, 1)) {
        fail("slot " + std::to_string(slot[t]) + " of row " + std::to_string(t) + " is beyond cache " +
             describe(cache));
      }
    }
    // XLA aliases the two, having copied the cache if it was not donated.
    if (out->untyped_data() != cache.untyped_data()) {
      std::memcpy(out->untyped_data(), cache.untyped_data(), cache.size_bytes());
    }
    cache_write(out->untyped_data(), cache_bf16, rows.untyped_data(), rows_bf16, slot, dim(rows, 0), dim(rows, 1));
  });
}

}  // namespace
}  // namespace ktx

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ktx_cache_write, ktx::run,
    xla::ffi::Ffi::Bind().Arg<ktx::AnyBuffer>().Arg<ktx::AnyBuffer>().Arg<ktx::AnyBuffer>().Ret<ktx::AnyBuffer>());
