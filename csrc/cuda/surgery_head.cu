// surgery_head on a GPU. The forward reads the three feature matrices once: a row's dot products need all of it,
// and then its weighted sum into the head gradients needs it again, so it waits in shared memory, where the next
// row is on its way meanwhile. Every chunk of rows leaves partial sums, and a second, small launch adds them up in
// a fixed order. The backward reads no matrix, but for the differences that a distillation loss has left: a row of
// the result is a combination of D-vectors that a block keeps in registers while it writes.
#include <cuda_pipeline.h>

#include "common.cuh"

namespace dgs::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxChunks = 264;  // two blocks for each of the 132 multiprocessors that large GPUs have, all at once
// Rows at a time, of a warp each: with two stages 72 KiB in fp32. No device since sm_80 gives a block less than 99,
// and large ones have room for two such blocks, with all the registers that a thread can have.
constexpr int kTeams = 4;
constexpr int kStages = 2;
constexpr int kRowsPerBlock = 64;  // of the backward: what a block reads is small beside what it writes

// Elements of a row per thread, whose two sums in the compute type stay in registers. A warp then has
// exactly a row of 768, CLIP ViT-L's.
template <typename T, bool Aligned>
constexpr int kHeadShare = Aligned && sizeof(T) < 8 ? 24 : 8;

// Of one row, and then summed over rows.
enum Dots { kImage, kText, kTeacher, kTeacherFalling, kTeacherRising, kNumDots };
enum Scalars { kImageLoss, kTextLoss, kAlignmentLoss, kDistillationLoss, kImageResidual, kTextResidual, kNumScalars };

template <typename A>
__device__ __forceinline__ A sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}
// Binary cross-entropy of a logit.
template <typename A>
__device__ __forceinline__ A cross_entropy(A logit, A label) {
  return positive_part(logit) - logit * label + log1p(exp(-fabs(logit)));
}

struct Forward {
  SurgeryHead args;
  int lanes;         // threads per row
  int staged_bytes;  // of shared memory, for rows
  int64_t chunk_rows, chunks;
};

__host__ __device__ inline int64_t partial_size(int64_t dim) { return 2 * dim + kNumScalars; }

// Writes what the forward leaves of one sample and adds to the scalars; called by all threads of the row.
template <typename A>
__device__ __forceinline__ void judge(const SurgeryHead& p, int64_t row, bool writes, const A (&dots)[kNumDots],
                                      A (&scalars)[kNumScalars], A& image_residual, A& text_residual) {
  A label = static_cast<const A*>(p.labels)[row];
  if (!(label >= 0 && label <= 1)) label = A(NAN);  // no label, and nothing here can raise an error
  A image = dots[kImage] + *static_cast<const A*>(p.image_bias);
  A teacher = dots[kTeacher] + *static_cast<const A*>(p.teacher_bias);
  A text = p.text_features ? dots[kText] + *static_cast<const A*>(p.text_bias) : A(0);
  A judged = image + (p.expert ? text : A(0)) + (p.offsets ? static_cast<const A*>(p.offsets)[row] : A(0));
  A teacher_residual = sigmoid(teacher) - label;
  image_residual = sigmoid(judged) - label;
  text_residual = p.text_features ? sigmoid(text) - label : A(0);
  scalars[kImageLoss] += cross_entropy(judged, label);
  scalars[kTextLoss] += p.text_features ? cross_entropy(text, label) : A(0);
  // |c| <f, min(+-w, 0)>: the sign of the weight is that of the residual.
  scalars[kAlignmentLoss] +=
      teacher_residual > 0 ? teacher_residual * dots[kTeacherFalling] : -teacher_residual * dots[kTeacherRising];
  scalars[kImageResidual] += image_residual;
  scalars[kTextResidual] += text_residual;
  if (!writes) return;
  A* logits = static_cast<A*>(p.logits) + row;
  A* residuals = static_cast<A*>(p.residuals) + row;
  logits[0] = image, logits[p.batch] = text, logits[2 * p.batch] = teacher;
  residuals[0] = image_residual, residuals[p.batch] = text_residual, residuals[2 * p.batch] = teacher_residual;
}

template <typename A>
__device__ __forceinline__ void add_dots(A f, A t, A x, A image_weight, A teacher_weight, A text_weight,
                                         A (&dots)[kNumDots]) {
  dots[kImage] += f * image_weight;
  dots[kText] += x * text_weight;
  dots[kTeacher] += t * teacher_weight;
  dots[kTeacherFalling] += f * negative_part(teacher_weight);
  dots[kTeacherRising] += f * negative_part(-teacher_weight);
}

