// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

namespace ktx {
namespace {

const char* type_name(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::F32:
      return "f32";
    case xla::ffi::BF16:
      return "bf16";
    case xla::ffi::F16:
      return "f16";
    case xla::ffi::F64:
      return "f64";
    case xla::ffi::U8:
      return "u8";
    case xla::ffi::U16:
      return "u16";
    case xla::ffi::U32:
      return "u32";
    case xla::ffi::S32:
      return "s32";
    case xla::ffi::S64:
      return "s64";
    default:
      return "another type";
  }
}

}  // namespace

std::string shape_text(const int64_t* dims, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

std::string describe(const AnyBuffer& b) {
  const auto dims = b.dimensions();
  return type_name(b.element_type()) + shape_text(dims.begin(), dims.size());
}

std::string describe(const Weights& w) { return w.type->name + shape_text(w.shape.data(), w.shape.size()); }

void check_rank(const AnyBuffer& b, const char* name, size_t rank) {
  if (b.dimensions().size() != rank) {
    fail(std::string(name) + " must have rank " + std::to_string(rank) + ", but is " + describe(b));
  }
}

void check_dim(const AnyBuffer& b, const char* name, size_t axis, int64_t expected, const std::string& why) {
  if (dim(b, axis) != expected) {
    fail("axis " + std::to_string(axis) + " of " + name + " " + describe(b) + " must be " + std::to_string(expected) +
         ", " + why);
  }
}

void check_type(const AnyBuffer& b, const char* name, xla::ffi::DataType type) {
  if (b.element_type() != type) {
    fail(std::string(name) + " must be " + type_name(type) + ", but is " + describe(b));
  }
}

bool check_float(const AnyBuffer& b, const char* name) {
  if (b.element_type() == xla::ffi::BF16) return true;
  if (b.element_type() == xla::ffi::F32) return false;
  fail(std::string(name) + " must be f32 or bf16, but is " + describe(b));
}

std::shared_ptr<const Weights> check_weights(const AnyBuffer& handle, const char* name) {
  check_type(handle, name, xla::ffi::U32);
  if (handle.element_count() != 1) {
    fail(std::string(name) + " must be one weight handle, but is " + describe(handle));
  }
  const uint32_t value = *handle.typed_data<uint32_t>();
  std::shared_ptr<const Weights> weights = find_weights(value);
  if (!weights) fail(std::string(name) + ": no weights have the handle " + std::to_string(value) + " (freed?)");
  return weights;
}

}  // namespace ktx
