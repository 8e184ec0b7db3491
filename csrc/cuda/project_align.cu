// project_align on a GPU: one launch, every element read once and written once.
//
// A row belongs to 1 to 512 threads, or to a cluster of up to 8 blocks of 512 that add up their sums through
// distributed shared memory; either way it stays in registers between the inner products and the update.
// Rows that are longer still, and long rows on devices without clusters, take the plain twin: one block per
// row, which reads it twice, the second time mostly from L2.
#include "share.cuh"

namespace dgs::cuda {
namespace {

constexpr int kThreads = 128;      // where a row needs at most a warp
constexpr int kTwinThreads = 256;  // of the plain twin

struct Rows {
  ProjectAlign args;
  int lanes;    // threads per row and block
  int cluster;  // blocks per row
};

template <typename A>
__device__ __forceinline__ SurgeryOptions<A> options_of(const ProjectAlign& args) {
  A scale = args.scale ? *static_cast<const A*>(args.scale) : A(1);
  return {A(args.alignment) * scale, A(args.eps), args.order, args.rule};
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

template <typename T, bool Aligned>
__global__ __launch_bounds__(kMaxThreads) void rows_in_registers(const __grid_constant__ Rows p) {
  using A = Compute<T>;
  A* scratch = shared_memory<A>();
  int lane = threadIdx.x % p.lanes;
  int rows_per_block = blockDim.x / p.lanes;
  int64_t row = int64_t(blockIdx.x / p.cluster) * rows_per_block + threadIdx.x / p.lanes;
  int64_t begin = int64_t(blockIdx.x % p.cluster) * p.lanes * kShare<T, Aligned>;
  // A thread without a row takes part in the sums all the same.
  int64_t count = row < p.args.rows ? p.args.dim - begin : 0;
  Row<T> at(p.args, row < p.args.rows ? row : 0, begin);
  SurgeryOptions<A> options = options_of<A>(p.args);

  Share<T, Aligned> share;
  A sums[2] = {};
  share.read(at.grad, at.harmful, at.beneficial, count, lane, p.lanes, options, sums);
  sum_over(p.lanes, sums, scratch);
  sum_over_cluster(p.cluster, sums, scratch + kMaxThreads / kWarp * 2);
  A k = projection(sums[0], sqrt(sums[1]), options.eps, options.rule);
  share.write(at.out, k, count, lane, p.lanes, options.rule);
  cluster_done(p.cluster);
}

template <typename T, bool Aligned>
__global__ __launch_bounds__(kTwinThreads, 1) void rows_read_twice(const __grid_constant__ Rows p) {
  using A = Compute<T>;
  Row<T> at(p.args, blockIdx.x, 0);
  SurgeryOptions<A> options = options_of<A>(p.args);
  constexpr int64_t kStep = kTwinThreads * kShare<T, Aligned>;
  A sums[2] = {};
  Share<T, Aligned> share;
  for (int64_t i = 0; i < p.args.dim; i += kStep)
    share.read(at.grad + i, at.harmful + i, at.beneficial ? at.beneficial + i : nullptr, p.args.dim - i, threadIdx.x,
               kTwinThreads, options, sums);
  sum_over(kTwinThreads, sums, shared_memory<A>());
  A k = projection(sums[0], sqrt(sums[1]), options.eps, options.rule);
  for (int64_t i = 0; i < p.args.dim; i += kStep) {
    share.read(at.grad + i, at.harmful + i, at.beneficial ? at.beneficial + i : nullptr, p.args.dim - i, threadIdx.x,
               kTwinThreads, options, sums);
    share.write(at.out + i, k, p.args.dim - i, threadIdx.x, kTwinThreads, options.rule);
  }
}

template <typename T, bool Aligned>
const char* run(const ProjectAlign& args, void* stream) {
  int64_t shares = ceil_div(args.dim, kShare<T, Aligned>);
  int lanes = power_of_two(shares, kMaxThreads);
  int cluster = power_of_two(ceil_div(shares, kMaxThreads), kMaxCluster);
  int scratch = scratch_bytes<Compute<T>>(2, kMaxThreads);
  Rows rows{args, lanes, cluster};
  bool fits = shares <= int64_t(lanes) * cluster && (cluster == 1 || has_clusters());
  if (!fits) return launch(rows_read_twice<T, Aligned>, args.rows, kTwinThreads, scratch, stream, rows);
  int threads = lanes > kWarp ? lanes : kThreads;
  int64_t blocks = ceil_div(args.rows, threads / lanes) * cluster;
  return launch(rows_in_registers<T, Aligned>, blocks, threads, scratch, stream, rows, cluster);
}

}  // namespace

const char* project_align(const ProjectAlign& args, void* stream) {
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t size = sizeof(T);
    bool aligned = args.dim * size % 16 == 0 && is_aligned(args.grad, args.grad_stride * size) &&
                   is_aligned(args.harmful, args.harmful_stride * size) &&
                   is_aligned(args.beneficial, args.beneficial_stride * size) &&
                   is_aligned(args.out, args.out_stride * size);
    return aligned ? run<T, true>(args, stream) : run<T, false>(args, stream);
  });
}

}  // namespace dgs::cuda
