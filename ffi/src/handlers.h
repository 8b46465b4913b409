// SPDX-License-Identifier: Apache-2.0
// The XLA FFI handlers, by the names they are registered under.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* ktx_matmul(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ktx_experts(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ktx_mla_attention(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ktx_cache_write(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ktx_embed(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ktx_rms_norm(XLA_FFI_CallFrame* call_frame);
}
