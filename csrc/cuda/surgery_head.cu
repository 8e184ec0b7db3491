// surgery_head on a GPU. The forward reads the three feature matrices once: a row's dot products need all of it,
// and then its weighted sum into the head gradients needs it again, so it waits in shared memory, where the next
// rows are on their way meanwhile. What a warp issues for a row decides the speed, in half types above all, so the
// weights and the sums stay in registers, and what concerns the row as a whole is shared out among the lanes. Every
// chunk of rows leaves partial sums, and a second, small launch adds them up in a fixed order.
#include <cuda_pipeline.h>

#include <type_traits>

#include "heads.cuh"

namespace dgs::cuda {
namespace {

constexpr int kThreads = 256;
// Two blocks for each of the 132 multiprocessors that large GPUs have, all at once; of smaller blocks twice as many.
constexpr int kChunks = 264, kMaxChunks = 2 * kChunks;
// Rows at a time, of a warp each. No device since sm_80 gives a block less than 99 KiB, and large ones have room for
// two such blocks, with all the registers that a thread can have.
constexpr int kTeams = 4;
// Rows of a team in shared memory, of which all but one are on their way: 72 KiB in fp32, 54 in half types.
template <typename T>
constexpr int kStages = sizeof(T) == 2 ? 3 : 2;

// Elements of a row per thread, whose two sums in the compute type stay in registers. A warp then has
// exactly a row of 768, CLIP ViT-L's.
template <typename T, bool Aligned>
constexpr int kHeadShare = Aligned && sizeof(T) < 8 ? 24 : 8;

// Of one row. Those of the heads come first, in the order of logits and residuals. The last two are of the features
// with min(w, 0) and min(-w, 0) for the teacher's weight w.
enum Dots { kImage, kText, kTeacher, kTeacherFalling, kTeacherRising, kNumDots };
// Summed over rows.
enum Scalars { kImageLoss, kTextLoss, kAlignmentLoss, kDistillationLoss, kImageResidual, kTextResidual, kNumScalars };

// Where sum_dots() leaves a row's dot products: each in several lanes, the first of which this is, and by the lane.
__host__ __device__ constexpr int lane_of(int dot) { return dot == kTeacherRising ? 4 : dot % 2 * 16 + dot / 2 * 8; }
__device__ __forceinline__ int dot_of(int lane) { return lane & 4 ? kTeacherRising : lane / 16 + lane / 8 % 2 * 2; }

// Of two numbers that are to be summed over lanes, half the lanes go on with one and half with the other.
template <typename A>
__device__ __forceinline__ A share_sums(A one, A other, int step) {
  bool second = threadIdx.x & step;
  return (second ? other : one) + __shfl_xor_sync(kAllLanes, second ? one : other, step);
}

// Adds a row's dot products over its threads, always in the same order; a lane gets the one that dot_of() says. It
// takes half the instructions that it would to give every lane all of them. Beyond a warp, scratch is as in sum_over().
template <typename A>
__device__ __forceinline__ A sum_dots(int lanes, const A (&dots)[kNumDots], A* scratch) {
  A one = share_sums(dots[kImage], dots[kText], 16), other = share_sums(dots[kTeacher], dots[kTeacherFalling], 16);
  A rising = dots[kTeacherRising];
  rising += __shfl_xor_sync(kAllLanes, rising, 16);
  rising += __shfl_xor_sync(kAllLanes, rising, 8);
  A sum = share_sums(share_sums(one, other, 8), rising, 4);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  if (lanes <= kWarp) return sum;
  int lane = threadIdx.x % kWarp, dot = dot_of(lane);
  if (lane == lane_of(dot)) scratch[threadIdx.x / kWarp * kNumDots + dot] = sum;
  __syncthreads();
  sum = 0;
  for (int warp = 0; warp < lanes / kWarp; ++warp) sum += scratch[warp * kNumDots + dot];
  return sum;
}

// The compiler is to keep a number, not to make it anew wherever it is used.
template <typename A>
__device__ __forceinline__ void keep(A& number) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<A, float>)
    asm volatile("" : "+f"(number));
  else if constexpr (std::is_same_v<A, double>)
    asm volatile("" : "+d"(number));
  else if constexpr (sizeof(A) == 8)
    asm volatile("" : "+l"(number));
  else
    asm volatile("" : "+r"(number));
#endif
}