// f - t, as it stays for the backward; its square is added to `distance`.
template <typename T>
__device__ __forceinline__ T subtract(T f, T t, Compute<T>& distance) {
  Compute<T> difference = widen(f) - widen(t);
  distance += difference * difference;
  T stored;
  narrow(difference, stored);
  return stored;
}

// Weights of the compute type, at the places where load() takes features.
template <typename T, bool Aligned>
__device__ __forceinline__ void load_weights(const void* weights, int v, int lane, int lanes, int64_t count,
                                             Compute<T> (&out)[kPack<T>]) {
  using A = Compute<T>;
  const A* w = static_cast<const A*>(weights);
  if constexpr (Aligned) {
    int i = position<T, true>(v, 0, lane, lanes);
#pragma unroll
    for (int k = 0; k < kPack<T>; k += kPack<A>) {
      uint4 bits = w && i < count ? *reinterpret_cast<const uint4*>(w + i + k) : uint4{0, 0, 0, 0};
      memcpy(out + k, &bits, 16);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      int i = position<T, false>(v, j, lane, lanes);
      out[j] = w && i < count ? w[i] : A(0);
    }
  }
}

// A thread's own places in shared memory for its packs of a row, kStages rows in turn. It fetches and takes them
// itself, so there is nothing to wait for but its own copies.
template <typename T, int kPacks>
class Stages {
  uint4* const memory_ = shared_memory<uint4>() + threadIdx.x;

  __device__ uint4* place(int stage, int matrix, int v) const {
    return memory_ + ((stage * 3 + matrix) * kPacks + v) * blockDim.x;
  }

 public:
  // Nothing of a null row, nor of what lies beyond `count`.
  __device__ void fetch(int stage, int matrix, const T* row, int lane, int lanes, int64_t count) const {
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      int i = position<T, true>(v, 0, lane, lanes);
      if (row && i < count) __pipeline_memcpy_async(place(stage, matrix, v), row + i, 16);
    }
  }
  __device__ Pack<T> take(int stage, int matrix, int v, int lane, int lanes, int64_t count) const {
    uint4 bits = position<T, true>(v, 0, lane, lanes) < count ? *place(stage, matrix, v) : uint4{0, 0, 0, 0};
    Pack<T> pack;
    memcpy(&pack, &bits, 16);
    return pack;
  }
};

