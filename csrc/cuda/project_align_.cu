// project_align_ on a GPU: gradient surgery in place over many tensors, in one launch or three.
//
// The tensors are cut into chunks that one block keeps in registers. Where every group (layer) fits a cluster
// of up to 16 blocks, one launch reads each element once: 3 reads and 1 write. Otherwise a first launch leaves
// partial sums per chunk, a second adds them up per group in a fixed order, and a third applies the result:
// 6 reads and 1 write. Nothing depends on values on the host, so a CUDA graph may capture either.
#include "chunks.cuh"

namespace dgs::cuda {
namespace {

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads) void chunk_sums(const __grid_constant__ ChunkedList p) {
  using A = Compute<T>;
  A sums[group_sums] = {};
  Share<T, Aligned> share;
  ChunkOf<T, Aligned> chunk(p, blockIdx.x);
  chunk.read(share, options_of<A>(p), sums);
  sum_over(kListThreads, sums, shared_memory<A>());
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < group_sums; ++n)
      static_cast<A*>(p.tables.partials)[int64_t(blockIdx.x) * group_sums + n] = sums[n];
}

// One block per group.
template <typename A>
__global__ __launch_bounds__(kListThreads) void add_chunk_sums(const __grid_constant__ ChunkedList p) {
  A sums[group_sums] = {};
  const int64_t* begin = p.tables.group_begin + blockIdx.x;
  for (int64_t c = begin[0] + threadIdx.x; c < begin[1]; c += kListThreads)
#pragma unroll
    for (int n = 0; n < group_sums; ++n) sums[n] += static_cast<const A*>(p.tables.partials)[c * group_sums + n];
  sum_over(kListThreads, sums, shared_memory<A>());
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < group_sums; ++n) static_cast<A*>(p.sums)[int64_t(blockIdx.x) * group_sums + n] = sums[n];
}

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads, kListBlocks<T>) void project_chunks(const __grid_constant__ ChunkedList p) {
  ChunkOf<T, Aligned> chunk = chunk_of_block<T, Aligned>(p);
  Share<T, Aligned> share;
  Compute<T> k = read_and_project(p, chunk, share);
  share.write(chunk.grad(), k, chunk.count, threadIdx.x, kListThreads, chunk.wide);
  cluster_done(p.cluster);
}

}  // namespace

const char* sum_groups(const ChunkedList& list, DType dtype, void* stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    int scratch = scratch_bytes<A>(group_sums, kListThreads);
    auto sum = list.tables.aligned ? chunk_sums<T, true> : chunk_sums<T, false>;
    const char* error = launch(sum, list.tables.num_chunks, kListThreads, scratch, stream, list);
    return error ? error : launch(add_chunk_sums<A>, list.num_groups, kListThreads, scratch, stream, list);
  });
}

const char* project_align_(const TensorList& given, const Allocate& allocate, void* stream) {
  const char* error = nullptr;
  const auto tables = tables_of({given, group_sums}, allocate, stream, error);
  if (error) return error;
  return dispatch(given.dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    auto project = tables->device.aligned ? project_chunks<T, true> : project_chunks<T, false>;
    const int scratch = scratch_bytes<Compute<T>>(group_sums, kListThreads);
    const ChunkedList list = lay_out(given, tables->device, project, scratch);
    if (!list.cluster && given.part != Part::apply) error = sum_groups(list, given.dtype, stream);
    if (error || given.part == Part::sums) return error;
    return launch(project, list.blocks(), kListThreads, scratch, stream, list, list.cluster);
  });
}

}  // namespace dgs::cuda
