// SPDX-License-Identifier: Apache-2.0
// What every handler asks of its operands. A failed check throws; `guarded` turns it into an FFI error.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "weights.h"
#include "xla/ffi/api/ffi.h"

namespace ktx {

using AnyBuffer = xla::ffi::AnyBuffer;
using AnyResult = xla::ffi::Result<xla::ffi::AnyBuffer>;

class InvalidArgument : public std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

std::string shape_text(const int64_t* dims, size_t rank);
std::string describe(const AnyBuffer& b);  // type[shape]
std::string describe(const Weights& w);

[[noreturn]] inline void fail(const std::string& message) { throw InvalidArgument(message); }

// The buffer as [d0, ..., d(rank-1)], or an error.
void check_rank(const AnyBuffer& b, const char* name, size_t rank);
void check_dim(const AnyBuffer& b, const char* name, size_t axis, int64_t expected, const std::string& why);
void check_type(const AnyBuffer& b, const char* name, xla::ffi::DataType type);
// float32 or bfloat16; true if the latter.
bool check_float(const AnyBuffer& b, const char* name);

inline int64_t dim(const AnyBuffer& b, size_t axis) { return b.dimensions()[axis]; }

// The weights behind a handle operand of one uint32.
std::shared_ptr<const Weights> check_weights(const AnyBuffer& handle, const char* name);

template <typename Body>
xla::ffi::Error guarded(const char* operation, Body body) {
  try {
    body();
    return xla::ffi::Error::Success();
  } catch (const InvalidArgument& e) {
    return xla::ffi::Error::InvalidArgument(std::string(operation) + ": " + e.what());
  } catch (const std::bad_alloc&) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, std::string(operation) + ": out of memory");
  } catch (const std::exception& e) {
    return xla::ffi::Error::Internal(std::string(operation) + ": " + e.what());
  }
}

}  // namespace ktx