// Not staged, it is the plain twin: rows wait in registers, and nothing is fetched ahead. For rows without 16-byte
// accesses, and for those of more threads than the stages have room for.
template <typename T, bool Aligned, bool Staged>
__global__ __launch_bounds__(Staged ? kTeams * kWarp : kThreads,
                             Staged ? 2 : 1) void head_rows(const __grid_constant__ Forward p) {
  using A = Compute<T>;
  constexpr int kShare = kHeadShare<T, Aligned>, kPacks = kShare / kPack<T>;
  const SurgeryHead& a = p.args;
  int lane = threadIdx.x % p.lanes, team = threadIdx.x / p.lanes, teams = blockDim.x / p.lanes;
  int scratch_size = blockDim.x / kWarp * kNumDots;
  const Stages<T, kPacks> stages;
  // Two, used in turn: one barrier per row is enough.
  A* scratch = reinterpret_cast<A*>(shared_memory<char>() + p.staged_bytes);
  const T* matrices[] = {static_cast<const T*>(a.features), static_cast<const T*>(a.text_features),
                         static_cast<const T*>(a.teacher_features)};
  const int64_t strides[] = {a.features_stride, a.text_stride, a.teacher_stride};

  A image_sum[kShare] = {}, text_sum[kShare] = {}, scalars[kNumScalars] = {};
  A distance[1] = {};  // of this thread's part of the rows
  int64_t begin = blockIdx.x * p.chunk_rows;
  int64_t end = begin + p.chunk_rows < a.batch ? begin + p.chunk_rows : a.batch;
  auto fetch = [&](int stage, int64_t row) {
#pragma unroll
    for (int m = 0; m < 3; ++m)
      if (row < end && matrices[m]) stages.fetch(stage, m, matrices[m] + row * strides[m], lane, p.lanes, a.dim);
    __pipeline_commit();
  };
  if constexpr (Staged) fetch(0, begin + team);
  int turn = 0;
  for (int64_t first = begin; first < end; first += teams, turn ^= 1) {
    int64_t row = first + team;
    bool mine = row < end;
    int64_t count = mine ? a.dim : 0;
    if constexpr (Staged) {
      fetch(turn ^ 1, row + teams);
      __pipeline_wait_prior(1);
    }
    auto take = [&](int matrix, int v) {
      int64_t there = matrices[matrix] ? count : 0;
      if constexpr (Staged)
        return stages.take(turn, matrix, v, lane, p.lanes, there);
      else
        return load<T, Aligned>(matrices[matrix] + (there ? row * strides[matrix] : 0), v, lane, p.lanes, there);
    };
    Pack<T> kept_f[kPacks], kept_x[kPacks];  // unless they stay on their stage
    A dots[kNumDots] = {};
#pragma unroll(Staged ? kPacks / 2 : kPacks)
    for (int v = 0; v < kPacks; ++v) {
      Pack<T> f = take(0, v), x = take(1, v), t = take(2, v);
      if constexpr (!Staged) kept_f[v] = f, kept_x[v] = x;
      A image_weight[kPack<T>], teacher_weight[kPack<T>], text_weight[kPack<T>];
      load_weights<T, Aligned>(a.image_weight, v, lane, p.lanes, a.dim, image_weight);
      load_weights<T, Aligned>(a.teacher_weight, v, lane, p.lanes, a.dim, teacher_weight);
      load_weights<T, Aligned>(a.text_weight, v, lane, p.lanes, a.dim, text_weight);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j)
        add_dots(element(f, j), element(t, j), element(x, j), image_weight[j], teacher_weight[j], text_weight[j], dots);
      if (a.differences) {
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) t.at[j] = subtract(f.at[j], t.at[j], distance[0]);
        store<T, Aligned>(static_cast<T*>(a.differences) + row * a.dim, t, v, lane, p.lanes, count);
      }
    }
    sum_over(p.lanes, dots, scratch + turn * scratch_size);
    A image_residual = 0, text_residual = 0;
    if (mine) judge(a, row, lane == 0, dots, scalars, image_residual, text_residual);
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      if constexpr (Staged) kept_f[v] = take(0, v), kept_x[v] = take(1, v);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        image_sum[v * kPack<T> + j] += image_residual * element(kept_f[v], j);
        text_sum[v * kPack<T> + j] += text_residual * element(kept_x[v], j);
      }
    }
  }
  sum_over(p.lanes, distance, scratch + turn * scratch_size);
  scalars[kDistillationLoss] = distance[0];

  // Every team's sums side by side, where the rows were, and then column by column.
  const int64_t size = partial_size(a.dim);
  A* partial = static_cast<A*>(a.workspace) + blockIdx.x * size;
  A* totals = shared_memory<A>();
  A* out = teams == 1 ? partial : totals + team * size;
  if constexpr (Staged) __pipeline_wait_prior(0);
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kPacks; ++v)
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      int i = position<T, Aligned>(v, j, lane, p.lanes);
      if (i >= a.dim) continue;
      out[i] = image_sum[v * kPack<T> + j];
      out[a.dim + i] = text_sum[v * kPack<T> + j];
    }
  if (lane == 0)
#pragma unroll
    for (int n = 0; n < kNumScalars; ++n) out[2 * a.dim + n] = scalars[n];
  if (teams == 1) return;
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    A sum = totals[i];
    for (int k = 1; k < teams; ++k) sum += totals[k * size + i];
    partial[i] = sum;
  }
}

