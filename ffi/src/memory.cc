// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ktx {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
#if defined(__linux__)
  if (bytes >= kHugePage) {
    mapped_ = bytes + kHugePage;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t start = (reinterpret_cast<uintptr_t>(mapping_) + kHugePage - 1) & ~(kHugePage - 1);
    data_ = reinterpret_cast<uint8_t*>(start);
    // Whole pages only, so that the end of a tensor does not take 2 MB. Advice: refusal costs speed, nothing else.
    madvise(data_, bytes & ~(kHugePage - 1), MADV_HUGEPAGE);
    return;
  }
#endif
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes) != 0) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(p);
  std::memset(data_, 0, bytes);
}

Buffer::~Buffer() {
#if defined(__linux__)
  if (mapping_ != nullptr) {
    munmap(mapping_, mapped_);
    return;
  }
#endif
  std::free(data_);
}

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

namespace {

struct Store {
  std::mutex mutex;
  std::vector<Buffer> free;
};

Store& store() {
  static Store* s = new Store;  // never destroyed: calls may end after static destructors began
  return *s;
}

constexpr size_t kKeptBuffers = 4;

}  // namespace

Scratch::Scratch(size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(store().mutex);
    std::vector<Buffer>& free = store().free;
    auto best = free.end();
    for (auto it = free.begin(); it != free.end(); ++it) {
      if (it->size() >= bytes && (best == free.end() || it->size() < best->size())) best = it;
    }
    if (best != free.end()) {
      buffer_ = std::move(*best);
      free.erase(best);
      return;
    }
  }
  buffer_ = Buffer(bytes + bytes / 4);
}

Scratch::~Scratch() {
  Buffer dropped;
  std::lock_guard<std::mutex> lock(store().mutex);
  std::vector<Buffer>& free = store().free;
  free.push_back(std::move(buffer_));
  if (free.size() <= kKeptBuffers) return;
  const auto smallest =
      std::min_element(free.begin(), free.end(), [](const Buffer& a, const Buffer& b) { return a.size() < b.size(); });
  dropped = std::move(*smallest);
  free.erase(smallest);
}

uint8_t* thread_memory(ThreadSlot slot, size_t bytes) {
  thread_local Buffer buffers[static_cast<size_t>(ThreadSlot::kCount)];
  Buffer& buffer = buffers[static_cast<size_t>(slot)];
  if (buffer.size() < bytes) buffer = Buffer(bytes + bytes / 4);
  return buffer.data();
}

}  // namespace ktx
