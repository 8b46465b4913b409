// SPDX-License-Identifier: Apache-2.0
// Threads for the kernels.
#pragma once

#include <cstdint>
#include <functional>

namespace ktx {

// Calls task(i) for every i in [0, n), on the pool's workers and on the calling thread, and returns when all are done.
// Each thread takes tasks one by one from a run of them that follow each other, then from the others' runs, so they may
// differ in size. Several threads may call at once, and a task
// may call again: a caller always works on its own tasks, so it never waits for a worker to become free. Tasks must not
// throw.
void parallel_for(int64_t n, const std::function<void(int64_t)>& task);

// The number of threads a call may use, the caller included.
int threads();

// Changes it, when n >= 1; calls under way finish on the threads they have. The default is the number of physical cores
// this process may run on, or its CPU quota where that is less.
void set_threads(int n);

}  // namespace ktx
