// SPDX-License-Identifier: Apache-2.0
#include "checks.h"
#include "experts.h"
#include "handlers.h"
#include "layout.h"

namespace ktx {
namespace {

// Weights [E, F, D], or [F, D] for E = 1; `down` may be wider than F where hidden values are placed.
void check_expert_weights(const Weights& gate, const Weights& up, const Weights& down, bool placed) {
  const std::string all = ": gate " + describe(gate) + ", up " + describe(up) + ", down " + describe(down);
  const size_t rank = gate.shape.size();
  const bool fit = (rank == 2 || rank == 3) && up.shape == gate.shape && down.shape.size() == rank &&
                   down.lead == gate.lead && down.n == gate.k && (placed ? down.k >= gate.n : down.k == gate.n);
  if (fit) return;
  fail(std::string("weights must be gate and up [E, F, D], down [E, D, ") + (placed ? "K >= F]" : "F]") + all);
}

// Where in K of `down` the hidden values lie.
int64_t check_offset(const AnyBuffer& b, const Weights& gate, const Weights& down) {
  check_type(b, "offset", xla::ffi::S32);
  if (b.element_count() != 1) fail("offset must be one integer, but is " + describe(b));
  const int64_t offset = *b.typed_data<int32_t>();
  if (offset < 0 || offset % kPanelRows != 0 || offset + gate.n > down.k) {
    fail("offset " + std::to_string(offset) + " must be a multiple of 16 that leaves room for the hidden values of " +
         "gate " + describe(gate) + " in down " + describe(down));
  }
  return offset;
}

xla::ffi::Error run(AnyBuffer x, AnyBuffer ids, AnyBuffer weights, AnyBuffer gate, AnyBuffer up, AnyBuffer down,
                    AnyBuffer offset, AnyResult out, bool placed, bool precise) {
  return guarded("ktx_experts", [&] {
    const auto g = check_weights(gate, "gate");
    const auto u = check_weights(up, "up");
    const auto d = check_weights(down, "down");
    check_expert_weights(*g, *u, *d, placed);
    const int64_t at = check_offset(offset, *g, *d);
    const bool x_bf16 = check_float(x, "x");
    const bool out_bf16 = check_float(*out, "the result");
    check_rank(x, "x", 2);
    check_rank(ids, "ids", 2);
    check_rank(weights, "weights", 2);
    check_rank(*out, "the result", 2);
    check_type(ids, "ids", xla::ffi::S32);
    check_type(weights, "weights", xla::ffi::F32);
    check_dim(x, "x", 1, g->k, "for gate " + describe(*g));
    check_dim(ids, "ids", 0, dim(x, 0), "the rows of x");
    check_dim(weights, "weights", 0, dim(x, 0), "the rows of x");
    check_dim(weights, "weights", 1, dim(ids, 1), "as ids " + describe(ids));
    check_dim(*out, "the result", 0, dim(x, 0), "the rows of x");
    check_dim(*out, "the result", 1, g->k, "for gate " + describe(*g));
    experts({*g, *u, *d, at, dim(x, 0), dim(ids, 1), ids.typed_data<int32_t>(), weights.typed_data<float>(),
             x.untyped_data(), x_bf16, out->untyped_data(), out_bf16, precise});
  });
}

}  // namespace
}  // namespace ktx

XLA_FFI_DEFINE_HANDLER_SYMBOL(ktx_experts, ktx::run,
                              xla::ffi::Ffi::Bind()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Arg<ktx::AnyBuffer>()
                                  .Ret<ktx::AnyBuffer>()
                                  .Attr<bool>("placed")
                                  .Attr<bool>("precise"));
