// gramian on a GPU: a block reads its chunk of every objective once and keeps the sums of all pairs in registers; a
// second launch adds up the chunks of each group in a fixed order.
#include "objectives.cuh"

namespace dgs::cuda {
namespace {

// The sums that a thread holds. Up to 8 objectives, those of all pairs. With 16, one half of the block has the pairs
// within the first eight and within the last eight, the other half has the pairs between them: both read the same
// numbers at the same time, the second from the L1 cache.
template <int Count>
struct Split {
  static constexpr int kSums = pairs(Count), kHalves = 1;
};
template <>
struct Split<16> {
  static constexpr int kSums = 2 * pairs(8), kHalves = 2;
};

// The n-th of the pairs a <= b of `count`.
__device__ __forceinline__ void find_pair(int n, int count, int& a, int& b) {
  for (a = 0; n >= count - a; ++a) n -= count - a;
  b = a + n;
}

// Which pair the n-th sum is of.
template <int Count>
__device__ __forceinline__ void find_pair_of(int half, int n, int& a, int& b) {
  if constexpr (Count <= 8) {
    find_pair(n, Count, a, b);
  } else if (half == 0) {
    const int first = n < pairs(8) ? 0 : 8;
    find_pair(n < pairs(8) ? n : n - pairs(8), 8, a, b);
    a += first;
    b += first;
  } else {
    a = n / 8;
    b = 8 + n % 8;
  }
}

// Packs of a thread from `Rows` objectives, `first` and those after it; beyond the last they are zeros.
template <typename T, bool Aligned, int Rows>
struct Packs {
  Pack<T> of[Rows];

  __device__ __forceinline__ Packs(const ObjectivesChunk<T, Aligned>& chunk, int first, int v, int lane, int lanes) {
#pragma unroll
    for (int k = 0; k < Rows; ++k)
      of[k] = load<T, Aligned>(chunk.objective(first + k), v, lane, lanes, chunk.count, chunk.wide);
  }
};

template <int First, typename T, bool Aligned, int Rows, int N>
__device__ __forceinline__ void add_within(const Packs<T, Aligned, Rows>& x, Compute<T> (&sums)[N]) {
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    int n = First;
#pragma unroll
    for (int a = 0; a < Rows; ++a)
#pragma unroll
      for (int b = a; b < Rows; ++b) sums[n++] += widen(x.of[a].at[j]) * widen(x.of[b].at[j]);
  }
}

// Between the first eight and the last eight, of which one at a time is in registers.
template <typename T, bool Aligned, int N>
__device__ __forceinline__ void add_between(const Packs<T, Aligned, 8>& x, const ObjectivesChunk<T, Aligned>& chunk,
                                            int v, int lane, int lanes, Compute<T> (&sums)[N]) {
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    const Packs<T, Aligned, 1> y(chunk, 8 + b, v, lane, lanes);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j)
#pragma unroll
      for (int a = 0; a < 8; ++a) sums[a * 8 + b] += widen(x.of[a].at[j]) * widen(y.of[0].at[j]);
  }
}

template <typename T, bool Aligned, int Count>
__global__ __launch_bounds__(kListThreads, 1) void chunk_products(const __grid_constant__ ChunkedObjectives p) {
  using A = Compute<T>;
  using Within = Packs<T, Aligned, Count <= 8 ? Count : 8>;
  constexpr int kHalves = Split<Count>::kHalves, kSums = Split<Count>::kSums, kLanes = kListThreads / kHalves;
  constexpr int kPacks = static_cast<int>(kChunk<T, Aligned>) / (kLanes * kPack<T>);
  constexpr int kAtOnce =
      Aligned && Count < 8 ? 8 / Count : 1;  // packs of each objective that are on their way together
  const ObjectivesChunk<T, Aligned> chunk(p.tables, blockIdx.x);
  const int half = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  A sums[kSums] = {};
  if (half == 0) {
#pragma unroll kAtOnce
    for (int v = 0; v < kPacks; ++v) {
      add_within<0>(Within(chunk, 0, v, lane, kLanes), sums);
      if constexpr (kHalves == 2) add_within<pairs(8)>(Within(chunk, 8, v, lane, kLanes), sums);
    }
  } else if constexpr (kHalves == 2) {
#pragma unroll 1
    for (int v = 0; v < kPacks; ++v) add_between(Within(chunk, 0, v, lane, kLanes), chunk, v, lane, kLanes, sums);
  }

#pragma unroll
  for (int n = 0; n < kSums; ++n)
    for (int step = kWarp / 2; step; step /= 2) sums[n] += __shfl_xor_sync(kAllLanes, sums[n], step);
  A* scratch = shared_memory<A>();
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int n = 0; n < kSums; ++n) scratch[threadIdx.x / kWarp * kSums + n] = sums[n];
  __syncthreads();
  if (lane >= kSums) return;
  A total = 0;
  for (int warp = 0; warp < kLanes / kWarp; ++warp) total += scratch[(half * (kLanes / kWarp) + warp) * kSums + lane];
  int a, b;
  find_pair_of<Count>(half, lane, a, b);
  if (b < p.count) static_cast<A*>(p.tables.partials)[(a * p.count + b) * p.tables.num_chunks + blockIdx.x] = total;
}

// One block per group and pair.
template <typename A>
__global__ __launch_bounds__(kListThreads) void add_chunk_products(const __grid_constant__ ChunkedObjectives p) {
  const int64_t group = blockIdx.x / pairs(p.count);
  int a, b;
  find_pair(blockIdx.x % pairs(p.count), p.count, a, b);
  const A* partials = static_cast<const A*>(p.tables.partials) + (a * p.count + b) * p.tables.num_chunks;
  const int64_t* begin = p.tables.group_begin + group;
  A sum[1] = {};
  for (int64_t c = begin[0] + threadIdx.x; c < begin[1]; c += kListThreads) sum[0] += partials[c];
  sum_over(kListThreads, sum, shared_memory<A>());
  A* out = static_cast<A*>(p.gramian) + group * p.count * p.count;
  if (threadIdx.x == 0) out[a * p.count + b] = out[b * p.count + a] = sum[0];
}

template <typename T, int Count>
const char* sum_chunks(const ChunkedObjectives& p, void* stream) {
  auto sum = p.tables.aligned ? chunk_products<T, true, Count> : chunk_products<T, false, Count>;
  int scratch = kListThreads / kWarp * Split<Count>::kSums * static_cast<int>(sizeof(Compute<T>));
  return launch(sum, p.tables.num_chunks, kListThreads, scratch, stream, p);
}

}  // namespace

const char* gramian(const Objectives& given, const Allocate& allocate, void* stream) {
  const char* error = nullptr;
  const auto tables = tables_of({given, given.count * given.count}, allocate, stream, error);
  if (error) return error;
  const ChunkedObjectives p(given, tables->device);
  return dispatch(given.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const char* error = p.count == 2   ? sum_chunks<T, 2>(p, stream)
                        : p.count <= 4 ? sum_chunks<T, 4>(p, stream)
                        : p.count <= 8 ? sum_chunks<T, 8>(p, stream)
                                       : sum_chunks<T, 16>(p, stream);
    if (error) return error;
    return launch(add_chunk_products<A>, p.num_groups * pairs(p.count), kListThreads, scratch_bytes<A>(1, kListThreads),
                  stream, p);
  });
}

}  // namespace dgs::cuda
