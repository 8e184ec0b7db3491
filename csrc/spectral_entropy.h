// What a spectral_entropy kernel is given.
#pragma once

#include "types.h"

namespace dgs {

constexpr int entropy_patch = 32;  // pixels; the size that DGS-Net uses

// Strides in elements. Pixels of a row lie next to each other (pixel_stride 1), or the three channels of a pixel
// do, and then the next pixel's (channel_stride 1, pixel_stride 3).
struct SpectralEntropy {
  int32_t is_uint8;    // in 0..255, else float32 in 0..1
  const void* images;  // [batch, 3, height, width]
  int64_t batch, height, width;
  int64_t batch_stride, channel_stride, row_stride, pixel_stride;
  float* entropy;  // [batch, height / 32 * (width / 32)]
};

namespace cpu {

void spectral_entropy(const SpectralEntropy&, ParallelFor);

}  // namespace cpu
}  // namespace dgs