// The plain twin for rows that do not fit a block's registers: it reads a chunk again for the weighted sums.
template <typename T>
__global__ __launch_bounds__(kThreads, 1) void head_read_twice(const __grid_constant__ Forward p) {
  using A = Compute<T>;
  const SurgeryHead& a = p.args;
  const T* features = static_cast<const T*>(a.features);
  const T* teacher = static_cast<const T*>(a.teacher_features);
  const T* text = static_cast<const T*>(a.text_features);
  const A* image_weight = static_cast<const A*>(a.image_weight);
  const A* teacher_weight = static_cast<const A*>(a.teacher_weight);
  const A* text_weight = static_cast<const A*>(a.text_weight);
  A* residuals = static_cast<A*>(a.residuals);
  int64_t begin = blockIdx.x * p.chunk_rows;
  int64_t end = begin + p.chunk_rows < a.batch ? begin + p.chunk_rows : a.batch;
  T* differences = static_cast<T*>(a.differences);
  A scalars[kNumScalars] = {}, distance[1] = {};
  for (int64_t row = begin; row < end; ++row) {
    A dots[kNumDots] = {};
    for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
      T f = features[row * a.features_stride + i], t = teacher[row * a.teacher_stride + i];
      add_dots(widen(f), widen(t), text ? widen(text[row * a.text_stride + i]) : A(0), image_weight[i],
               teacher_weight[i], text ? text_weight[i] : A(0), dots);
      if (differences) differences[row * a.dim + i] = subtract(f, t, distance[0]);
    }
    sum_over(kThreads, dots, shared_memory<A>() + (row - begin) % 2 * (kThreads / kWarp * kNumDots));
    A image_residual, text_residual;
    judge(a, row, threadIdx.x == 0, dots, scalars, image_residual, text_residual);
  }
  // Its barrier also lets all see the residuals that thread 0 has written.
  sum_over(kThreads, distance, shared_memory<A>() + (end - begin) % 2 * (kThreads / kWarp * kNumDots));
  scalars[kDistillationLoss] = distance[0];
  A* partial = static_cast<A*>(a.workspace) + blockIdx.x * partial_size(a.dim);
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
    A image_sum = 0, text_sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      image_sum += residuals[row] * widen(features[row * a.features_stride + i]);
      text_sum += residuals[a.batch + row] * (text ? widen(text[row * a.text_stride + i]) : A(0));
    }
    partial[i] = image_sum;
    partial[a.dim + i] = text_sum;
  }
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < kNumScalars; ++n) partial[2 * a.dim + n] = scalars[n];
}

// Adds up the chunks' partial sums: a block has kColumns columns, so that small heads spread over the device too,
// and its threads take the chunks of a column in turn; what they found is added always in the same order.
constexpr int kColumns = 8;

