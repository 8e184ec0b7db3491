// A list of tensors cut into chunks, one per block: what project_align_ and surgery_adamw_ have in common.
#pragma once

#include "share.cuh"
#include "tables.cuh"

namespace dgs::cuda {

// What the kernels on a list are given. A cluster of `cluster` blocks works on each group, where every group fits
// one; or with 0, a block on each chunk.
struct ChunkedList {
  Tables tables;
  // The sums of every group: [group_sums] numbers of the compute type.
  void* sums;
  // One number of the compute type, or null.
  const void* scale;
  double alignment, eps;
  Order order;
  Rule rule;
  int cluster;
  // Groups that clusters work on, or whose chunks' sums are added up.
  Range groups;
  // Without clusters: chunks to edit, whose sums an earlier launch has left, and chunks of a later turn to sum.
  Range edited, summed;
  // Whether `sums` are there for what is edited; otherwise every block adds up those of its group.
  bool added;

  int64_t blocks() const { return cluster ? groups.count() * cluster : edited.count() + summed.count(); }
};

// For a kernel that works on the list, with so much shared memory.
template <typename P>
ChunkedList lay_out(const TensorList& list, const Tables& tables, void (*kernel)(P), int shared_bytes) {
  const int64_t cluster = tables.max_group_chunks;
  const bool fits = list.part == Part::all && tables.num_chunks &&
                    grants_cluster(reinterpret_cast<const void*>(kernel), cluster, kListThreads, shared_bytes);
  return {tables,
          list.sums,
          list.scale,
          list.alignment,
          list.eps,
          list.order,
          list.rule,
          fits ? static_cast<int>(cluster) : 0,
          {0, list.num_groups},
          {},
          {},
          false};
}

// Leaves sums of the chunks to sum, and adds up those of the groups.
const char* sum_chunks(const ChunkedList&, DType, void* stream);
const char* add_up_groups(const ChunkedList&, DType, void* stream);

// Launches what list.part asks for. `edit` launches the kernel that edits. Without clusters, each of its launches edits
// a turn and sums the next one: what is edited was read so short a time ago that it still lies in the L2 cache.
template <typename Edit>
const char* surgery_on_list(const TensorList& given, const KeptTables& tables, ChunkedList list, void* stream,
                            Edit edit) {
  if (list.cluster) return edit(list);
  const char* error = nullptr;
  const Range all{0, tables.device.num_chunks};
  if (given.part == Part::apply) {
    list.edited = all, list.added = true;
    return edit(list);
  }
  if (given.part == Part::sums) {
    list.summed = all;
    error = sum_chunks(list, given.dtype, stream);
    return error ? error : add_up_groups(list, given.dtype, stream);
  }
  for (const Turn& turn : tables.turns) {
    list.summed = turn.chunks, list.groups = turn.groups;
    error = list.edited.count() ? edit(list) : sum_chunks(list, given.dtype, stream);
    if (!error && turn.added) error = add_up_groups(list, given.dtype, stream);
    if (error) return error;
    list.edited = turn.chunks, list.added = turn.added;
  }
  list.summed = {};
  return edit(list);
}

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

  int64_t index;
  // Whether this launch edits the chunk, or only sums it.
  bool edited;

  __device__ __forceinline__ ChunkOf(const ChunkedList& list, int64_t index, bool edited)
      : Base(list.tables, index), index(index), edited(edited) {}
  __device__ __forceinline__ T* grad() const { return at(static_cast<T*>(tensor->grad)); }
  __device__ __forceinline__ void read(Share<T, Aligned>& share, const SurgeryOptions<Compute<T>>& options,
                                       Compute<T> (&sums)[group_sums]) const {
    share.read(grad(), at(static_cast<const T*>(tensor->harmful)), at(static_cast<const T*>(tensor->beneficial)), count,
               threadIdx.x, kListThreads, options, sums, wide);
  }
};

