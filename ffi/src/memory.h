// SPDX-License-Identifier: Apache-2.0
// Aligned memory: long-lived for weights, recycled for intermediate values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktx {

// Zeroed memory aligned to 64 bytes, in 2 MB pages where it is that large and the system grants them. Throws
// std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  void* mapping_ = nullptr;  // if mapped
  size_t mapped_ = 0;
};

// A Buffer borrowed from a small store for the length of one call; its contents are arbitrary.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements of the buffer, aligned to 64 bytes. The sum of scratch_bytes<T>(count) must fit.
  template <typename T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(buffer_.data() + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }

 private:
  Buffer buffer_;
  size_t used_ = 0;
};

template <typename T>
constexpr size_t scratch_bytes(size_t count) {
  return (count * sizeof(T) + 63) / 64 * 64;
}

// Memory of the calling thread, at least `bytes`, aligned to 64; valid until the thread's next call with the same slot.
enum class ThreadSlot { kOutput, kPanel, kRow, kHidden, kCount };
uint8_t* thread_memory(ThreadSlot slot, size_t bytes);

}  // namespace ktx