template <typename A>
__global__ __launch_bounds__(kThreads) void head_sum_chunks(const __grid_constant__ Forward p) {
  const SurgeryHead& a = p.args;
  constexpr int kTakers = kThreads / kColumns;
  int taker = threadIdx.x / kColumns;
  int64_t size = partial_size(a.dim), column = int64_t(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  A* found = shared_memory<A>();
  A sum = 0;
  if (column < size)
#pragma unroll
    for (int n = 0; n < (kMaxChunks + kTakers - 1) / kTakers; ++n) {
      int64_t chunk = n * kTakers + taker;
      if (chunk < p.chunks) sum += static_cast<const A*>(a.workspace)[chunk * size + column];
    }
  found[threadIdx.x] = sum;
  __syncthreads();
  if (taker || column >= size) return;
  for (int k = 1; k < kTakers; ++k) sum += found[k * kColumns + threadIdx.x];

  A mean = A(1) / A(a.batch > 0 ? a.batch : 1);
  A* losses = static_cast<A*>(a.losses);
  A* head_grads = static_cast<A*>(a.head_grads);  // [2, dim + 1]: a weight's gradient, then its bias's
  if (column < 2 * a.dim) {
    head_grads[column + (column >= a.dim)] = sum * mean;
  } else if (column - 2 * a.dim == kAlignmentLoss) {
    losses[kAlignmentLoss] = sum * mean * (a.reference_batch_size > 0 ? A(1) / A(a.reference_batch_size) : mean);
  } else if (column - 2 * a.dim == kDistillationLoss) {
    losses[kDistillationLoss] = sum * mean * (A(a.distillation) / A(2 * a.dim));
  } else if (column - 2 * a.dim < kAlignmentLoss) {
    losses[column - 2 * a.dim] = sum * mean;
  } else {
    head_grads[column - 2 * a.dim == kImageResidual ? a.dim : 2 * a.dim + 1] = sum * mean;
  }
}

template <typename T, bool Aligned>
const char* run(const SurgeryHead& args, void* stream) {
  using A = Compute<T>;
  int64_t shares = ceil_div(args.dim, kHeadShare<T, Aligned>);
  bool fits = shares <= kThreads;
  int lanes = shares > kWarp ? power_of_two(shares, kThreads) : kWarp;
  int teams = lanes > kWarp ? 1 : kTeams, threads = fits ? lanes * teams : kThreads;
  // The number of chunks, and so every bit of the result, depends on the batch alone and not on the device.
  int64_t chunk_rows = ceil_div(args.batch, kMaxChunks);
  if (args.batch && chunk_rows < teams) chunk_rows = teams;  // a small batch keeps its warps busy
  int64_t chunks = args.batch ? ceil_div(args.batch, chunk_rows) : 0;
  int staged = kStages * 3 * kHeadShare<T, Aligned> * int(sizeof(T)) * threads;
  int totals = teams > 1 ? teams * int(partial_size(args.dim) * sizeof(A)) : 0;
  int scratch = 2 * threads / kWarp * kNumDots * int(sizeof(A));
  Forward p{args, lanes, 0, chunk_rows, chunks};
  const char* error = nullptr;
  if (!fits) {
    error = launch(head_read_twice<T>, chunks, threads, scratch, stream, p);
  } else if (Aligned && threads <= kTeams * kWarp) {  // the totals then fit where the rows were
    p.staged_bytes = staged;
    error = launch(head_rows<T, Aligned, Aligned>, chunks, threads, staged + scratch, stream, p);
  } else {
    p.staged_bytes = (totals + 15) / 16 * 16;
    error = launch(head_rows<T, Aligned, false>, chunks, threads, p.staged_bytes + scratch, stream, p);
  }
  if (error) return error;
  return launch(head_sum_chunks<A>, ceil_div(partial_size(args.dim), kColumns), kThreads, kThreads * int(sizeof(A)),
                stream, p);
}

struct Backward {
  SurgeryHeadBackward args;
  int rows;  // per block
};

// Inner products of the directions a row can be made of: h = relu(+-w_text), q = min(+-w_teacher, 0). "Up" is the
// side of a positive residual.
enum Products {
  kUpUp,
  kDownDown,
  kUpImage,
  kDownImage,
  kUpFalling,
  kUpRising,
  kDownFalling,
  kDownRising,
  kNumProducts
};
enum Coefficients { kOfImage, kOfFalling, kOfRising, kOfUp, kOfDown, kNumCoefficients };

// reference.surgery_head_backward for one row.
template <typename A>
__device__ __forceinline__ void combine(const SurgeryHeadBackward& a, int64_t row, const A (&products)[kNumProducts],
                                        A* out) {
  const A* residuals = static_cast<const A*>(a.residuals) + row;
  A text = residuals[a.batch], teacher = residuals[2 * a.batch];
  A batch = A(a.batch), reference = a.reference_batch_size > 0 ? A(a.reference_batch_size) : batch;
  A image = *static_cast<const A*>(a.image_scale) * residuals[0] / batch;
  A pull = *static_cast<const A*>(a.alignment_scale) * fabs(teacher) / (reference * batch);
  bool up = text > 0, falling = teacher > 0;
  A c = fabs(text) / reference;
  A inner = image * (up ? products[kUpImage] : products[kDownImage]);
  if (a.order == Order::align_first)
    inner += pull * (up ? (falling ? products[kUpFalling] : products[kUpRising])
                        : (falling ? products[kDownFalling] : products[kDownRising]));
  A k = c / (c * sqrt(up ? products[kUpUp] : products[kDownDown]) + A(a.eps));
  A push = a.text_weight ? inner * k * k : A(0);
  out[kOfImage] = image;
  out[kOfFalling] = falling ? pull : A(0);
  out[kOfRising] = falling ? A(0) : pull;
  out[kOfUp] = up ? push : A(0);
  out[kOfDown] = up ? A(0) : push;
}

template <typename T, bool Aligned>
__global__ __launch_bounds__(kThreads) void head_backward(const __grid_constant__ Backward p) {
  using A = Compute<T>;
  const SurgeryHeadBackward& a = p.args;
  const A* image_weight = static_cast<const A*>(a.image_weight);
  const A* teacher_weight = static_cast<const A*>(a.teacher_weight);
  const A* text_weight = static_cast<const A*>(a.text_weight);
  A* coefficients = shared_memory<A>();
  A* scratch = coefficients + kRowsPerBlock * kNumCoefficients;

  A products[kNumProducts] = {};
  if (text_weight)
    for (int64_t v = 0; v < a.dim; v += blockDim.x * kPack<T>) {
      A wi[kPack<T>], wt[kPack<T>], wx[kPack<T>];
      load_weights<T, Aligned>(image_weight + v, 0, threadIdx.x, blockDim.x, a.dim - v, wi);
      load_weights<T, Aligned>(teacher_weight + v, 0, threadIdx.x, blockDim.x, a.dim - v, wt);
      load_weights<T, Aligned>(text_weight + v, 0, threadIdx.x, blockDim.x, a.dim - v, wx);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        A up = positive_part(wx[j]), down = positive_part(-wx[j]);
        A falling = negative_part(wt[j]), rising = negative_part(-wt[j]);
        products[kUpUp] += up * up, products[kDownDown] += down * down;
        products[kUpImage] += up * wi[j], products[kDownImage] += down * wi[j];
        products[kUpFalling] += up * falling, products[kUpRising] += up * rising;
        products[kDownFalling] += down * falling, products[kDownRising] += down * rising;
      }
    }
  sum_over(blockDim.x, products, scratch);

  A distill = a.differences
                  ? *static_cast<const A*>(a.distillation_scale) * (A(a.distillation) / (A(a.dim) * A(a.batch)))
                  : A(0);
  int64_t begin = int64_t(blockIdx.x) * p.rows;
  int rows = a.batch - begin < p.rows ? static_cast<int>(a.batch - begin) : p.rows;
  for (int row = threadIdx.x; row < rows; row += blockDim.x)
    combine(a, begin + row, products, coefficients + row * kNumCoefficients);
  __syncthreads();

  for (int64_t v = 0; v < a.dim; v += blockDim.x * kPack<T>) {
    A wi[kPack<T>], wt[kPack<T>], wx[kPack<T>];
    load_weights<T, Aligned>(image_weight + v, 0, threadIdx.x, blockDim.x, a.dim - v, wi);
    load_weights<T, Aligned>(teacher_weight + v, 0, threadIdx.x, blockDim.x, a.dim - v, wt);
    load_weights<T, Aligned>(text_weight ? text_weight + v : nullptr, 0, threadIdx.x, blockDim.x, a.dim - v, wx);
    T* out = static_cast<T*>(a.grad_features) + begin * a.dim + v;
    const T* difference = static_cast<const T*>(a.differences) + (a.differences ? begin * a.dim + v : 0);
    for (int row = 0; row < rows; ++row, out += a.dim) {
      const A* c = coefficients + row * kNumCoefficients;
      Pack<T> pack = load<T, Aligned>(difference, 0, threadIdx.x, blockDim.x, a.dim - v);
      if (difference) difference += a.dim;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j)
        narrow(c[kOfImage] * wi[j] + c[kOfFalling] * negative_part(wt[j]) + c[kOfRising] * negative_part(-wt[j]) -
                   c[kOfUp] * positive_part(wx[j]) - c[kOfDown] * positive_part(-wx[j]) + distill * element(pack, j),
               pack.at[j]);
      store<T, Aligned>(out, pack, 0, threadIdx.x, blockDim.x, a.dim - v);
    }
  }
}

