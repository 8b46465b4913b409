// SPDX-License-Identifier: Apache-2.0
// Included after a simd_*.h.
#pragma once

namespace ktx {
namespace {

// e^x within 2 units in the last place, for x in [-87, 88]; beyond, the nearer end's value.
KTX_INLINE F32 exp_f(F32 x) {
  x = min_f(max_f(x, set_f(-87.0f)), set_f(88.0f));
  const F32 n = round_f(mul_f(x, set_f(1.44269504088896341f)));
  F32 r = fma_f(n, set_f(-0.693359375f), x);  // ln 2 in two parts
  r = fma_f(n, set_f(2.12194440e-4f), r);
  F32 p = set_f(1.0f / 5040.0f);  // Taylor on |r| <= ln 2 / 2
  p = fma_f(p, r, set_f(1.0f / 720.0f));
  p = fma_f(p, r, set_f(1.0f / 120.0f));
  p = fma_f(p, r, set_f(1.0f / 24.0f));
  p = fma_f(p, r, set_f(1.0f / 6.0f));
  p = fma_f(p, r, set_f(0.5f));
  p = fma_f(p, r, set_f(1.0f));
  p = fma_f(p, r, set_f(1.0f));
  return scale2_f(p, n);
}

}  // namespace
}  // namespace ktx
