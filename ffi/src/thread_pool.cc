// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu_topology.h"

#if defined(__linux__)
#include <pthread.h>
#endif

namespace ktx {
namespace {

// How long a worker looks for the next call before it sleeps. Calls of one decode step follow each other within this.
constexpr std::chrono::microseconds kSpin{60};

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or for kSpin; returns done().
template <typename Done>
bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

constexpr int kMaxShares = 64;

// One call of parallel_for; lives on the caller's stack. Every thread begins in a share of its own, so that what it
// does next lies behind what it does now, and then helps with the others'.
class Call {
 public:
  Call(const std::function<void(int64_t)>& task, int64_t n, int threads)
      : task_(task), count_(static_cast<int>(std::min<int64_t>({threads, n, kMaxShares}))) {
    for (int s = 0; s < count_; ++s) {
      shares_[s].next.store(n * s / count_, std::memory_order_relaxed);
      shares_[s].end = n * (s + 1) / count_;
    }
  }

  std::atomic<int> workers{0};  // inside run(), the caller not counted

  bool open() const {
    return std::any_of(shares_, shares_ + count_, [](const Share& share) {
      return share.next.load(std::memory_order_relaxed) < share.end;
    });
  }

  void run() {
    const int first = joined_.fetch_add(1, std::memory_order_relaxed);
    for (int s = 0; s < count_; ++s) {
      Share& share = shares_[(first + s) % count_];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task_(i);
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  const std::function<void(int64_t)>& task_;
  const int count_;
  std::atomic<int> joined_{0};
  Share shares_[kMaxShares];
};

class Pool {
 public:
  explicit Pool(int threads) : size_(threads) {
    // Workers keep to one logical CPU of each core, but not to one core each: callers float, and a worker bound to the
    // core a caller is on would wait for it while another core is idle.
    const std::vector<int> cores = physical_cores();
    const bool pin = static_cast<size_t>(threads) <= cores.size();
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this, cores, pin] {
        if (pin) pin_to_cpus(cores);
        work();
      });
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  void run(int64_t n, const std::function<void(int64_t)>& task) {
    Call call(task, n, size_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      calls_.push_back(&call);
      epoch_.fetch_add(1, std::memory_order_release);
      if (sleeping_ > 0) wake_.notify_all();
    }
    call.run();
    {
      std::lock_guard<std::mutex> lock(mutex_);  // from here on no worker can join the call
      calls_.erase(std::find(calls_.begin(), calls_.end(), &call));
    }
    const auto done = [&call] { return call.workers.load(std::memory_order_acquire) == 0; };
    if (spin_until(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    ++waiting_;
    finished_.wait(lock, done);
    --waiting_;
  }

 private:
  Call* join_call() {  // under the lock
    for (Call* call : calls_) {
      if (call->open()) {
        call->workers.fetch_add(1, std::memory_order_relaxed);
        return call;
      }
    }
    return nullptr;
  }

  void work() {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "ktx_ffi");
#endif
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stop_) {
      if (Call* call = join_call()) {
        lock.unlock();
        call->run();
        leave(call);
        lock.lock();
        continue;
      }
      seen = epoch_.load(std::memory_order_relaxed);
      lock.unlock();
      const auto news = [this, seen] { return epoch_.load(std::memory_order_acquire) != seen; };
      const bool found = spin_until(news);
      lock.lock();
      if (found) continue;
      ++sleeping_;
      wake_.wait(lock, news);
      --sleeping_;
    }
  }

  // After the decrement the call may be gone.
  void leave(Call* call) {
    if (call->workers.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_ > 0) finished_.notify_all();
  }

  const int size_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable finished_;
  std::vector<Call*> calls_;
  std::atomic<uint64_t> epoch_{0};
  int sleeping_ = 0;
  int waiting_ = 0;
  bool stop_ = false;
};

int default_threads() {
  const int cores = static_cast<int>(physical_cores().size());
  const int logical = static_cast<int>(std::thread::hardware_concurrency());
  const int quota = cpu_quota();
  const int n = cores > 0 ? cores : std::max(1, logical);
  return quota > 0 ? std::min(n, quota) : n;
}

// Never destroyed: at exit, workers sleep in it, and static destructors may run while a call is under way.
struct State {
  std::mutex mutex;
  std::shared_ptr<Pool> pool;  // made on first use
  int threads = 0;             // 0: the default
};

State*& state_slot() {
  static State* slot = new State;
  return slot;
}

State& state() {
#if defined(__linux__)
  // Workers do not survive fork(): the child begins anew and leaves the copy of its parent's pool alone.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { state_slot() = new State; });
  (void)registered;
#endif
  return *state_slot();
}

int size_of(State& s) {
  if (s.threads == 0) s.threads = default_threads();
  return s.threads;
}

std::shared_ptr<Pool> current_pool() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.pool) s.pool = std::make_shared<Pool>(size_of(s));
  return s.pool;
}

}  // namespace

void parallel_for(int64_t n, const std::function<void(int64_t)>& task) {
  const std::shared_ptr<Pool> pool = n > 1 ? current_pool() : nullptr;
  if (!pool || pool->size() == 1) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  pool->run(n, task);
}

int threads() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return size_of(s);
}

void set_threads(int n) {
  State& s = state();
  std::shared_ptr<Pool> old;  // outlives the lock; joined by the last call that uses it
  std::lock_guard<std::mutex> lock(s.mutex);
  if (n == s.threads) return;
  s.threads = n;
  old.swap(s.pool);
}

}  // namespace ktx
