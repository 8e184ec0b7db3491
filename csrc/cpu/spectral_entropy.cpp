// spectral_entropy on the CPU: a patch's luma, its two-dimensional real FFT, the entropy of its energies.
//
// Real numbers go through a complex transform two by two: columns c and c + 16 are one complex column, so the
// transform along y is 16 complex columns of 32, one vector operation for all columns. Parted again, rows 0..16 of
// the spectrum are all there is to know; rows 0 and 16 are real and make one complex row, so that the transform
// along x is 16 complex rows of 32, the same function once more. Everything stays in 16 KiB.
#include "../spectral_entropy.h"

#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace dgs::cpu {
namespace {

constexpr int size = entropy_patch, lanes = size / 2;

struct Complex {
  alignas(64) float re[size][lanes], im[size][lanes];
};

struct Tables {
  float cosine[lanes], sine[lanes];  // of -2 pi n / 32
  int place[size];                   // where frequency k lies after the transform: its bits reversed

  Tables() {
    for (int n = 0; n < lanes; ++n) {
      const double angle = -2 * M_PI * n / size;
      cosine[n] = float(std::cos(angle)), sine[n] = float(std::sin(angle));
    }
    for (int k = 0; k < size; ++k) place[k] = (k & 1) << 4 | (k & 2) << 2 | (k & 4) | (k & 8) >> 2 | k >> 4;
  }
};
const Tables tables;

// Radix-2 by decimation in frequency, in place, along the first axis.
DGS_INLINE void transform(Complex& z) {
  for (int half = size / 2; half; half /= 2)
    for (int first = 0; first < size; first += 2 * half)
      for (int n = 0; n < half; ++n) {
        const float c = tables.cosine[n * (lanes / half)], s = tables.sine[n * (lanes / half)];
        float *are = z.re[first + n], *aim = z.im[first + n], *bre = are + half * lanes, *bim = aim + half * lanes;
#pragma omp simd
        for (int l = 0; l < lanes; ++l) {
          const float re = are[l] - bre[l], im = aim[l] - bim[l];
          are[l] += bre[l];
          aim[l] += bim[l];
          bre[l] = re * c - im * s;
          bim[l] = re * s + im * c;
        }
      }
}

// log2 of a positive normal number, to an ulp or two: x = 2^e m with m in [sqrt(1/2), sqrt(2)), and
// log(m) = 2 atanh((m - 1) / (m + 1)) as a series.
DGS_INLINE float log2_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) - 0x3f3504f3u;
  const float exponent = float(int32_t(bits) >> 23);
  const float m = bit_cast<float>((bits & 0x7fffffu) + 0x3f3504f3u);
  const float t = (m - 1) / (m + 1), t2 = t * t;
  const float series = 1 + t2 * (1 / 3.f + t2 * (1 / 5.f + t2 * (1 / 7.f + t2 * (1 / 9.f))));
  return exponent + t * series * 2.885390081777927f;
}

// Energies by frequency; those of rows 1..15 stand for two each.
struct Energies {
  alignas(64) float twice[size][lanes];  // lane 0 is 0
  float once[2][size];
};

DGS_INLINE float entropy_of(const Energies& e) {
  float twice = 0, once = 0;
  const float *many = e.twice[0], *few = e.once[0];
#pragma omp simd reduction(+ : twice)
  for (int i = 0; i < size * lanes; ++i) twice += many[i];
#pragma omp simd reduction(+ : once)
  for (int i = 0; i < 2 * size; ++i) once += few[i];
  constexpr float eps = 1e-12f;
  const float scale = 1 / (2 * twice + once + eps);
  twice = once = 0;
#pragma omp simd reduction(+ : twice)
  for (int i = 0; i < size * lanes; ++i) {
    const float share = many[i] * scale;
    twice += share * log2_of(share + eps);
  }
#pragma omp simd reduction(+ : once)
  for (int i = 0; i < 2 * size; ++i) {
    const float share = few[i] * scale;
    once += share * log2_of(share + eps);
  }
  return -(2 * twice + once);
}

