// gramian on a GPU: a block reads its chunk of every objective once and keeps the sums of all pairs in registers; a
// second launch adds up the chunks of each group in a fixed order.
#include "objectives.cuh"

namespace dgs::cuda {
namespace {

// Up to 8 objectives, every thread holds the sums of all pairs. With 16, a quarter of the block has the pairs within
// the first eight, one those within the last eight, and two those between them. All read the same numbers at about the
// same time, so that most of it comes from the L1 cache.
template <int Count>
constexpr int kParts = Count <= 8 ? 1 : 4;
template <int Count>
constexpr int kSums = pairs(Count <= 8 ? Count : 8);

// The n-th of the pairs a <= b of `count`.
__device__ __forceinline__ void find_pair(int n, int count, int& a, int& b) {
  for (a = 0; n >= count - a; ++a) n -= count - a;
  b = a + n;
}

// The pair that the n-th sum of a part is of; b is no objective where it is of none.
template <int Count>
__device__ __forceinline__ void find_pair_of(int part, int n, int& a, int& b) {
  if (part < 2) {
    find_pair(n, Count <= 8 ? Count : 8, a, b);
    a += 8 * part;
    b += 8 * part;
  } else {
    a = 4 * (part - 2) + n / 8;
    b = n < 32 ? 8 + n % 8 : max_objectives;
  }
}

// Packs of a thread from `Rows` objectives, `first` and those after it; beyond the last they are zeros.
template <typename T, bool Aligned, int Rows>
struct Packs {
  Pack<T> of[Rows];

  __device__ __forceinline__ Packs(const ObjectivesChunk<T, Aligned>& chunk, int first, int v, int lane, int lanes) {
#pragma unroll
    for (int k = 0; k < Rows; ++k)
      of[k] = load<T, Aligned, true>(chunk.objective(first + k), v, lane, lanes, chunk.count, chunk.wide);
  }
};

template <typename T, bool Aligned, int Rows, int N>
__device__ __forceinline__ void add_within(const Packs<T, Aligned, Rows>& x, Compute<T> (&sums)[N]) {
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    int n = 0;
#pragma unroll
    for (int a = 0; a < Rows; ++a)
#pragma unroll
      for (int b = a; b < Rows; ++b) sums[n++] += widen(x.of[a].at[j]) * widen(x.of[b].at[j]);
  }
}

template <typename T, bool Aligned, int Rows, int Columns, int N>
__device__ __forceinline__ void add_between(const Packs<T, Aligned, Rows>& x, const Packs<T, Aligned, Columns>& y,
                                            Compute<T> (&sums)[N]) {
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j)
#pragma unroll
    for (int a = 0; a < Rows; ++a)
#pragma unroll
      for (int b = 0; b < Columns; ++b) sums[a * Columns + b] += widen(x.of[a].at[j]) * widen(y.of[b].at[j]);
}

template <typename T, bool Aligned, int Count>
__global__ __launch_bounds__(kListThreads) void chunk_products(const __grid_constant__ ChunkedObjectives p) {
  using A = Compute<T>;
  constexpr int kLanes = kListThreads / kParts<Count>, kWarps = kLanes / kWarp, kNumbers = kSums<Count>;
  constexpr int kPacks = static_cast<int>(kChunk<T, Aligned>) / (kLanes * kPack<T>);
  // Packs of each objective that are on their way together.
  [[maybe_unused]] constexpr int kAtOnce = Aligned && Count < 8 ? 8 / Count : 1;
  const ObjectivesChunk<T, Aligned> chunk(p.tables, blockIdx.x);
  const int part = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  A sums[kNumbers] = {};
  if (kParts<Count> == 1 || part < 2) {
#pragma unroll kAtOnce
    for (int v = 0; v < kPacks; ++v)
      add_within(Packs<T, Aligned, Count <= 8 ? Count : 8>(chunk, 8 * part, v, lane, kLanes), sums);
  } else if constexpr (kParts<Count> == 4) {
#pragma unroll 1
    for (int v = 0; v < kPacks; ++v)
      add_between(Packs<T, Aligned, 4>(chunk, 4 * (part - 2), v, lane, kLanes),
                  Packs<T, Aligned, 8>(chunk, 8, v, lane, kLanes), sums);
  }

#pragma unroll
  for (int n = 0; n < kNumbers; ++n)
    for (int step = kWarp / 2; step; step /= 2) sums[n] += __shfl_xor_sync(kAllLanes, sums[n], step);
  A* scratch = shared_memory<A>();
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) scratch[threadIdx.x / kWarp * kNumbers + n] = sums[n];
  __syncthreads();
  if (lane >= kNumbers) return;
  A total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[(part * kWarps + warp) * kNumbers + lane];
  int a, b;
  find_pair_of<Count>(part, lane, a, b);
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
  int scratch = kListThreads / kWarp * kSums<Count> * static_cast<int>(sizeof(Compute<T>));
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
