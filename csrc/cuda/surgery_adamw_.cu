// surgery_adamw_ on a GPU: project_align_'s chunks, with the AdamW update in place of the write, so that the
// projected gradient never reaches memory. Where every group fits a cluster, one launch reads gradient,
// directions, parameter and moments once and writes three; otherwise the sums come first: 3 + 9 streams.
#include "chunks.cuh"

namespace dgs::cuda {
namespace {

struct Step {
  ChunkedList list;
  double decay, fresh1, beta2, fresh2;
  // The rates of all tensors alike,
  Rates rates;
  // or, if not null, those of each of the table's tensors.
  const Rates* rates_of;
  bool maximize;
};

template <typename T, bool Aligned>
__global__ __launch_bounds__(kListThreads, kListBlocks<T>) void adamw_chunks(const __grid_constant__ Step p) {
  using A = Compute<T>;
  const ChunkOf<T, Aligned> chunk = chunk_of_block<T, Aligned>(p.list);
  const ListTensor& tensor = *chunk.tensor;
  T* param = chunk.at(static_cast<T*>(tensor.param));
  T* exp_avg = chunk.at(static_cast<T*>(tensor.exp_avg));
  T* exp_avg_sq = chunk.at(static_cast<T*>(tensor.exp_avg_sq));
  // They arrive while the gradient is read, and in a cluster while its sums are taken.
  for (const T* array : {param, exp_avg, exp_avg_sq}) prefetch(array, chunk.count);
  const SurgeryOptions<A> options = options_of<A>(p.list);
  A sums[group_sums] = {};
  Share<T, Aligned> share;
  chunk.read(share, options, sums);
  const A k = project(p.list, chunk, options, sums);
  A decay = A(p.decay), fresh1 = A(p.fresh1), beta2 = A(p.beta2), fresh2 = A(p.fresh2);
  Rates rates = p.rates_of ? p.rates_of[chunk.place] : p.rates;
  A step_size = A(rates.size), eps = A(rates.eps);
#pragma unroll
  for (int v = 0; v < Share<T, Aligned>::kPacks; ++v) {
    auto read = [&](const T* row) {
      return load<T, Aligned, true>(row, v, threadIdx.x, kListThreads, chunk.count, chunk.wide);
    };
    auto write = [&](T* row, const Pack<T>& pack) {
      store<T, Aligned, true>(row, pack, v, threadIdx.x, kListThreads, chunk.count, chunk.wide);
    };
    Pack<T> params = read(param), first = read(exp_avg), second = read(exp_avg_sq);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      A g = share.updated(v, j, k);
      if (p.maximize) g = -g;
      A m = element(first, j);
      m += fresh1 * (g - m);
      A s = beta2 * element(second, j) + fresh2 * g * g;
      A x = decay * element(params, j) - step_size * quick_quotient(m, quick_root(s) + eps);
      narrow(m, first.at[j]);
      narrow(s, second.at[j]);
      narrow(x, params.at[j]);
    }
    write(param, params);
    write(exp_avg, first);
    write(exp_avg_sq, second);
  }
  cluster_done(p.list.cluster);
}

// The rates in the order of the table, on the device.
std::shared_ptr<void> send_rates(const AdamW& options, const std::vector<int64_t>& order, const Allocate& allocate,
                                 void* stream, const char*& error) {
  std::vector<Rates> sorted;
  for (int64_t i : order) sorted.push_back(options.rates[i]);
  const int64_t bytes = sorted.size() * sizeof(Rates);
  std::shared_ptr<void> memory = allocate(bytes, Lifetime::call);
  error = write_bytes(memory.get(), sorted.data(), bytes, stream);
  return memory;
}

}  // namespace

const char* surgery_adamw_(const TensorList& given, const AdamW& o, const Allocate& allocate, void* stream) {
  const char* error = nullptr;
  const auto tables = tables_of({given, group_sums}, allocate, stream, error);
  if (error) return error;
  std::shared_ptr<void> rates;
  if (!o.all_alike) rates = send_rates(o, tables->order, allocate, stream, error);
  return dispatch(given.dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    auto update = tables->device.aligned ? adamw_chunks<T, true> : adamw_chunks<T, false>;
    const int scratch = scratch_bytes<Compute<T>>(group_sums, kListThreads);
    if (error) return error;
    return surgery_on_list(given, *tables, lay_out(given, tables->device, update, scratch), stream,
                           [&](const ChunkedList& list) {
                             const Step step{list,
                                             1 - o.lr * o.weight_decay,
                                             1 - o.beta1,
                                             o.beta2,
                                             1 - o.beta2,
                                             o.rates[0],
                                             static_cast<const Rates*>(rates.get()),
                                             o.maximize};
                             return launch(update, list.blocks(), kListThreads, scratch, stream, step, list.cluster);
                           });
  });
}

}  // namespace dgs::cuda
