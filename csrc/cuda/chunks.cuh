// A list of tensors cut into chunks, one per block: what project_align_ and surgery_adamw_ have in common.
#pragma once

#include "share.cuh"
#include "tables.cuh"

namespace dgs::cuda {

// What the kernels on a list are given. A cluster of `cluster` blocks works on each group, where every group fits
// one; or with 0, a block on each chunk, once the groups' sums are known.
struct ChunkedList {
  Tables tables;
  int64_t num_groups;
  void* sums;         // [num_groups, group_sums] of the compute type
  const void* scale;  // one number of the compute type, or null
  double alignment, eps;
  Order order;
  Rule rule;
  int cluster;

  int64_t blocks() const { return cluster ? num_groups * cluster : tables.num_chunks; }
};

// For a kernel that works on the list, with so much shared memory.
template <typename P>
ChunkedList lay_out(const TensorList& list, const Tables& tables, void (*kernel)(P), int shared_bytes) {
  const int64_t cluster = tables.max_group_chunks;
  const bool fits = list.part == Part::all && tables.num_chunks &&
                    grants_cluster(reinterpret_cast<const void*>(kernel), cluster, kListThreads, shared_bytes);
  return {tables,     list.num_groups, list.sums,
          list.scale, list.alignment,  list.eps,
          list.order, list.rule,       fits ? static_cast<int>(cluster) : 0};
}

// The first two launches, where a cluster does not do it all in one: leaves the groups' sums.
const char* sum_groups(const ChunkedList&, DType, void* stream);

template <typename A>
__device__ __forceinline__ SurgeryOptions<A> options_of(const ChunkedList& list) {
  A scale = list.scale ? *static_cast<const A*>(list.scale) : A(1);
  return {A(list.alignment) * scale, A(list.eps), list.order, list.rule};
}

// A block's chunk: its share of each of the tensor's arrays.
template <typename T, bool Aligned>
struct ChunkOf : ChunkAt<T, Aligned, ListTensor> {
  using Base = ChunkAt<T, Aligned, ListTensor>;
  using Base::at, Base::count, Base::tensor, Base::wide;

  __device__ __forceinline__ ChunkOf(const ChunkedList& list, int64_t index) : Base(list.tables, index) {}
  __device__ __forceinline__ T* grad() const { return at(static_cast<T*>(tensor->grad)); }
  __device__ __forceinline__ void read(Share<T, Aligned>& share, const SurgeryOptions<Compute<T>>& options,
                                       Compute<T> (&sums)[group_sums]) const {
    share.read(grad(), at(static_cast<const T*>(tensor->harmful)), at(static_cast<const T*>(tensor->beneficial)), count,
               threadIdx.x, kListThreads, options, sums, wide);
  }
};

template <typename T, bool Aligned>
__device__ __forceinline__ ChunkOf<T, Aligned> chunk_of_block(const ChunkedList& list) {
  if (!list.cluster) return ChunkOf<T, Aligned>(list, blockIdx.x);
  const int64_t* group_begin = list.tables.group_begin;
  int64_t group = blockIdx.x / list.cluster, index = group_begin[group] + blockIdx.x % list.cluster;
  // A block beyond its group's chunks only takes part in the sums.
  bool mine = index < group_begin[group + 1];
  ChunkOf<T, Aligned> chunk(list, mine ? index : 0);
  chunk.group = group;
  if (!mine) chunk.count = 0;
  return chunk;
}

// Asks for an array's part of a chunk to be brought to the L2 cache, 128 bytes at a time.
template <typename T>
__device__ __forceinline__ void prefetch(const T* array, int64_t count) {
  constexpr int kLine = 128 / sizeof(T);
  for (int64_t i = threadIdx.x * kLine; i < count; i += kListThreads * kLine) prefetch_line(array + i);
}

// Reads a chunk and returns the coefficient of its projection. All threads call it, and cluster_done() at the end.
template <typename T, bool Aligned>
__device__ __forceinline__ Compute<T> read_and_project(const ChunkedList& list, const ChunkOf<T, Aligned>& chunk,
                                                       Share<T, Aligned>& share) {
  using A = Compute<T>;
  SurgeryOptions<A> options = options_of<A>(list);
  A* of_group = static_cast<A*>(list.sums) + chunk.group * group_sums;
  A sums[group_sums] = {};
  chunk.read(share, options, sums);
  if (list.cluster) {
    A* scratch = shared_memory<A>();
    sum_over(kListThreads, sums, scratch);
    sum_over_cluster(list.cluster, sums, scratch + kListThreads / kWarp * group_sums);
    if (threadIdx.x == 0 && blockIdx.x % list.cluster == 0)
#pragma unroll
      for (int n = 0; n < group_sums; ++n) of_group[n] = sums[n];
  } else {
#pragma unroll
    for (int n = 0; n < group_sums; ++n) sums[n] = of_group[n];
  }
  A inner = sums[0] + (options.order == Order::align_first ? options.alignment * sums[3] : A(0));
  return projection(inner, sqrt(sums[1]), options.eps, options.rule);
}

}  // namespace dgs::cuda