template <typename A>
__device__ __forceinline__ A sigmoid(A x) {
  A small = exp(-fabs(x));
  return quick_quotient(x < 0 ? small : A(1), A(1) + small);
}
// Binary cross-entropy of a logit.
template <typename A>
__device__ __forceinline__ A cross_entropy(A logit, A label) {
  return positive_part(logit) - logit * label + log1p(exp(-fabs(logit)));
}
// No label is NaN: nothing here can raise an error.
template <typename A>
__device__ __forceinline__ A checked(A label) {
  return label >= 0 && label <= 1 ? label : A(NAN);
}

struct Forward {
  SurgeryHead args;
  // Threads per row.
  int lanes;
  // Of shared memory, for rows.
  int staged_bytes;
  int64_t chunk_rows, chunks;
};

// A multiple of 16 bytes.
__host__ __device__ inline int64_t partial_size(int64_t dim) { return (2 * dim + kNumScalars + 3) / 4 * 4; }

// What becomes of the dot products of a chunk's rows, one after the other: the lanes that have one head's make its
// logit and its residual, all at once.
template <typename A>
struct Judge {
  const SurgeryHead& p;
  // That this lane gets.
  int dot;
  // Whether it is this lane that writes what comes of it.
  bool writes;
  // Of the chunk; null where the lane adds no offset.
  const A *labels, *offsets;
  A *logits_there, *residuals_there;
  A bias, residuals = 0, alignment = 0;

  struct Sample {
    A label, offset;
  };

  // `first_warp` of a row: the others know the same.
  __device__ __forceinline__ Judge(const SurgeryHead& p, bool first_warp, int64_t begin) : p(p) {
    int lane = threadIdx.x % kWarp;
    dot = dot_of(lane);
    bool of_head = dot <= kTeacher;
    writes = first_warp && of_head && lane == lane_of(dot);
    auto bias_of = [](const void* given) { return given ? *static_cast<const A*>(given) : A(0); };
    const A image = bias_of(p.image_bias), text = bias_of(p.text_bias), teacher = bias_of(p.teacher_bias);
    bias = dot == kImage ? image : dot == kText ? text : dot == kTeacher ? teacher : A(0);
    labels = static_cast<const A*>(p.labels) + begin;
    offsets = p.offsets && dot == kImage ? static_cast<const A*>(p.offsets) + begin : nullptr;
    logits_there = static_cast<A*>(p.logits) + (of_head ? dot * p.batch + begin : 0);
    residuals_there = static_cast<A*>(p.residuals) + (of_head ? dot * p.batch + begin : 0);
  }
  __device__ __forceinline__ Sample sample(int row) const { return {labels[row], offsets ? offsets[row] : A(0)}; }
  // Called by all threads of the row, each with its sum; writes logits and residuals.
  __device__ __forceinline__ void operator()(int row, const Sample& sample, A sum, A& image_residual,
                                             A& text_residual) {
    A logit = sum + bias, judged = logit;
    if (p.expert) {
      A text = __shfl_sync(kAllLanes, logit, lane_of(kText));
      judged += dot == kImage ? text : A(0);
    }
    A residual = sigmoid(judged + sample.offset) - checked(sample.label);
    if (dot == kText && !p.text_features) residual = 0;
    if (writes) logits_there[row] = logit, residuals_there[row] = residual;
    residuals += residual;
    // |c| <f, min(+-w, 0)>: the sign of the weight is that of the residual.
    A teacher_residual = __shfl_sync(kAllLanes, residual, lane_of(kTeacher));
    alignment += (teacher_residual > 0) == (dot == kTeacherFalling) ? fabs(teacher_residual) * sum : A(0);
    image_residual = __shfl_sync(kAllLanes, residual, lane_of(kImage));
    text_residual = __shfl_sync(kAllLanes, residual, lane_of(kText));
  }
};

