// SurgeryAdamW's step on a GPU: project_align_'s chunks, with the AdamW update in place of the write, so that the
// projected gradient never reaches memory. Where every group fits a cluster, one launch reads gradient,
// directions, parameter and moments once and writes three; otherwise the sums come first: 3 + 9 streams.
#include "chunks.cuh"

namespace dgs::cuda {
namespace {

struct Step {
  ListGrid grid;
  AdamW options;
};

// What is the same for all elements of a tensor.
template <typename A>
struct Rates {
  A decay, step_size, second_correction_root;
};

// One thread of a block computes them, in double as torch has it. They stay in shared memory, to leave the
// registers to the arrays.
template <typename A>
__device__ __forceinline__ const Rates<A>& rates_at(const AdamW& o, const float* step_count, Rates<A>* rates) {
  if (threadIdx.x == 0) {
    double lr = o.lr_tensor ? *o.lr_tensor : o.lr, step = *step_count;
    rates->decay = A(lr) * A(o.weight_decay);
    rates->step_size = A(lr) / A(1 - pow(o.beta1, step));
    rates->second_correction_root = sqrt(A(1 - pow(o.beta2, step)));
  }
  __syncthreads();
  return *rates;
}

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads) void adamw_chunks(const __grid_constant__ Step p) {
  using A = Compute<T>;
  ChunkOf<T, Aligned> chunk = chunk_of_block<T, Aligned>(p.grid);
  auto* shared = shared_memory<unsigned char>() + scratch_bytes<A>(3, kListThreads);
  const Rates<A>& rates = rates_at(p.options, chunk.tensor->step, reinterpret_cast<Rates<A>*>(shared));
  Share<T, Aligned> share;
  A k = read_and_project(p.grid, chunk, share);
  A beta1 = A(p.options.beta1), beta2 = A(p.options.beta2), eps = A(p.options.eps);
  const TensorEntry& tensor = *chunk.tensor;
  T* param = chunk.at(static_cast<T*>(tensor.param));
  T* exp_avg = chunk.at(static_cast<T*>(tensor.exp_avg));
  T* exp_avg_sq = chunk.at(static_cast<T*>(tensor.exp_avg_sq));
  T* max_exp_avg_sq = chunk.at(static_cast<T*>(tensor.max_exp_avg_sq));
#pragma unroll
  for (int v = 0; v < Share<T, Aligned>::kPacks; ++v) {
    auto read = [&](const T* row) { return load<T, Aligned>(row, v, threadIdx.x, kListThreads, chunk.count, chunk.wide); };
    auto write = [&](T* row, const Pack<T>& pack) {
      store<T, Aligned>(row, pack, v, threadIdx.x, kListThreads, chunk.count, chunk.wide);
    };
    Pack<T> params = read(param), first = read(exp_avg), second = read(exp_avg_sq), largest = read(max_exp_avg_sq);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      A g = share.updated(v, j, k, p.grid.list.rule);
      if (p.options.maximize) g = -g;
      A x = widen(params.at[j]);
      x -= rates.decay * x;
      A m = fma(beta1, widen(first.at[j]), fma(-beta1, g, g));
      A s = fma(beta2, widen(second.at[j]), fma(-beta2, g * g, g * g));
      narrow(m, first.at[j]);
      narrow(s, second.at[j]);
      if (max_exp_avg_sq) {
        A before = widen(largest.at[j]);
        s = s < before ? before : s;  // NaN stays
        narrow(s, largest.at[j]);
      }
      narrow(x - rates.step_size * m / (sqrt(s) / rates.second_correction_root + eps), params.at[j]);
    }
    write(param, params);
    write(exp_avg, first);
    write(exp_avg_sq, second);
    if (max_exp_avg_sq) write(max_exp_avg_sq, largest);
  }
  cluster_done(p.grid.cluster);
}

template <typename T, bool Aligned>
const char* run(const Step& step, void* stream) {
  int scratch = scratch_bytes<Compute<T>>(3, kListThreads) + int(sizeof(Rates<Compute<T>>));
  return launch(adamw_chunks<T, Aligned>, step.grid.blocks(), kListThreads, scratch, stream, step, step.grid.cluster);
}

}  // namespace

const char* surgery_adamw(const TensorList& list, const AdamW& options, void* stream) {
  Step step{lay_out(list), options};
  if (!step.grid.cluster)
    if (const char* error = group_sums(list, stream)) return error;
  return dispatch(list.dtype, [&](auto zero) {
    using T = decltype(zero);
    return list.aligned ? run<T, true>(step, stream) : run<T, false>(step, stream);
  });
}

}  // namespace dgs::cuda
