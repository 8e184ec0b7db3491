// surgery_adamw_ on a GPU: project_align_'s chunks, with the AdamW update in place of the write, so that the
// projected gradient never reaches memory. Where every group fits a cluster, one launch reads gradient,
// directions, parameter and moments once and writes three; otherwise the sums come first: 3 + 9 streams.
#include "chunks.cuh"

namespace dgs::cuda {
namespace {

struct Step {
  ListGrid grid;
  AdamW options;
};

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads, 1) void adamw_chunks(const __grid_constant__ Step p) {
  using A = Compute<T>;
  ChunkOf<T, Aligned> chunk = chunk_of_block<T, Aligned>(p.grid);
  Share<T, Aligned> share;
  A k = read_and_project(p.grid, chunk, share);
  const AdamW& o = p.options;
  A decay = A(1 - o.lr * o.weight_decay), beta2 = A(o.beta2), eps = A(o.eps);
  A fresh1 = A(1 - o.beta1), fresh2 = A(1 - o.beta2);
  const TensorEntry& tensor = *chunk.tensor;
  T* param = chunk.at(static_cast<T*>(tensor.param));
  T* exp_avg = chunk.at(static_cast<T*>(tensor.exp_avg));
  T* exp_avg_sq = chunk.at(static_cast<T*>(tensor.exp_avg_sq));
  A step_size = A(tensor.step_size), correction_root = A(tensor.correction_root);
#pragma unroll
  for (int v = 0; v < Share<T, Aligned>::kPacks; ++v) {
    auto read = [&](const T* row) { return load<T, Aligned>(row, v, threadIdx.x, kListThreads, chunk.count, chunk.wide); };
    auto write = [&](T* row, const Pack<T>& pack) {
      store<T, Aligned>(row, pack, v, threadIdx.x, kListThreads, chunk.count, chunk.wide);
    };
    Pack<T> params = read(param), first = read(exp_avg), second = read(exp_avg_sq);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      A g = share.updated(v, j, k, p.grid.list.rule);
      if (o.maximize) g = -g;
      A m = widen(first.at[j]);
      m += fresh1 * (g - m);
      A s = beta2 * widen(second.at[j]) + fresh2 * g * g;
      A x = decay * widen(params.at[j]) - step_size * (m / (sqrt(s) / correction_root + eps));
      narrow(m, first.at[j]);
      narrow(s, second.at[j]);
      narrow(x, params.at[j]);
    }
    write(param, params);
    write(exp_avg, first);
    write(exp_avg_sq, second);
  }
  cluster_done(p.grid.cluster);
}

template <typename T, bool Aligned>
const char* run(const Step& step, void* stream) {
  int scratch = scratch_bytes<Compute<T>>(kGroupSums, kListThreads);
  return launch(adamw_chunks<T, Aligned>, step.grid.blocks(), kListThreads, scratch, stream, step, step.grid.cluster);
}

}  // namespace

const char* surgery_adamw_(const TensorList& list, const AdamW& options, void* stream) {
  Step step{lay_out(list), options};
  if (!step.grid.cluster && list.part != Part::apply) {
    TensorList sums = list;
    sums.part = Part::sums;
    if (const char* error = project_align_(sums, stream)) return error;
  }
  return dispatch(list.dtype, [&](auto zero) {
    using T = decltype(zero);
    return list.aligned ? run<T, true>(step, stream) : run<T, false>(step, stream);
  });
}

}  // namespace dgs::cuda