// Writes a chunk's scalars, the losses from the logits that its threads have written; called by the whole block. What
// came before is then seen by all.
template <typename A>
__device__ __forceinline__ void write_scalars(const Judge<A>& judge, bool first_warp, A distance, int64_t begin,
                                              int64_t end, A* scratch, A* out) {
  const SurgeryHead& p = judge.p;
  const A *image_logits = static_cast<const A*>(p.logits), *text_logits = image_logits + p.batch;
  A scalars[kNumScalars] = {};
  __syncthreads();
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    A label = checked(static_cast<const A*>(p.labels)[row]), text = text_logits[row];
    A judged =
        image_logits[row] + (p.expert ? text : A(0)) + (p.offsets ? static_cast<const A*>(p.offsets)[row] : A(0));
    scalars[kImageLoss] += cross_entropy(judged, label);
    scalars[kTextLoss] += p.text_features ? cross_entropy(text, label) : A(0);
  }
  scalars[kDistillationLoss] = distance;
  int lane = threadIdx.x % kWarp;
  if (first_warp && lane == lane_of(judge.dot)) {
    if (judge.dot == kImage) scalars[kImageResidual] = judge.residuals;
    if (judge.dot == kText) scalars[kTextResidual] = judge.residuals;
    if (judge.dot > kTeacher) scalars[kAlignmentLoss] = judge.alignment;
  }
  sum_over(blockDim.x, scalars, scratch);
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < kNumScalars; ++n) out[n] = scalars[n];
}

// What a thread needs of the weights for one pack of a row.
template <typename T, bool Aligned>
struct PackWeights {
  Compute<T> image[kPack<T>], text[kPack<T>], teacher[kPack<T>], falling[kPack<T>];

  __device__ __forceinline__ void load(const SurgeryHead& a, int v, int lane, int lanes) {
    load_weights<T, Aligned>(a.image_weight, v, lane, lanes, a.dim, image);
    load_weights<T, Aligned>(a.text_weight, v, lane, lanes, a.dim, text);
    load_weights<T, Aligned>(a.teacher_weight, v, lane, lanes, a.dim, teacher);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) falling[j] = negative_part(teacher[j]);
  }
  // Leaves <f, w> where <f, min(-w, 0)> = <f, min(w, 0)> - <f, w> goes.
  __device__ __forceinline__ void add_dots(const Pack<T>& f, const Pack<T>& x, const Pack<T>& t,
                                           Compute<T> (&dots)[kNumDots]) const {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      dots[kImage] += element(f, j) * image[j];
      dots[kText] += element(x, j) * text[j];
      dots[kTeacher] += element(t, j) * teacher[j];
      dots[kTeacherFalling] += element(f, j) * falling[j];
      dots[kTeacherRising] += element(f, j) * teacher[j];
    }
  }
};

// f - t, as it stays for the backward; its square is added to `distance`.
template <typename T>
__device__ __forceinline__ T subtract(T f, T t, Compute<T>& distance) {
  Compute<T> difference = widen(f) - widen(t);
  distance += difference * difference;
  T stored;
  narrow(difference, stored);
  return stored;
}

enum Matrices { kFeatures, kTextFeatures, kTeacherFeatures, kNumMatrices };

// A thread's asynchronous copy of 16 bytes to shared memory if v < packs: no branch, which would be paid for each.
__device__ __forceinline__ void copy_if_below(int packs, int v, uint4* to, const void* from) {
#ifdef __CUDACC__
  asm volatile(
      "{\n\t"
      ".reg .pred wanted;\n\t"
      "setp.gt.s32 wanted, %0, %1;\n\t"
      "@wanted cp.async.cg.shared.global [%2], [%3], 16;\n\t"
      "}" ::"r"(packs),
      "r"(v), "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from)
      : "memory");
#else
  if (v < packs) __pipeline_memcpy_async(to, from, 16);
#endif
}

// A thread's own places in shared memory for its packs of a row, kStages rows in turn. It fetches and takes them
// itself, so there is nothing to wait for but its own copies. Beyond a row's end, and for a matrix that is not there,
// its places hold zeros from the start: only what is fetched has to ask where a row ends.
template <typename T, int kPacks, int kLanes>
class Stages {
  uint4* const memory_ = shared_memory<uint4>() + threadIdx.x;
  const int lanes_;
  // Of a row, that are this thread's.
  int packs_, text_packs_;
  // The first pack of the next row to fetch.
  const T* next_[kNumMatrices];
  int64_t advance_[kNumMatrices];

  __device__ __forceinline__ uint4* place(int stage, int matrix, int v) const {
    int threads = kLanes ? kTeams * kLanes : blockDim.x;
    return memory_ + ((stage * kNumMatrices + matrix) * kPacks + v) * threads;
  }