template <typename T, bool Aligned>
const char* run(const SurgeryHeadBackward& args, void* stream) {
  int64_t warps = ceil_div(ceil_div(args.dim, kPack<T>), kWarp);
  int threads = warps * kWarp < kThreads ? static_cast<int>(warps) * kWarp : kThreads;
  int64_t rows = ceil_div(args.batch, kMaxChunks);  // a small batch still fills the device
  Backward p{args, static_cast<int>(rows < kRowsPerBlock ? rows : kRowsPerBlock)};
  int shared = (kRowsPerBlock * kNumCoefficients + kThreads / kWarp * kNumProducts) * int(sizeof(Compute<T>));
  return launch(head_backward<T, Aligned>, p.rows ? ceil_div(args.batch, p.rows) : 0, threads, shared, stream, p);
}

template <typename Args>
bool weights_aligned(const Args& a) {
  return is_aligned(a.image_weight) && is_aligned(a.teacher_weight) && is_aligned(a.text_weight);
}

}  // namespace

int64_t surgery_head_workspace(int64_t batch, int64_t dim) {
  return (batch < kMaxChunks ? batch : kMaxChunks) * partial_size(dim);
}

const char* surgery_head(const SurgeryHead& args, void* stream) {
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t size = sizeof(T);
    bool aligned = args.dim * size % 16 == 0 && is_aligned(args.features, args.features_stride * size) &&
                   is_aligned(args.teacher_features, args.teacher_stride * size) &&
                   is_aligned(args.text_features, args.text_stride * size) && is_aligned(args.differences) &&
                   weights_aligned(args);
    return aligned ? run<T, true>(args, stream) : run<T, false>(args, stream);
  });
}

const char* surgery_head_backward(const SurgeryHeadBackward& args, void* stream) {
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool aligned = args.dim * int64_t(sizeof(T)) % 16 == 0 && is_aligned(args.grad_features) &&
                   is_aligned(args.differences) && weights_aligned(args);
    return aligned ? run<T, true>(args, stream) : run<T, false>(args, stream);
  });
}

}  // namespace dgs::cuda