// `pixels` is the first channel of the patch's first pixel.
template <bool interleaved, typename T>
DGS_INLINE float patch_entropy(const T* pixels, int64_t channel_stride, int64_t row_stride) {
  constexpr float unit = sizeof(T) == 1 ? 1 / 255.f : 1.f;
  constexpr int step = interleaved ? 3 : 1;
  if (interleaved) channel_stride = 1;
  Complex columns, rows;
  for (int y = 0; y < size; ++y) {
    const T *red = pixels + y * row_stride, *green = red + channel_stride, *blue = green + channel_stride;
    float luma[size];
#pragma omp simd
    for (int x = 0; x < size; ++x)
      luma[x] = float(red[x * step]) * (0.299f * unit) + float(green[x * step]) * (0.587f * unit) +
                float(blue[x * step]) * (0.114f * unit);
#pragma omp simd
    for (int l = 0; l < lanes; ++l) columns.re[y][l] = luma[l], columns.im[y][l] = luma[lanes + l];
  }
  transform(columns);

  // Part columns c and c + 16: with Z their transform, (Z(k) + conj Z(-k)) / 2 and (Z(k) - conj Z(-k)) / 2i.
  for (int k = 0; k < lanes; ++k) {
    const int p = tables.place[k], q = tables.place[(size - k) % size];
    const float *zre = columns.re[p], *zim = columns.im[p], *wre = columns.re[q], *wim = columns.im[q];
    if (k == 0) {  // rows 0 and 16, which are real, as one
      const float *ure = columns.re[tables.place[lanes]], *uim = columns.im[tables.place[lanes]];
      for (int l = 0; l < lanes; ++l) {
        rows.re[l][0] = zre[l], rows.im[l][0] = ure[l];
        rows.re[lanes + l][0] = zim[l], rows.im[lanes + l][0] = uim[l];
      }
      continue;
    }
    for (int l = 0; l < lanes; ++l) {
      rows.re[l][k] = 0.5f * (zre[l] + wre[l]), rows.im[l][k] = 0.5f * (zim[l] - wim[l]);
      rows.re[lanes + l][k] = 0.5f * (zim[l] + wim[l]), rows.im[lanes + l][k] = 0.5f * (wre[l] - zre[l]);
    }
  }
  transform(rows);

  Energies e;
  for (int k = 0; k < size; ++k) {
#pragma omp simd
    for (int l = 0; l < lanes; ++l) e.twice[k][l] = rows.re[k][l] * rows.re[k][l] + rows.im[k][l] * rows.im[k][l];
    e.twice[k][0] = 0;
    const int p = tables.place[k], q = tables.place[(size - k) % size];
    const float are = rows.re[p][0], aim = rows.im[p][0], bre = rows.re[q][0], bim = rows.im[q][0];
    e.once[0][k] = 0.25f * ((are + bre) * (are + bre) + (aim - bim) * (aim - bim));
    e.once[1][k] = 0.25f * ((are - bre) * (are - bre) + (aim + bim) * (aim + bim));
  }
  return entropy_of(e);
}

#define DGS_KERNELS(T)                                                                                  \
  DGS_MULTIVERSION float entropy(const T* pixels, int64_t channels, int64_t rows, bool interleaved) {   \
    return interleaved ? patch_entropy<true>(pixels, channels, rows) : patch_entropy<false>(pixels, channels, rows); \
  }
DGS_KERNELS(float)
DGS_KERNELS(uint8_t)
#undef DGS_KERNELS

template <typename T>
void entropies(const SpectralEntropy& a, ParallelFor parallel_for) {
  const int64_t down = a.height / size, across = a.width / size;
  // An image's row of patches is read line by line as far as the prefetcher is concerned.
  parallel(parallel_for, a.batch * down, 4, [&](int64_t i) {
    const T* band = static_cast<const T*>(a.images) + i / down * a.batch_stride + i % down * size * a.row_stride;
    for (int64_t x = 0; x < across; ++x)
      a.entropy[i * across + x] =
          entropy(band + x * size * a.pixel_stride, a.channel_stride, a.row_stride, a.pixel_stride == 3);
  });
}

}  // namespace

void spectral_entropy(const SpectralEntropy& a, ParallelFor parallel_for) {
  return a.is_uint8 ? entropies<uint8_t>(a, parallel_for) : entropies<float>(a, parallel_for);
}

}  // namespace dgs::cpu
