// Stands in for CUDA's header of the same name: the cluster, its barrier and its distributed shared memory.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() { return shim::cluster_rank(); }
  static unsigned num_blocks() { return shim::cluster_size(); }
  static void sync() {
    barrier_arrive();
    barrier_wait();
  }
  static void barrier_arrive() { shim::arrive_at_cluster_barrier(); }
  static void barrier_wait() { shim::wait_at_cluster_barrier(); }
  template <typename T>
  static T* map_shared_rank(T* address, unsigned rank) {
    auto offset = reinterpret_cast<unsigned char*>(address) - shim::shared_memory();
    return reinterpret_cast<T*>(shim::shared_memory(rank) + offset);
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