 public:
  __device__ __forceinline__ Stages(const SurgeryHead& a, int lanes, int64_t row, int teams) : lanes_(lanes) {
    const T* matrices[] = {static_cast<const T*>(a.features), static_cast<const T*>(a.text_features),
                           static_cast<const T*>(a.teacher_features)};
    const int64_t strides[] = {a.features_stride, a.text_stride, a.teacher_stride};
    packs_ = 0;
#pragma unroll
    for (int v = 0; v < kPacks; ++v) packs_ += position<T, true>(v, 0, threadIdx.x % lanes, lanes) < a.dim;
    text_packs_ = a.text_features ? packs_ : 0;
    keep(packs_), keep(text_packs_);
#pragma unroll
    for (int m = 0; m < kNumMatrices; ++m) {
      advance_[m] = teams * strides[m];
      next_[m] = matrices[m] + (matrices[m] ? row * strides[m] + threadIdx.x % lanes * kPack<T> : 0);
#pragma unroll
      for (int v = 0; v < kPacks; ++v)
        if (v >= (m == kTextFeatures ? text_packs_ : packs_))
          for (int stage = 0; stage < kStages<T>; ++stage) *place(stage, m, v) = uint4{0, 0, 0, 0};
    }
  }
  // The next row, unless there is none.
  __device__ __forceinline__ void fetch(int stage, bool there) {
    const int packs = there ? packs_ : 0, text_packs = there ? text_packs_ : 0;
#pragma unroll
    for (int m = 0; m < kNumMatrices; ++m)
#pragma unroll
      for (int v = 0; v < kPacks; ++v)
        copy_if_below(m == kTextFeatures ? text_packs : packs, v, place(stage, m, v), next_[m] + v * lanes_ * kPack<T>);
    __pipeline_commit();
#pragma unroll
    for (int m = 0; m < kNumMatrices; ++m) next_[m] += advance_[m];
  }
  __device__ __forceinline__ Pack<T> take(int stage, int matrix, int v) const {
    Pack<T> pack;
    memcpy(&pack, place(stage, matrix, v), 16);
    return pack;
  }
};

// A thread's sums, in 16-byte stores where `out` and its rows are aligned.
template <typename T, bool Aligned, int kPacks>
__device__ __forceinline__ void store_sums(const Compute<T> (&sums)[kPacks * kPack<T>], int lane, int lanes,
                                           int64_t dim, Compute<T>* out) {
  using A = Compute<T>;
#pragma unroll
  for (int v = 0; v < kPacks; ++v) {
    if constexpr (Aligned) {
      int i = position<T, true>(v, 0, lane, lanes);
#pragma unroll
      for (int k = 0; k < kPack<T>; k += kPack<A>) {
        if (i >= dim) continue;
        uint4 bits;
        memcpy(&bits, sums + v * kPack<T> + k, 16);
        *reinterpret_cast<uint4*>(out + i + k) = bits;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        int i = position<T, false>(v, j, lane, lanes);
        if (i < dim) out[i] = sums[v * kPack<T> + j];
      }
    }
  }
}

