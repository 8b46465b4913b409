// SPDX-License-Identifier: Apache-2.0
// The extension module behind the Python package.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "handlers.h"
#include "isa.h"
#include "machine_limits.h"
#include "thread_pool.h"
#include "weights.h"

namespace nb = nanobind;

namespace {

using Blocks = nb::ndarray<const uint8_t, nb::device::cpu>;

std::string shape_text(const Blocks& b) {
  std::string text = "[";
  for (size_t i = 0; i < b.ndim(); ++i) text += (i ? ", " : "") + std::to_string(b.shape(i));
  return text + "]";
}

void check_blocks(const Blocks& b, const ktx::TypeInfo& type) {
  const std::string expected = std::string(type.name) + " blocks must be uint8 [*lead, N, K / " +
                               std::to_string(type.block_size) + ", " + std::to_string(type.type_size) + "]";
  if (b.ndim() < 3 || static_cast<int64_t>(b.shape(b.ndim() - 1)) != type.type_size) {
    throw nb::value_error((expected + ", but are " + shape_text(b)).c_str());
  }
  const size_t rank = b.ndim();
  if (b.size() == 0) throw nb::value_error((expected + ", and not empty: " + shape_text(b)).c_str());
  const bool packed = b.stride(rank - 1) == 1 && (b.shape(rank - 2) == 1 || b.stride(rank - 2) == type.type_size);
  if (!packed) throw nb::value_error((expected + ", contiguous in the last two axes").c_str());
}

// The start of every leading index, in row-major order.
std::vector<const uint8_t*> leading_starts(const Blocks& b) {
  std::vector<const uint8_t*> starts = {b.data()};
  for (size_t axis = 0; axis + 3 < b.ndim(); ++axis) {
    std::vector<const uint8_t*> next;
    for (const uint8_t* start : starts) {
      for (size_t i = 0; i < b.shape(axis); ++i) next.push_back(start + static_cast<int64_t>(i) * b.stride(axis));
    }
    starts = std::move(next);
  }
  return starts;
}

// Keeps a Python object alive until the last user is done, on whatever thread that is.
std::shared_ptr<void> keep_alive(const nb::object& object) {
  return std::shared_ptr<void>(new nb::object(object), [](void* p) {
    nb::gil_scoped_acquire gil;
    delete static_cast<nb::object*>(p);
  });
}

uint32_t create_weights(const nb::object& array, int32_t number, bool repack) {
  const ktx::TypeInfo* type = ktx::type_info(number);
  if (type == nullptr) {
    throw nb::value_error(("the CPU kernels do not read ggml type " + std::to_string(number)).c_str());
  }
  const Blocks blocks = nb::cast<Blocks>(array);
  check_blocks(blocks, *type);
  std::vector<int64_t> shape;
  for (size_t i = 0; i + 2 < blocks.ndim(); ++i) shape.push_back(static_cast<int64_t>(blocks.shape(i)));
  shape.push_back(static_cast<int64_t>(blocks.shape(blocks.ndim() - 2)) * type->block_size);
  ktx::BlocksView view{blocks.data(), leading_starts(blocks), blocks.stride(blocks.ndim() - 3),
                       repack ? nullptr : keep_alive(array)};
  nb::gil_scoped_release release;
  return ktx::register_weights(*type, std::move(shape), std::move(view), repack);
}

void release(uint32_t handle) {
  nb::gil_scoped_release release;
  ktx::release_weights(handle);
}

template <typename Function>
nb::capsule handler(Function* function) {
  return nb::capsule(reinterpret_cast<void*>(function));
}

}  // namespace

NB_MODULE(_ktx_ffi, m) {
  m.def("create_weights", &create_weights, nb::arg("blocks"), nb::arg("ggml_type"), nb::arg("repack"));
  m.def("release_weights", &release, nb::arg("handle"));
  m.def("weight_bytes", [](uint32_t handle) {
    const auto w = ktx::find_weights(handle);
    return w ? w->lead * w->panels_per_lead() * w->panel_size : 0;
  });
  m.def("isa", [] { return std::string(ktx::isa_name()); });
  m.def("threads", &ktx::threads);
  m.def("set_threads", [](int n) {
    if (n < 1) throw nb::value_error("threads must be at least 1");
    nb::gil_scoped_release release;
    ktx::set_threads(n);
  });
  m.def("measure_read_bandwidth", &ktx::measure_read_bandwidth, nb::arg("bytes"));
  m.def("measure_int8_peak", &ktx::measure_int8_peak);
  m.def("measure_bf16_peak", &ktx::measure_bf16_peak);
  nb::dict handlers;
  handlers["ktx_matmul"] = handler(ktx_matmul);
  handlers["ktx_experts"] = handler(ktx_experts);
  handlers["ktx_mla_attention"] = handler(ktx_mla_attention);
  handlers["ktx_cache_write"] = handler(ktx_cache_write);
  handlers["ktx_embed"] = handler(ktx_embed);
  handlers["ktx_rms_norm"] = handler(ktx_rms_norm);
  m.attr("HANDLERS") = handlers;
}
