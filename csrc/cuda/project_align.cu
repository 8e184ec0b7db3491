// project_align on a GPU: one launch, every element read once and written once, save in rows that are too long.
//
// A row belongs to 1 to 512 threads, or to a cluster of up to 8 blocks of 512 that add up their sums through
// distributed shared memory; either way it stays in registers between the inner products and the update. A thread has
// much of a row where there are rows enough, which saves adding up, and a single pack where there are few, which saves
// time.
// Rows that are longer still, and long rows where there are no clusters, are cut into parts, one block's each: a first
// launch leaves the parts' sums, and a second, every block of which adds up those of its row, reads the row again.
#include "share.cuh"

namespace dgs::cuda {
namespace {

// Threads of a block where a row needs at most a warp.
constexpr int kThreads = 128;
// Threads on a part of a long row.
constexpr int kPartThreads = 256;
// Threads that are at work at once, about, on 132 multiprocessors. The device is not asked: results depend on sizes
// alone.
constexpr int64_t kAtOnce = 132 << 10;
// Enough for every multiprocessor to have several, and few enough for each block to add up all sums of its row.
constexpr int64_t kMostParts = 512;
// The sums of a row: <x, h> and <h, h>.
constexpr int kSums = 2;

struct Rows {
  ProjectAlign args;
  // Threads per row and block.
  int lanes;
  // Blocks per row.
  int cluster;
};

struct LongRows {
  ProjectAlign args;
  // How many parts a row has, and the elements of one.
  int64_t parts, part_size;
  // [rows, parts, kSums] of the compute type.
  void* partials;
};

template <typename A>
__device__ __forceinline__ SurgeryOptions<A> options_of(const ProjectAlign& args) {
  A scale = args.scale ? *static_cast<const A*>(args.scale) : A(1);
  return {A(args.alignment) * scale, A(args.eps), args.order, args.rule};
}

template <typename A>
__device__ __forceinline__ A share_of(const A (&sums)[kSums], const SurgeryOptions<A>& options) {
  return projection(sums[0], sqrt(sums[1]), options.eps, options.rule);
}

template <typename T>
struct Row {
  const T *grad, *harmful, *beneficial;
  T* out;
  __device__ __forceinline__ Row(const ProjectAlign& a, int64_t row, int64_t begin)
      : grad(static_cast<const T*>(a.grad) + row * a.grad_stride + begin),
        harmful(static_cast<const T*>(a.harmful) + row * a.harmful_stride + begin),
        beneficial(a.beneficial ? static_cast<const T*>(a.beneficial) + row * a.beneficial_stride + begin : nullptr),
        out(static_cast<T*>(a.out) + row * a.out_stride + begin) {}
};

template <typename T, bool Aligned, int Packs>
__global__ __launch_bounds__(kMaxThreads) void rows_in_registers(const __grid_constant__ Rows p) {
  using A = Compute<T>;
  A* scratch = shared_memory<A>();
  int lane = threadIdx.x % p.lanes;
  int rows_per_block = blockDim.x / p.lanes;
  int64_t row = int64_t(blockIdx.x / p.cluster) * rows_per_block + threadIdx.x / p.lanes;
  int64_t begin = int64_t(blockIdx.x % p.cluster) * p.lanes * Packs * kPack<T>;
  // A thread without a row takes part in the sums all the same.
  int64_t count = row < p.args.rows ? p.args.dim - begin : 0;
  Row<T> at(p.args, row < p.args.rows ? row : 0, begin);
  SurgeryOptions<A> options = options_of<A>(p.args);

  Share<T, Aligned, Packs> share;
  A sums[kSums] = {};
  share.read(at.grad, at.harmful, at.beneficial, count, lane, p.lanes, options, sums);
  sum_over(p.lanes, sums, scratch);
  sum_over_cluster(p.cluster, sums, scratch + kMaxThreads / kWarp * kSums);
  share.write(at.out, share_of(sums, options), count, lane, p.lanes);
  cluster_done(p.cluster);
}

// A part of a row: consecutive numbers of it, one block's.
template <typename T, bool Aligned>
struct PartOfRow {
  static constexpr int64_t kStep = kPartThreads * kShare<T, Aligned>;
  Row<T> at;
  int64_t row, part, count;

  __device__ __forceinline__ explicit PartOfRow(const LongRows& p)
      : at(p.args, blockIdx.x / p.parts, blockIdx.x % p.parts * p.part_size),
        row(blockIdx.x / p.parts),
        part(blockIdx.x % p.parts),
        count(p.args.dim - part * p.part_size < p.part_size ? p.args.dim - part * p.part_size : p.part_size) {}