// Not staged, it is the plain twin: nothing is fetched ahead, and what is needed again comes from cache. For rows
// without 16-byte accesses, and for those of more threads than the stages have room for. OneWarp: a warp for each row.
template <typename T, bool Aligned, bool Staged, bool OneWarp>
__global__ __launch_bounds__(Staged ? kTeams * kWarp : kThreads,
                             Staged ? 2 : 1) void head_rows(const __grid_constant__ Forward p) {
  using A = Compute<T>;
  constexpr int kShare = kHeadShare<T, Aligned>, kPacks = kShare / kPack<T>;
  const SurgeryHead& a = p.args;
  const int lanes = OneWarp ? kWarp : p.lanes, teams = OneWarp ? kTeams : blockDim.x / lanes;
  const int lane = threadIdx.x % lanes, team = threadIdx.x / lanes;
  int scratch_size = blockDim.x / kWarp * kNumDots;
  // Two, used in turn: one barrier per row is enough.
  A* scratch = reinterpret_cast<A*>(shared_memory<char>() + p.staged_bytes);

  A image_sum[kShare] = {}, text_sum[kShare] = {};
  // Of this thread's part of the rows.
  A distance = 0;
  const int64_t begin = blockIdx.x * p.chunk_rows;
  const int rows = static_cast<int>(a.batch - begin < p.chunk_rows ? a.batch - begin : p.chunk_rows);
  Stages<T, Staged ? kPacks : 0, OneWarp ? kWarp : 0> stages(a, lanes, begin + team, teams);
  PackWeights<T, Aligned> weights[Staged ? kPacks : 1];
  int stage = 0, turn = 0;
  if constexpr (Staged) {
#pragma unroll
    for (int s = 0; s < kStages<T> - 1; ++s) stages.fetch(s, team + s * teams < rows);
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      weights[v].load(a, v, lane, lanes);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) keep(weights[v].falling[j]);
    }
  }
  Judge<A> judge(a, lane < kWarp, begin);
  if constexpr (Staged) keep(judge.dot), keep(judge.logits_there), keep(judge.residuals_there);
  typename Judge<A>::Sample sample{}, next{};
  if (Staged && team < rows) next = judge.sample(team);
  for (int row = team; row < rows; row += teams, turn ^= 1) {
    sample = Staged ? next : judge.sample(row);
    if constexpr (Staged) {
      if (row + teams < rows) next = judge.sample(row + teams);
      stages.fetch(stage ? stage - 1 : kStages<T> - 1, row + (kStages<T> - 1) * teams < rows);
      __pipeline_wait_prior(kStages<T> - 1);
    }
    auto take = [&](int matrix, int v) {
      if constexpr (Staged) {
        return stages.take(stage, matrix, v);
      } else {
        const void* from = matrix == kFeatures       ? a.features
                           : matrix == kTextFeatures ? a.text_features
                                                     : a.teacher_features;
        int64_t stride = matrix == kFeatures       ? a.features_stride
                         : matrix == kTextFeatures ? a.text_stride
                                                   : a.teacher_stride;
        return load<T, Aligned>(static_cast<const T*>(from) + (from ? (begin + row) * stride : 0), v, lane, lanes,
                                a.dim);
      }
    };
    A dots[kNumDots] = {};
#pragma unroll(Staged ? kPacks : 2)
    for (int v = 0; v < kPacks; ++v) {
      Pack<T> f = take(kFeatures, v), x = take(kTextFeatures, v), t = take(kTeacherFeatures, v);
      if constexpr (!Staged) weights[0].load(a, v, lane, lanes);
      weights[Staged ? v : 0].add_dots(f, x, t, dots);
    }
    dots[kTeacherRising] = dots[kTeacherFalling] - dots[kTeacherRising];
    if (a.differences)
#pragma unroll(Staged ? kPacks : 2)
      for (int v = 0; v < kPacks; ++v) {
        Pack<T> f = take(kFeatures, v), t = take(kTeacherFeatures, v);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) t.at[j] = subtract(f.at[j], t.at[j], distance);
        store<T, Aligned>(static_cast<T*>(a.differences) + (begin + row) * a.dim, t, v, lane, lanes, a.dim);
      }
    A image_residual, text_residual;
    judge(row, sample, sum_dots(lanes, dots, scratch + turn * scratch_size), image_residual, text_residual);
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      Pack<T> f = take(kFeatures, v), x = take(kTextFeatures, v);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        image_sum[v * kPack<T> + j] += image_residual * element(f, j);
        text_sum[v * kPack<T> + j] += text_residual * element(x, j);
      }
    }
    stage = stage + 1 < kStages<T> ? stage + 1 : 0;
  }

  // Every team's sums side by side, where the rows were, and then column by column.
  A* partial = static_cast<A*>(a.workspace) + blockIdx.x * partial_size(a.dim);
  A* totals = shared_memory<A>();
  A* out = teams == 1 ? partial : totals + team * 2 * a.dim;
  if constexpr (Staged) __pipeline_wait_prior(0);
  write_scalars(judge, lane < kWarp, distance, begin, begin + rows, scratch, partial + 2 * a.dim);
  store_sums<T, Aligned, kPacks>(image_sum, lane, lanes, a.dim, out);
  store_sums<T, Aligned, kPacks>(text_sum, lane, lanes, a.dim, out + a.dim);
  if (teams == 1) return;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * a.dim; i += blockDim.x) {
    A sum = totals[i];
    for (int k = 1; k < teams; ++k) sum += totals[k * 2 * a.dim + i];
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
  Judge<A> judge(a, threadIdx.x < kWarp, begin);
  A distance = 0;
  for (int64_t row = begin; row < end; ++row) {
    A dots[kNumDots] = {};
    for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
      T f = features[row * a.features_stride + i], t = teacher[row * a.teacher_stride + i];
      dots[kImage] += widen(f) * image_weight[i];
      if (text) dots[kText] += widen(text[row * a.text_stride + i]) * text_weight[i];
      dots[kTeacher] += widen(t) * teacher_weight[i];
      dots[kTeacherFalling] += widen(f) * negative_part(teacher_weight[i]);
      dots[kTeacherRising] += widen(f) * negative_part(-teacher_weight[i]);
      if (differences) differences[row * a.dim + i] = subtract(f, t, distance);
    }
    A* scratch = shared_memory<A>() + (row - begin) % 2 * (kThreads / kWarp * kNumDots);
    A image_residual, text_residual;
    int of_chunk = static_cast<int>(row - begin);
    judge(of_chunk, judge.sample(of_chunk), sum_dots(kThreads, dots, scratch), image_residual, text_residual);
  }
  A* partial = static_cast<A*>(a.workspace) + blockIdx.x * partial_size(a.dim);
  // Then all see the residuals that the first warp has written.
  write_scalars(judge, threadIdx.x < kWarp, distance, begin, end, shared_memory<A>(), partial + 2 * a.dim);
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
    A image_sum = 0, text_sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      image_sum += residuals[row] * widen(features[row * a.features_stride + i]);
      text_sum += residuals[a.batch + row] * (text ? widen(text[row * a.text_stride + i]) : A(0));
    }
    partial[i] = image_sum;
    partial[a.dim + i] = text_sum;
  }
}

