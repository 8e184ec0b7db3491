// What a spectral_entropy kernel is given.
#pragma once

#include "types.h"

namespace dgs {

// In pixels; the size that DGS-Net uses.
constexpr int entropy_patch = 32;

// Strides in elements. Pixels of a row lie next to each other (pixel_stride 1), or the three channels of a pixel
// do, and then the next pixel's (channel_stride 1, pixel_stride 3).
struct SpectralEntropy {
  // uint8 is in 0..255, float32 in 0..1.
  int32_t is_uint8;
  // [batch, 3, height, width].
  const void* images;
  int64_t batch, height, width;
  int64_t batch_stride, channel_stride, row_stride, pixel_stride;
  // [batch, height / 32 * (width / 32)].
  float* entropy;
};

namespace cpu {

void spectral_entropy(const SpectralEntropy&, ParallelFor);

}  // namespace cpu
}  // namespace dgs
