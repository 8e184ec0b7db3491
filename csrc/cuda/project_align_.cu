// project_align_ on a GPU: gradient surgery in place over many tensors.
//
// The tensors are cut into chunks that one block keeps in registers. Where every group (layer) fits a cluster of up to
// 16 blocks, one launch reads each element once: 3 reads and 1 write. Otherwise a first launch leaves sums per chunk,
// and a second adds them up per group in a fixed order and applies the result: 6 reads and 1 write. Large lists take
// turns of so many groups that the second reading finds them in the L2 cache. Nothing depends on values on the host, so
// a CUDA graph may capture either.
#include "chunks.cuh"

namespace dgs::cuda {
namespace {

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads) void chunk_sums(const __grid_constant__ ChunkedList p) {
  using A = Compute<T>;
  A sums[group_sums] = {};
  Share<T, Aligned> share;
  const ChunkOf<T, Aligned> chunk(p, p.summed.begin + blockIdx.x, false);
  chunk.read(share, options_of<A>(p), sums);
  leave_sums(p, chunk.index, sums);
}

// One block per group.
template <typename A>
__global__ __launch_bounds__(kListThreads) void add_chunk_sums(const __grid_constant__ ChunkedList p) {
  A sums[group_sums];
  const int64_t group = p.groups.begin + blockIdx.x;
  add_up(p, group, sums);
  write_sums(p.sums, group, sums);
}

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads, kListBlocks<T>) void project_chunks(const __grid_constant__ ChunkedList p) {
  using A = Compute<T>;
  const ChunkOf<T, Aligned> chunk = chunk_of_block<T, Aligned>(p);
  const SurgeryOptions<A> options = options_of<A>(p);
  A sums[group_sums] = {};
  Share<T, Aligned> share;
  chunk.read(share, options, sums);
  if (!chunk.edited) return leave_sums(p, chunk.index, sums);
  const A k = project(p, chunk, options, sums);
  share.write(chunk.grad(), k, chunk.count, threadIdx.x, kListThreads, chunk.wide);
  cluster_done(p.cluster);
}

}  // namespace

const char* sum_chunks(const ChunkedList& list, DType dtype, void* stream) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto sum = list.tables.aligned ? chunk_sums<T, true> : chunk_sums<T, false>;
    const int scratch = scratch_bytes<Compute<T>>(group_sums, kListThreads);
    return launch(sum, list.summed.count(), kListThreads, scratch, stream, list);
  });
}

const char* add_up_groups(const ChunkedList& list, DType dtype, void* stream) {
  return dispatch(dtype, [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const int scratch = scratch_bytes<A>(group_sums, kListThreads);
    return launch(add_chunk_sums<A>, list.groups.count(), kListThreads, scratch, stream, list);
  });
}

const char* project_align_(const TensorList& given, const Allocate& allocate, void* stream) {
  const char* error = nullptr;
  const auto tables = tables_of({given, group_sums, /* in_turns */ true}, allocate, stream, error);
  if (error) return error;
  return dispatch(given.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto project = tables->device.aligned ? project_chunks<T, true> : project_chunks<T, false>;
    const int scratch = scratch_bytes<Compute<T>>(group_sums, kListThreads);
    return surgery_on_list(given, *tables, lay_out(given, tables->device, project, scratch), stream,
                           [&](const ChunkedList& list) {
                             return launch(project, list.blocks(), kListThreads, scratch, stream, list, list.cluster);
                           });
  });
}

}  // namespace dgs::cuda