// What is edited comes first, and of it what was read last: it is the likeliest to lie in the cache still.
template <typename T, bool Aligned>
__device__ __forceinline__ ChunkOf<T, Aligned> chunk_of_block(const ChunkedList& list) {
  int64_t index, group = -1;
  bool edited = true, mine = true;
  if (list.cluster) {
    group = blockIdx.x / list.cluster;
    const int64_t* begin = list.tables.group_begin + group;
    index = begin[0] + blockIdx.x % list.cluster;
    // A block beyond its group's chunks only takes part in the sums.
    mine = index < begin[1];
  } else {
    const int64_t later = blockIdx.x - list.edited.count();
    edited = later < 0;
    index = edited ? list.edited.begin - 1 - later : list.summed.begin + later;
  }
  ChunkOf<T, Aligned> chunk(list, mine ? index : 0, edited);
  if (list.cluster) chunk.group = group;
  if (!mine) chunk.count = 0;
  return chunk;
}

// Asks for an array's part of a chunk to be brought to the L2 cache, 128 bytes at a time.
template <typename T>
__device__ __forceinline__ void prefetch(const T* array, int64_t count) {
  constexpr int kLine = 128 / sizeof(T);
  for (int64_t i = threadIdx.x * kLine; i < count; i += kListThreads * kLine) prefetch_line(array + i);
}

template <typename A>
__device__ __forceinline__ void write_sums(void* all, int64_t index, const A (&sums)[group_sums]) {
  A* place = static_cast<A*>(all) + index * group_sums;
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < group_sums; ++n) place[n] = sums[n];
}

// A block adds up what its threads have read of a chunk, for a later launch.
template <typename A>
__device__ __forceinline__ void leave_sums(const ChunkedList& list, int64_t index, A (&sums)[group_sums]) {
  sum_over(kListThreads, sums, shared_memory<A>());
  write_sums(list.tables.partials, index, sums);
}

// A block adds up what was left of a group's chunks, always in the same order.
template <typename A>
__device__ __forceinline__ void add_up(const ChunkedList& list, int64_t group, A (&sums)[group_sums]) {
  const int64_t* begin = list.tables.group_begin + group;
#pragma unroll
  for (int n = 0; n < group_sums; ++n) sums[n] = 0;
  for (int64_t c = begin[0] + threadIdx.x; c < begin[1]; c += kListThreads)
#pragma unroll
    for (int n = 0; n < group_sums; ++n) sums[n] += static_cast<const A*>(list.tables.partials)[c * group_sums + n];
  sum_over(kListThreads, sums, shared_memory<A>());
}

// The coefficient of a chunk's projection, from what its threads have read. All of them call it, and cluster_done() at
// the end.
template <typename T, bool Aligned>
__device__ __forceinline__ Compute<T> project(const ChunkedList& list, const ChunkOf<T, Aligned>& chunk,
                                              const SurgeryOptions<Compute<T>>& options,
                                              Compute<T> (&sums)[group_sums]) {
  using A = Compute<T>;
  if (list.cluster) {
    A* scratch = shared_memory<A>();
    sum_over(kListThreads, sums, scratch);
    sum_over_cluster(list.cluster, sums, scratch + kListThreads / kWarp * group_sums);
    if (blockIdx.x % list.cluster == 0) write_sums(list.sums, chunk.group, sums);
  } else if (list.added) {
#pragma unroll
    for (int n = 0; n < group_sums; ++n) sums[n] = static_cast<const A*>(list.sums)[chunk.group * group_sums + n];
  } else {
    add_up(list, chunk.group, sums);
    if (chunk.index == list.tables.group_begin[chunk.group]) write_sums(list.sums, chunk.group, sums);
  }
  A inner = sums[0] + (options.order == Order::align_first ? options.alignment * sums[3] : A(0));
  return projection(inner, sqrt(sums[1]), options.eps, options.rule);
}

}  // namespace dgs::cuda
