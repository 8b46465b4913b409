// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

namespace ktx {

// One logical CPU of each physical core that this process may run on, in order. Empty where the system does not tell.
std::vector<int> physical_cores();

// The CPUs' worth of time this process may use (cgroup v2 quota, rounded up); 0 if there is no limit.
int cpu_quota();

// Binds the calling thread to these CPUs, where the system can.
void pin_to_cpus(const std::vector<int>& cpus);

}  // namespace ktx
