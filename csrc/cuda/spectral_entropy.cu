// spectral_entropy on a GPU, for patches of 32 x 32: the image is read once and one number per patch is written.
//
// Half a warp transforms a patch. Two real rows make one complex one, so 16 lanes do 16 transforms of 32 points
// in registers; of the columns 17 are needed, and as the first and the last are real they again make one
// complex column, so it is 16 transforms once more. In between, the patch lies in shared memory.
#include "common.cuh"

namespace dgs::cuda {
namespace {

constexpr int kSide = 32;
// Threads per patch.
constexpr int kLanes = 16;
constexpr int kThreads = 128;
constexpr int kPatches = kThreads / kLanes;
// The stride is odd, so neither rows nor columns meet in one bank.
constexpr int kLumaStride = kSide + 1;
constexpr int kSpectrumStride = kLanes + 1;
constexpr int kImaginary = kSide * kSpectrumStride;
// It is odd, so that the two patches of a warp use different banks.
constexpr int kPatchFloats = 2 * kImaginary + 1;
constexpr float kEps = 1e-12f;

// Of the largest number that a pixel can be.
template <typename T>
constexpr float kWhite = sizeof(T) == 1 ? 255 : 1;

// The logarithm as the hardware has it, of a normal, positive number. It is wrong by at most 2^-22 from 1/2 to 2, and
// by two units in the last place elsewhere (CUDA's programming guide, __log2f): an entropy by at most 2^-22 of itself,
// or of 1. The host's twin is as wrong as that everywhere, upwards or downwards.
__device__ __forceinline__ float quick_log2(float x) {
#ifdef __CUDACC__
  float found;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
  return found;
#else
  float found = log2(x), error = fmax(fabs(found), 1.0f) / (1 << 22);
  unsigned bits;
  memcpy(&bits, &x, 4);
  return found + (bits & 1 ? error : -error);
#endif
}

struct Complex {
  float re, im;
};
__device__ __forceinline__ float energy(float re, float im) { return re * re + im * im; }

// Where decimation in frequency leaves the k-th output of 32.
__host__ __device__ constexpr int reversed(int k) {
  return (k & 1) << 4 | (k & 2) << 2 | (k & 4) | (k & 8) >> 2 | (k & 16) >> 4;
}

__device__ __forceinline__ void fft(Complex (&x)[kSide]) {
  // cos(k pi / 16).
  constexpr float cosine[9] = {1.0f,         0.980785280f, 0.923879533f, 0.831469612f, 0.707106781f,
                               0.555570233f, 0.382683432f, 0.195090322f, 0.0f};
#pragma unroll
  for (int stage = 0; stage < 5; ++stage) {
#pragma unroll
    for (int i = 0; i < kSide / 2; ++i) {
      int half = kSide / 2 >> stage, j = i % half, top = i / half * 2 * half + j, turn = j << stage;
      Complex a = x[top], b = x[top + half];
      float re = a.re - b.re, im = a.im - b.im;
      float c = turn <= 8 ? cosine[turn] : -cosine[16 - turn], s = -cosine[turn <= 8 ? 8 - turn : turn - 8];
      x[top] = {a.re + b.re, a.im + b.im};
      x[top + half] = {re * c - im * s, re * s + im * c};
    }
  }
}

template <typename T, bool Aligned>
__device__ __forceinline__ void read_luma(const SpectralEntropy& a, const T* patch, int lane, float* luma) {
  constexpr int kWide = Aligned ? 16 / sizeof(T) : 1;
  constexpr int kPerRow = kSide / kWide;
  struct alignas(sizeof(T) * kWide) Pixels {
    T at[kWide];
  };
#pragma unroll 4
  for (int q = lane; q < kSide * kPerRow; q += kLanes) {
    int row = q / kPerRow, column = q % kPerRow * kWide;
    Pixels channel[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const T* from = patch + c * a.channel_stride + row * a.row_stride + column * (Aligned ? 1 : a.pixel_stride);
      if constexpr (Aligned) {
        uint4 bits = *reinterpret_cast<const uint4*>(from);
        memcpy(&channel[c], &bits, 16);
      } else {
        channel[c].at[0] = *from;
      }
    }
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      luma[row * kLumaStride + column + j] = 0.299f / kWhite<T> * channel[0].at[j] +
                                             0.587f / kWhite<T> * channel[1].at[j] +
                                             0.114f / kWhite<T> * channel[2].at[j];
  }
}

template <typename T, bool Aligned>
__global__ __launch_bounds__(kThreads) void patch_entropy(const __grid_constant__ SpectralEntropy a) {
  int lane = threadIdx.x % kLanes;
  float* shared = shared_memory<float>() + threadIdx.x / kLanes * kPatchFloats;
  int64_t columns = a.width / kSide, patches = a.height / kSide * columns;
  int64_t index = int64_t(blockIdx.x) * kPatches + threadIdx.x / kLanes;
  // A thread without a patch computes the first one again.
  bool mine = index < a.batch * patches;
  int64_t image = mine ? index / patches : 0, place = mine ? index % patches : 0;
  const T* patch = static_cast<const T*>(a.images) + image * a.batch_stride + place / columns * kSide * a.row_stride +
                   place % columns * kSide * a.pixel_stride;
  read_luma<T, Aligned>(a, patch, lane, shared);
  __syncwarp();

  Complex x[kSide];
#pragma unroll
  for (int j = 0; j < kSide; ++j) x[j] = {shared[2 * lane * kLumaStride + j], shared[(2 * lane + 1) * kLumaStride + j]};
  fft(x);
  // Everybody has read the luma that the spectra overwrite.
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    Complex p = x[reversed(k)], q = x[reversed((kSide - k) % kSide)];
    float* even = shared + 2 * lane * kSpectrumStride + k;
    float* odd = even + kSpectrumStride;
    // Both real: the first column carries the last as imaginary part.
    if (k == 0) q = x[reversed(kSide / 2)];
    even[0] = k ? (p.re + q.re) / 2 : p.re;
    even[kImaginary] = k ? (p.im - q.im) / 2 : q.re;
    odd[0] = k ? (p.im + q.im) / 2 : p.im;
    odd[kImaginary] = k ? (q.re - p.re) / 2 : q.im;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kSide; ++j)
    x[j] = {shared[j * kSpectrumStride + lane], shared[kImaginary + j * kSpectrumStride + lane]};
  fft(x);

