// A list of tensors cut into chunks, one per block: what project_align_ and SurgeryAdamW have in common.
#pragma once

#include "share.cuh"

namespace dgs::cuda {

constexpr int kListThreads = 256;  // so that AdamW's seven arrays find registers

template <typename T, bool Aligned>
constexpr int64_t kChunk = int64_t(kListThreads) * kShare<T, Aligned>;

template <typename A>
__device__ __forceinline__ SurgeryOptions<A> options_of(const TensorList& list) {
  A scale = list.scale ? *static_cast<const A*>(list.scale) : A(1);
  return {A(list.alignment) * scale, A(list.eps), list.order, list.rule};
}

// A block's chunk: its share of each of the tensor's arrays.
template <typename T, bool Aligned>
struct ChunkOf {
  const TensorEntry* tensor;
  int64_t offset, count, group;
  bool wide;  // whether this chunk can be accessed 16 bytes at a time

  __device__ __forceinline__ ChunkOf(const TensorList& list, int64_t index) {
    Chunk chunk = list.chunks[index];
    tensor = list.tensors + chunk.tensor;
    offset = chunk.offset;
    group = chunk.group;
    count = tensor->numel - offset < kChunk<T, Aligned> ? tensor->numel - offset : kChunk<T, Aligned>;
    wide = Aligned || (tensor->aligned && count % kPack<T> == 0);
  }
  template <typename P>
  __device__ __forceinline__ P* at(P* array) const {
    return array ? array + offset : nullptr;
  }
  __device__ __forceinline__ T* grad() const { return at(static_cast<T*>(tensor->grad)); }
  __device__ __forceinline__ void read(Share<T, Aligned>& share, const SurgeryOptions<Compute<T>>& options,
                                       Compute<T> (&sums)[kGroupSums]) const {
    share.read(grad(), at(static_cast<const T*>(tensor->harmful)), at(static_cast<const T*>(tensor->beneficial)), count,
               threadIdx.x, kListThreads, options, sums, wide);
  }
};

// How a list is laid over the device: a cluster of `cluster` blocks per group, where every group fits one; or
// with 0, a block per chunk, once the groups' sums are known.
struct ListGrid {
  TensorList list;
  int cluster;

  int64_t blocks() const { return cluster ? list.num_groups * cluster : list.num_chunks; }
};

inline ListGrid lay_out(const TensorList& list) {
  int cluster = power_of_two(list.max_group_chunks, kMaxCluster);
  bool fits = list.part == Part::all && list.num_chunks && list.max_group_chunks <= cluster && (cluster == 1 || has_clusters());
  return {list, fits ? cluster : 0};
}

template <typename T, bool Aligned>
__device__ __forceinline__ ChunkOf<T, Aligned> chunk_of_block(const ListGrid& p) {
  if (!p.cluster) return ChunkOf<T, Aligned>(p.list, blockIdx.x);
  int64_t group = blockIdx.x / p.cluster, index = p.list.group_begin[group] + blockIdx.x % p.cluster;
  // A block beyond its group's chunks only takes part in the sums.
  bool mine = index < p.list.group_begin[group + 1];
  ChunkOf<T, Aligned> chunk(p.list, mine ? index : 0);
  chunk.group = group;
  if (!mine) chunk.count = 0;
  return chunk;
}

// Reads a chunk and returns the coefficient of its projection. All threads call it, and cluster_done() at the end.
template <typename T, bool Aligned>
__device__ __forceinline__ Compute<T> read_and_project(const ListGrid& p, const ChunkOf<T, Aligned>& chunk,
                                                       Share<T, Aligned>& share) {
  using A = Compute<T>;
  SurgeryOptions<A> options = options_of<A>(p.list);
  A* group_sums = static_cast<A*>(p.list.sums) + chunk.group * kGroupSums;
  A sums[kGroupSums] = {};
  chunk.read(share, options, sums);
  if (p.cluster) {
    A* scratch = shared_memory<A>();
    sum_over(kListThreads, sums, scratch);
    sum_over_cluster(p.cluster, sums, scratch + kListThreads / kWarp * kGroupSums);
    if (threadIdx.x == 0 && blockIdx.x % p.cluster == 0)
#pragma unroll
      for (int n = 0; n < kGroupSums; ++n) group_sums[n] = sums[n];
  } else {
#pragma unroll
    for (int n = 0; n < kGroupSums; ++n) sums[n] = group_sums[n];
  }
  A inner = sums[0] + (options.order == Order::align_first ? options.alignment * sums[3] : A(0));
  return projection(inner, sqrt(sums[1]), options.eps, options.rule);
}

}  // namespace dgs::cuda
