// spectral_entropy on the CPU: a patch's luma, its two-dimensional real Fourier transform, the entropy of its energies.
//
// A transform of 32 real numbers is a product with a matrix of cosines and one of sines. Folding the numbers
// (n with 32 - n) makes the matrices a quarter as large, and frequencies k and 16 - k differ in the sign of odd n
// alone. What is left is little more arithmetic than a fast transform's, all of it on whole vectors: a fast
// transform would have to turn rows into columns.
#include "../spectral_entropy.h"

#include <cmath>
#include <initializer_list>

#include "parallel.h"
#include "simd.h"

namespace dgs::cpu {
namespace {

constexpr int size = entropy_patch, half = size / 2;
constexpr float eps = 1e-12f;

typedef float Lanes __attribute__((vector_size(half * sizeof(float))));
typedef int32_t Bits __attribute__((vector_size(half * sizeof(int32_t))));

// 32 numbers f, folded: f(0), f(n) + f(32 - n) for n in 1..15, f(16), f(n) - f(32 - n) for n in 1..15.
union Row {
  Lanes lanes[2];
  float at[size];
};

struct Tables {
  // Those of 2 pi k n / 32 are at [k].at[n]; k and n go to 16.
  Row cosine[half + 1], sine[half + 1];

  Tables() {
    for (int k = 0; k <= half; ++k)
      for (int n = 0; n < size; ++n) {
        const double angle = 2 * M_PI * (k * n % size) / size;
        cosine[k].at[n] = float(std::cos(angle)), sine[k].at[n] = float(std::sin(angle));
      }
  }
};
const Tables tables;

// out[k] = sum of table[k].at[n] * in[n] over the n from first to last, which are even; k in 0..16. Sines of k above
// 8 come with the wrong sign, which no energy shows.
template <int first, int last>
DGS_INLINE void transform(const Row* table, const Row* in, Row* out) {
  // So many frequencies at a time: each row is loaded once for them.
  constexpr int tile = 3;
  for (int k = 0; k <= half / 2; k += tile) {
    Lanes even[tile][2] = {}, odd[tile][2] = {};
    for (int n = first; n <= last; n += 2)
      for (int i = 0; i < tile; ++i)
        for (int j = 0; j < 2; ++j) even[i][j] += table[k + i].at[n] * in[n].lanes[j];
    for (int n = 1; n < half; n += 2)
      for (int i = 0; i < tile; ++i)
        for (int j = 0; j < 2; ++j) odd[i][j] += table[k + i].at[n] * in[n].lanes[j];
    for (int i = 0; i < tile; ++i)
      for (int j = 0; j < 2; ++j) {
        out[half - k - i].lanes[j] = even[i][j] - odd[i][j];
        out[k + i].lanes[j] = even[i][j] + odd[i][j];
      }
  }
}

// The energies of a row of the spectrum from its real and its imaginary part, which are yet to be transformed along
// the row: lane l has frequencies l and -l, lane 0 has 0 and 16.
DGS_INLINE void energies_of(const Row& re, const Row& im, Lanes* energies) {
  Lanes re_even = {}, im_even = {}, re_odd = {}, im_odd = {}, re_sine = {}, im_sine = {};
  for (int n = 0; n <= half; n += 2) {
    re_even += re.at[n] * tables.cosine[n].lanes[0];
    im_even += im.at[n] * tables.cosine[n].lanes[0];
  }
  for (int n = 1; n < half; n += 2) {
    re_odd += re.at[n] * tables.cosine[n].lanes[0];
    im_odd += im.at[n] * tables.cosine[n].lanes[0];
  }
  for (int n = 1; n < half; ++n) {
    re_sine += re.at[half + n] * tables.sine[n].lanes[0];
    im_sine += im.at[half + n] * tables.sine[n].lanes[0];
  }
  const Lanes sign = {-1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const Lanes a = re_even + re_odd - im_sine, b = im_even + im_odd + re_sine;
  const Lanes c = re_even + sign * re_odd + im_sine, d = im_even + sign * im_odd - re_sine;
  energies[0] = a * a + b * b;
  energies[1] = c * c + d * d;
}

// Adds share * log2(share + eps) for the shares energies * scale, to an ulp or two: share + eps = 2^e (1 + f) with
// 1 + f in [sqrt(1/2), sqrt(2)), and log2(1 + f) / f as a polynomial fitted for the least relative error.
DGS_INLINE void add_terms(const Lanes& energies, float scale, Lanes& sums) {
  constexpr float fitted[] = {0.126148462f,  -0.207421035f, 0.215669855f,  -0.238920346f, 0.287918329f,
                              -0.360704839f, 0.480910599f,  -0.721347332f, 1.44269502f};
  const Lanes share = energies * scale, x = share + eps;
  const Bits bits = (Bits)x - 0x3f3504f3, mantissa = (bits & 0x7fffff) + 0x3f3504f3;
  const Lanes f = (Lanes)mantissa - 1.f;
  Lanes series = {};
  for (const float c : fitted) series = series * f + c;
  sums += share * (series * f + __builtin_convertvector(bits >> 23, Lanes));
}

DGS_INLINE float sum_of(const Lanes& x) {
  float at[half];
  std::memcpy(at, &x, sizeof x);
  for (int width = half / 2; width; width /= 2)
    for (int l = 0; l < width; ++l) at[l] += at[l + width];
  return at[0];
}

// Rows 0 and 16 count once, the others twice, for the rows that mirror them.
DGS_INLINE float entropy_of(const Lanes (&energies)[half + 1][2]) {
  Lanes even = {}, odd = {};
  for (int k = 1; k < half; ++k) even += energies[k][0], odd += energies[k][1];
  even += even, odd += odd;
  for (int k : {0, half}) even += energies[k][0], odd += energies[k][1];
  const float scale = 1 / (sum_of(even + odd) + eps);
  even = odd = Lanes{};
  for (int k = 1; k < half; ++k) add_terms(energies[k][0], scale, even), add_terms(energies[k][1], scale, odd);
  even += even, odd += odd;
  for (int k : {0, half}) add_terms(energies[k][0], scale, even), add_terms(energies[k][1], scale, odd);
  return -sum_of(even + odd);
}

// A patch's luma, each row folded; `pixels` is the first channel of its first pixel.
template <bool interleaved, typename T>
DGS_INLINE void read_loop(const T* pixels, int64_t channel_stride, int64_t row_stride, Row* rows) {
  constexpr float unit = sizeof(T) == 1 ? 1 / 255.f : 1.f;
  constexpr int step = interleaved ? 3 : 1;
  if (interleaved) channel_stride = 1;
  float luma[size][size + half];
  for (int y = 0; y < size; ++y) {
    const T *red = pixels + y * row_stride, *green = red + channel_stride, *blue = green + channel_stride;
#pragma omp simd
    for (int x = 0; x < size; ++x)
      luma[y][x] = float(red[x * step]) * (0.299f * unit) + float(green[x * step]) * (0.587f * unit) +
                   float(blue[x * step]) * (0.114f * unit);
    luma[y][size] = 0;
  }
  // In a loop of its own: a processor stalls on reading, otherwise aligned, what it has just written.
  for (int y = 0; y < size; ++y) {
#pragma omp simd
    for (int x = 0; x < half; ++x) {
      rows[y].at[x] = luma[y][x] + luma[y][size - x];
      rows[y].at[half + x] = luma[y][x] - luma[y][size - x];
    }
    rows[y].at[half] = luma[y][half];
  }
}

#define DGS_KERNELS(T)                                                                                              \
  DGS_MULTIVERSION void read(const T* pixels, int64_t channels, int64_t lines, bool interleaved, Row* rows) {       \
    interleaved ? read_loop<true>(pixels, channels, lines, rows) : read_loop<false>(pixels, channels, lines, rows); \
  }
DGS_KERNELS(float)
DGS_KERNELS(uint8_t)
#undef DGS_KERNELS

// From what `read` leaves; the rows are folded in place.
DGS_MULTIVERSION float entropy(Row* rows) {
  // Rows fold like numbers. A difference takes the place of row 32 - n: sines of n and 16 - n differ in sign at most.
  for (int n = 1; n < half; ++n)
    for (int j = 0; j < 2; ++j) {
      const Lanes sum = rows[n].lanes[j] + rows[size - n].lanes[j];
      rows[size - n].lanes[j] = rows[n].lanes[j] - rows[size - n].lanes[j];
      rows[n].lanes[j] = sum;
    }
  Row re[half + 1], im[half + 1];
  transform<0, half>(tables.cosine, rows, re);
  transform<2, half - 2>(tables.sine, rows + half, im);
  Lanes energies[half + 1][2];
  for (int k = 0; k <= half; ++k) energies_of(re[k], im[k], energies[k]);
  return entropy_of(energies);
}

template <typename T>
void entropies(const SpectralEntropy& a, ParallelFor parallel_for) {
  const int64_t down = a.height / size, across = a.width / size;
  parallel(parallel_for, a.batch * down, 4, [&](int64_t i) {
    const T* band = static_cast<const T*>(a.images) + i / down * a.batch_stride + i % down * size * a.row_stride;
    Row rows[size];
    for (int64_t x = 0; x < across; ++x) {
      // The next patch is on its way meanwhile: its 32 short pieces are no sequence that a processor sees.
      for (int64_t y = 0; y < size; ++y)
        for (int64_t channel = 0; channel < (a.pixel_stride == 3 ? 1 : 3); ++channel) {
          const T* next = band + (x + 1) * size * a.pixel_stride + y * a.row_stride + channel * a.channel_stride;
          for (int64_t i = 0; i < size * a.pixel_stride; i += 64 / sizeof(T)) __builtin_prefetch(next + i);
        }
      read(band + x * size * a.pixel_stride, a.channel_stride, a.row_stride, a.pixel_stride == 3, rows);
      a.entropy[i * across + x] = entropy(rows);
    }
  });
}

}  // namespace

void spectral_entropy(const SpectralEntropy& a, ParallelFor parallel_for) {
  return a.is_uint8 ? entropies<uint8_t>(a, parallel_for) : entropies<float>(a, parallel_for);
}

}  // namespace dgs::cpu