// Adds up the chunks' partial sums: a block has kColumns columns, so that small heads spread over the device too,
// and its threads take the chunks of a column in turn; what they found is added always in the same order.
constexpr int kColumns = 8;

template <typename A>
__global__ __launch_bounds__(kThreads) void head_sum_chunks(const __grid_constant__ Forward p) {
  const SurgeryHead& a = p.args;
  constexpr int kTakers = kThreads / kColumns;
  int taker = threadIdx.x / kColumns;
  int64_t size = partial_size(a.dim), columns = 2 * a.dim + kNumScalars;
  int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  A* found = shared_memory<A>();
  A sum = 0;
  if (column < columns)
#pragma unroll
    for (int n = 0; n < (kMaxChunks + kTakers - 1) / kTakers; ++n) {
      int64_t chunk = n * kTakers + taker;
      if (chunk < p.chunks) sum += static_cast<const A*>(a.workspace)[chunk * size + column];
    }
  found[threadIdx.x] = sum;
  __syncthreads();
  if (taker || column >= columns) return;
  for (int k = 1; k < kTakers; ++k) sum += found[k * kColumns + threadIdx.x];

  A mean = A(1) / A(a.batch > 0 ? a.batch : 1);
  A* losses = static_cast<A*>(a.losses);
  // [2, dim + 1]: a weight's gradient, then its bias's.
  A* head_grads = static_cast<A*>(a.head_grads);
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
  // The number of chunks, and so every bit of the result, depends on the batch and the row alone, not on the device.
  int64_t chunk_rows = ceil_div(args.batch, threads < kTeams * kWarp ? kMaxChunks : kChunks);
  // A small batch keeps its warps busy.
  if (args.batch && chunk_rows < teams) chunk_rows = teams;
  int64_t chunks = args.batch ? ceil_div(args.batch, chunk_rows) : 0;
  int totals = teams > 1 ? teams * 2 * int(args.dim * sizeof(A)) : 0;
  int scratch = 2 * threads / kWarp * kNumDots * int(sizeof(A));
  Forward p{args, lanes, (totals + 15) / 16 * 16, chunk_rows, chunks};
  const char* error = nullptr;
  if (!fits) {
    error = launch(head_read_twice<T>, chunks, threads, scratch, stream, p);
  } else if (Aligned && threads <= kTeams * kWarp) {
    // The totals then fit where the rows were.
    p.staged_bytes = kStages<T> * kNumMatrices * kHeadShare<T, Aligned> * int(sizeof(T)) * threads;
    auto kernel = teams > 1 ? head_rows<T, Aligned, Aligned, Aligned> : head_rows<T, Aligned, Aligned, false>;
    error = launch(kernel, chunks, threads, p.staged_bytes + scratch, stream, p);
  } else {
    error = launch(head_rows<T, Aligned, false, false>, chunks, threads, p.staged_bytes + scratch, stream, p);
  }
  if (error) return error;
  return launch(head_sum_chunks<A>, ceil_div(2 * args.dim + kNumScalars, kColumns), kThreads, kThreads * int(sizeof(A)),
                stream, p);
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

}  // namespace dgs::cuda
