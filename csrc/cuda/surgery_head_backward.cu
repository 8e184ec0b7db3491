// The backward of surgery_head on a GPU. It reads no feature matrix, but for the differences that a distillation loss
// has left: a row of the result is a combination of D-vectors that a block keeps in registers while it writes.
#include "heads.cuh"

namespace dgs::cuda {
namespace {

constexpr int kThreads = 256;
// Of a block: what it reads is small beside what it writes.
constexpr int kMostRows = 64;
// Four for each of the 132 multiprocessors that large GPUs have, where there are the rows.
constexpr int kBlocks = 528;
// Whose differences a thread has on their way at once.
constexpr int kRowsAtOnce = 8;

struct Backward {
  SurgeryHeadBackward args;
  // Per block.
  int rows;
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
  A* scratch = coefficients + kMostRows * kNumCoefficients;

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
    for (int first = 0; first < rows; first += kRowsAtOnce) {
      Pack<T> packs[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        packs[r] = load<T, Aligned>(difference, 0, threadIdx.x, blockDim.x, first + r < rows ? a.dim - v : 0);
        if (difference) difference += a.dim;
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r, out += a.dim) {
        if (first + r >= rows) break;
        const A* c = coefficients + (first + r) * kNumCoefficients;
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j)
          narrow(c[kOfImage] * wi[j] + c[kOfFalling] * negative_part(wt[j]) + c[kOfRising] * negative_part(-wt[j]) -
                     c[kOfUp] * positive_part(wx[j]) - c[kOfDown] * positive_part(-wx[j]) +
                     distill * element(packs[r], j),
                 packs[r].at[j]);
        store<T, Aligned>(out, packs[r], 0, threadIdx.x, blockDim.x, a.dim - v);
      }
    }
  }
}

template <typename T, bool Aligned>
const char* run(const SurgeryHeadBackward& args, void* stream) {
  int64_t warps = ceil_div(ceil_div(args.dim, kPack<T>), kWarp);
  int threads = warps * kWarp < kThreads ? static_cast<int>(warps) * kWarp : kThreads;
  // A small batch still fills the device.
  int64_t rows = ceil_div(args.batch, kBlocks);
  Backward p{args, static_cast<int>(rows < kMostRows ? rows : kMostRows)};
  int shared = (kMostRows * kNumCoefficients + kThreads / kWarp * kNumProducts) * int(sizeof(Compute<T>));
  return launch(head_backward<T, Aligned>, p.rows ? ceil_div(args.batch, p.rows) : 0, threads, shared, stream, p);
}

}  // namespace

const char* surgery_head_backward(const SurgeryHeadBackward& args, void* stream) {
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool aligned = args.dim * int64_t(sizeof(T)) % 16 == 0 && is_aligned(args.grad_features) &&
                   is_aligned(args.differences) && weights_aligned(args);
    return aligned ? run<T, true>(args, stream) : run<T, false>(args, stream);
  });
}

}  // namespace dgs::cuda