  // Energies. Every column but the first stands for its mirror image too, and so do the k-th and -k-th entry
  // of the two real columns; what is alone counts half.
  bool packed = lane == 0;
  float energies[kSide], alone[4];
#pragma unroll
  for (int k = 1; k < kSide / 2; ++k) {
    Complex p = x[reversed(k)], q = x[reversed(kSide - k)];
    energies[k] = packed ? energy(p.re + q.re, p.im - q.im) / 4 : energy(p.re, p.im);
    energies[kSide - k] = packed ? energy(p.im + q.im, q.re - p.re) / 4 : energy(q.re, q.im);
  }
  Complex zero = x[0], half = x[reversed(kSide / 2)];
  energies[0] = packed ? 0 : energy(zero.re, zero.im);
  energies[kSide / 2] = packed ? 0 : energy(half.re, half.im);
  alone[0] = packed ? zero.re * zero.re : 0;
  alone[1] = packed ? zero.im * zero.im : 0;
  alone[2] = packed ? half.re * half.re : 0;
  alone[3] = packed ? half.im * half.im : 0;

  // Four running sums each: shorter chains of roundings than one.
  float part[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) part[k] = alone[k];
#pragma unroll
  for (int k = 0; k < kSide; ++k) part[k % 4] += 2 * energies[k];
  float total[1] = {(part[0] + part[1]) + (part[2] + part[3])};
  sum_over<1, float>(kLanes, total, nullptr);
  // A division for a patch, not for each of its energies; and twice the pairs is left for the end.
  const float scale = 1 / (total[0] + kEps);
  auto term = [&](float x) {
    float share = x * scale;
    return share * quick_log2(share + kEps);
  };
  float pairs[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) part[k] = term(alone[k]);
#pragma unroll
  for (int k = 0; k < kSide; ++k) pairs[k % 4] += term(energies[k]);
  float entropy[1] = {-((part[0] + part[1]) + (part[2] + part[3])) -
                      2 * ((pairs[0] + pairs[1]) + (pairs[2] + pairs[3]))};
  sum_over<1, float>(kLanes, entropy, nullptr);
  if (mine && lane == 0) a.entropy[index] = entropy[0];
}

template <typename T>
const char* run(const SpectralEntropy& args, void* stream) {
  constexpr int64_t size = sizeof(T);
  bool aligned = args.pixel_stride == 1 && is_aligned(args.images, args.batch_stride * size) &&
                 is_aligned(args.images, args.channel_stride * size) && is_aligned(args.images, args.row_stride * size);
  int64_t blocks = ceil_div(args.batch * (args.height / kSide) * (args.width / kSide), kPatches);
  return launch(aligned ? patch_entropy<T, true> : patch_entropy<T, false>, blocks, kThreads,
                kPatches * kPatchFloats * int(sizeof(float)), stream, args);
}

}  // namespace

const char* spectral_entropy(const SpectralEntropy& args, void* stream) {
  return args.is_uint8 ? run<uint8_t>(args, stream) : run<float>(args, stream);
}

}  // namespace dgs::cuda