  __device__ __forceinline__ void read(Share<T, Aligned>& share, int64_t i, const SurgeryOptions<Compute<T>>& options,
                                       Compute<T> (&sums)[kSums]) const {
    share.read(at.grad + i, at.harmful + i, at.beneficial ? at.beneficial + i : nullptr, count - i, threadIdx.x,
               kPartThreads, options, sums);
  }
};

template <typename T, bool Aligned>
__global__ __launch_bounds__(kPartThreads, 1) void sum_row_parts(const __grid_constant__ LongRows p) {
  using A = Compute<T>;
  const PartOfRow<T, Aligned> part(p);
  const SurgeryOptions<A> options = options_of<A>(p.args);
  A sums[kSums] = {};
  Share<T, Aligned> share;
  for (int64_t i = 0; i < part.count; i += part.kStep) part.read(share, i, options, sums);
  sum_over(kPartThreads, sums, shared_memory<A>());
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < kSums; ++n) static_cast<A*>(p.partials)[int64_t(blockIdx.x) * kSums + n] = sums[n];
}

template <typename T, bool Aligned>
__global__ __launch_bounds__(kPartThreads, 1) void project_row_parts(const __grid_constant__ LongRows p) {
  using A = Compute<T>;
  const PartOfRow<T, Aligned> part(p);
  const SurgeryOptions<A> options = options_of<A>(p.args);
  const A* partials = static_cast<const A*>(p.partials) + part.row * p.parts * kSums;
  A sums[kSums] = {}, unused[kSums] = {};
#pragma unroll
  for (int v = 0; v < kMostParts / kPartThreads; ++v) {
    const int n = v * kPartThreads + threadIdx.x;
#pragma unroll
    for (int k = 0; k < kSums; ++k)
      if (n < p.parts) sums[k] += partials[n * kSums + k];
  }
  sum_over(kPartThreads, sums, shared_memory<A>());
  const A k = share_of(sums, options);
  Share<T, Aligned> share;
  for (int64_t i = 0; i < part.count; i += part.kStep) {
    part.read(share, i, options, unused);
    share.write(part.at.out + i, k, part.count - i, threadIdx.x, kPartThreads);
  }
}

template <typename T, bool Aligned>
const char* run_in_parts(const ProjectAlign& args, const Allocate& allocate, void* stream) {
  using A = Compute<T>;
  constexpr int64_t kStep = PartOfRow<T, Aligned>::kStep;
  const int64_t part_size = ceil_div(ceil_div(args.dim, kMostParts), kStep) * kStep;
  const int64_t parts = ceil_div(args.dim, part_size);
  const auto partials = allocate(args.rows * parts * kSums * sizeof(A), Lifetime::call);
  const LongRows rows{args, parts, part_size, partials.get()};
  const int scratch = scratch_bytes<A>(kSums, kPartThreads);
  const char* error = launch(sum_row_parts<T, Aligned>, args.rows * parts, kPartThreads, scratch, stream, rows);
  if (error) return error;
  return launch(project_row_parts<T, Aligned>, args.rows * parts, kPartThreads, scratch, stream, rows);
}

// Threads for a row of so many shares: a power of two that divides a warp, or whole warps.
int64_t lanes_for(int64_t shares) {
  return shares <= kWarp ? power_of_two(shares, kWarp) : ceil_div(shares, kWarp) * kWarp;
}

template <typename T, bool Aligned, int Packs>
const char* run_in_registers(const ProjectAlign& args, const Allocate& allocate, void* stream) {
  const int64_t shares = ceil_div(args.dim, Packs * kPack<T>);
  const int cluster = static_cast<int>(ceil_div(shares, kMaxThreads));
  const int lanes = static_cast<int>(lanes_for(ceil_div(shares, cluster)));
  const int threads = lanes > kWarp ? lanes : kThreads;
  const int64_t blocks = ceil_div(args.rows, threads / lanes) * cluster;
  const int scratch = scratch_bytes<Compute<T>>(kSums, kMaxThreads);
  const auto kernel = rows_in_registers<T, Aligned, Packs>;
  if (cluster > kMaxCluster || !grants_cluster(reinterpret_cast<const void*>(kernel), cluster, threads, scratch))
    return run_in_parts<T, Aligned>(args, allocate, stream);
  return launch(kernel, blocks, threads, scratch, stream, Rows{args, lanes, cluster}, cluster);
}

template <typename T, bool Aligned>
const char* run(const ProjectAlign& args, const Allocate& allocate, void* stream) {
  // The most packs that need no more registers.
  constexpr int kFull = Aligned && sizeof(T) == 8 ? 6 : kShare<T, Aligned> / kPack<T>;
  const int64_t packs = ceil_div(args.dim, kPack<T>), shares = ceil_div(packs, kFull);
  if constexpr (Aligned) {
    if (packs <= kMaxThreads && args.rows * lanes_for(packs) <= kAtOnce)
      return run_in_registers<T, true, 1>(args, allocate, stream);
  }
  // Rows that fit six packs a thread better than eight, as 768 numbers do, leave no thread with empty ones.
  constexpr int kLess = kFull * 3 / 4;
  if constexpr (Aligned && sizeof(T) != 8) {
    const int64_t less = ceil_div(packs, kLess);
    if (less <= kMaxThreads && lanes_for(less) * kLess < lanes_for(shares) * kFull)
      return run_in_registers<T, true, kLess>(args, allocate, stream);
  }
  return run_in_registers<T, Aligned, kFull>(args, allocate, stream);
}

}  // namespace

const char* project_align(const ProjectAlign& args, const Allocate& allocate, void* stream) {
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t size = sizeof(T);
    bool aligned = args.dim * size % 16 == 0 && is_aligned(args.grad, args.grad_stride * size) &&
                   is_aligned(args.harmful, args.harmful_stride * size) &&
                   is_aligned(args.beneficial, args.beneficial_stride * size) &&
                   is_aligned(args.out, args.out_stride * size);
    return aligned ? run<T, true>(args, allocate, stream) : run<T, false>(args, allocate, stream);
  });
}

}  // namespace dgs::cuda
