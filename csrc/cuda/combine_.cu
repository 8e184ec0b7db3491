// combine_ on a GPU: a block keeps its chunk's sum in registers while it reads one objective after the other, the next
// while it adds the present one. K reads and 1 write, in one launch; where a gradient is written over, every thread has
// read what it writes to.
#include "objectives.cuh"

namespace dgs::cuda {
namespace {

// That a multiprocessor is to hold, so that enough loads are under way.
template <typename T>
constexpr int kBlocks = sizeof(T) == 2 ? 3 : 2;

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads,
                             kBlocks<T>) void combine_chunks(const __grid_constant__ ChunkedObjectives p) {
  using A = Compute<T>;
  constexpr int kPacks = kShare<T, Aligned> / kPack<T>;
  const ObjectivesChunk<T, Aligned> chunk(p.tables, blockIdx.x);
  const A* weights = static_cast<const A*>(p.weights) + chunk.group * p.weights_stride;
  A sum[kShare<T, Aligned>] = {};
  Pack<T> next[kPacks];
  const auto fetch = [&](int k) {
    const T* row = chunk.objective(k);
#pragma unroll
    for (int v = 0; v < kPacks; ++v)
      next[v] = load<T, Aligned, true>(row, v, threadIdx.x, kListThreads, chunk.count, chunk.wide);
  };
  fetch(0);
  for (int k = 0; k < p.count; ++k) {
    Pack<T> x[kPacks];
#pragma unroll
    for (int v = 0; v < kPacks; ++v) x[v] = next[v];
    if (k + 1 < p.count) fetch(k + 1);
    const A weight = weights[k];
#pragma unroll
    for (int v = 0; v < kPacks; ++v)
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) sum[v * kPack<T> + j] += weight * element(x[v], j);
  }
  T* out = chunk.at(static_cast<T*>(chunk.tensor->grad));
#pragma unroll
  for (int v = 0; v < kPacks; ++v) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) narrow(sum[v * kPack<T> + j], pack.at[j]);
    store<T, Aligned, true>(out, pack, v, threadIdx.x, kListThreads, chunk.count, chunk.wide);
  }
}

}  // namespace

const char* combine_(const Objectives& given, const Allocate& allocate, void* stream) {
  const char* error = nullptr;
  const auto tables = tables_of({given, 0}, allocate, stream, error);
  if (error) return error;
  const ChunkedObjectives p(given, tables->device);
  return dispatch(given.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto combine = p.tables.aligned ? combine_chunks<T, true> : combine_chunks<T, false>;
    return launch(combine, p.tables.num_chunks, kListThreads, 0, stream, p);
  });
}

}  // namespace dgs::cuda
