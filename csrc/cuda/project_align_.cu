// project_align_ on a GPU: gradient surgery in place over many tensors, in one launch or three.
//
// The tensors are cut into chunks that one block keeps in registers. Where every group (layer) fits a cluster
// of up to 8 blocks, one launch reads each element once: 3 reads and 1 write. Otherwise a first launch leaves
// partial sums per chunk, a second adds them up per group in a fixed order, and a third applies the result:
// 6 reads and 1 write. Nothing depends on values on the host, so a CUDA graph may capture either.
#include <algorithm>
#include <numeric>
#include <vector>

#include "chunks.cuh"

namespace dgs::cuda {
namespace {

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads) void chunk_sums(const __grid_constant__ TensorList p) {
  using A = Compute<T>;
  A sums[kGroupSums] = {};
  Share<T, Aligned> share;
  ChunkOf<T, Aligned> chunk(p, blockIdx.x);
  chunk.read(share, options_of<A>(p), sums);
  sum_over(kListThreads, sums, shared_memory<A>());
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < kGroupSums; ++n) static_cast<A*>(p.partials)[int64_t(blockIdx.x) * kGroupSums + n] = sums[n];
}

// One block per group.
template <typename A>
__global__ __launch_bounds__(kListThreads) void add_chunk_sums(const __grid_constant__ TensorList p) {
  A sums[kGroupSums] = {};
  for (int64_t c = p.group_begin[blockIdx.x] + threadIdx.x; c < p.group_begin[blockIdx.x + 1]; c += kListThreads)
#pragma unroll
    for (int n = 0; n < kGroupSums; ++n) sums[n] += static_cast<const A*>(p.partials)[c * kGroupSums + n];
  sum_over(kListThreads, sums, shared_memory<A>());
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < kGroupSums; ++n) static_cast<A*>(p.sums)[int64_t(blockIdx.x) * kGroupSums + n] = sums[n];
}

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads) void project_chunks(const __grid_constant__ ListGrid p) {
  ChunkOf<T, Aligned> chunk = chunk_of_block<T, Aligned>(p);
  Share<T, Aligned> share;
  Compute<T> k = read_and_project(p, chunk, share);
  share.write(chunk.grad(), k, chunk.count, threadIdx.x, kListThreads, p.list.rule, chunk.wide);
  cluster_done(p.cluster);
}

template <typename T, bool Aligned>
const char* sum_groups(const TensorList& list, void* stream) {
  using A = Compute<T>;
  int scratch = scratch_bytes<A>(kGroupSums, kListThreads);
  const char* error = launch(chunk_sums<T, Aligned>, list.num_chunks, kListThreads, scratch, stream, list);
  return error ? error : launch(add_chunk_sums<A>, list.num_groups, kListThreads, scratch, stream, list);
}

template <typename T, bool Aligned>
const char* run(const TensorList& list, void* stream) {
  ListGrid grid = lay_out(list);
  if (!grid.cluster && list.part != Part::apply)
    if (const char* error = sum_groups<T, Aligned>(list, stream)) return error;
  if (list.part == Part::sums) return nullptr;
  return launch(project_chunks<T, Aligned>, grid.blocks(), kListThreads, scratch_bytes<Compute<T>>(kGroupSums, kListThreads),
                stream, grid, grid.cluster);
}

}  // namespace

int64_t plan_chunks(DType dtype, bool aligned, const int64_t* numel, const int64_t* groups, int64_t num_tensors,
                    int64_t num_groups, Chunk* chunks, int64_t* group_begin) {
  int64_t size = dtype == DType::f64 ? (aligned ? kChunk<double, true> : kChunk<double, false>)
                                     : (aligned ? kChunk<float, true> : kChunk<float, false>);
  int64_t count = 0;
  for (int64_t i = 0; i < num_tensors; ++i) count += ceil_div(numel[i], size);
  if (!chunks) return count;
  // Counting sort by group; a group's chunks keep the order of its tensors.
  std::fill(group_begin, group_begin + num_groups + 1, 0);
  for (int64_t i = 0; i < num_tensors; ++i) group_begin[groups[i] + 1] += ceil_div(numel[i], size);
  std::partial_sum(group_begin, group_begin + num_groups + 1, group_begin);
  std::vector<int64_t> next(group_begin, group_begin + num_groups);
  for (int64_t i = 0; i < num_tensors; ++i)
    for (int64_t offset = 0; offset < numel[i]; offset += size)
      chunks[next[groups[i]]++] = {offset, static_cast<int32_t>(i), static_cast<int32_t>(groups[i])};
  return count;
}

const char* project_align_(const TensorList& list, void* stream) {
  return dispatch(list.dtype, [&](auto zero) {
    using T = decltype(zero);
    return list.aligned ? run<T, true>(list, stream) : run<T, false>(list, stream);
  });
}

}  // namespace dgs::cuda
