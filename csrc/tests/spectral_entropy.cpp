// spectral_entropy on the CPU against the Fourier sum in double: both types, both layouts, borders cut.
#include "spectral_entropy.h"

#include "check.h"

namespace {

using check::expect;

double plain(const std::vector<double>& luma) {
  constexpr int n = 32;
  std::vector<double> energy(n * n);
  double cosine[n], sine[n], total = 0;
  for (int i = 0; i < n; ++i) cosine[i] = std::cos(2 * M_PI * i / n), sine[i] = std::sin(2 * M_PI * i / n);
  for (int v = 0; v < n; ++v)
    for (int u = 0; u < n; ++u) {
      double re = 0, im = 0;
      for (int y = 0; y < n; ++y)
        for (int x = 0; x < n; ++x) {
          const int phase = (v * y + u * x) % n;
          re += luma[y * n + x] * cosine[phase], im -= luma[y * n + x] * sine[phase];
        }
      total += energy[v * n + u] = re * re + im * im;
    }
  double entropy = 0;
  for (double e : energy) entropy -= e / (total + 1e-12) * std::log2(e / (total + 1e-12) + 1e-12);
  return entropy;
}

template <typename T>
void compare(bool interleaved, double contrast) {
  constexpr int64_t batch = 2, height = 70, width = 101, down = 2, across = 3;
  check::Random random;
  std::vector<T> images(batch * 3 * height * width);
  for (T& x : images) x = T((0.5 + contrast * random() / 4) * (sizeof(T) == 1 ? 255 : 1));
  std::vector<float> out(batch * down * across, NAN);
  const int64_t channel = interleaved ? 1 : height * width, pixel = interleaved ? 3 : 1, row = width * pixel;
  dgs::cpu::spectral_entropy(
      {sizeof(T) == 1, images.data(), batch, height, width, 3 * height * width, channel, row, pixel, out.data()},
      check::parallel_for);
  for (int64_t i = 0; i < batch * down * across; ++i) {
    const T* patch =
        &images[i / (down * across) * 3 * height * width + i / across % down * 32 * row + i % across * 32 * pixel];
    std::vector<double> luma;
    for (int y = 0; y < 32; ++y)
      for (int x = 0; x < 32; ++x) {
        const T* p = patch + y * row + x * pixel;
        luma.push_back((0.299 * p[0] + 0.587 * p[channel] + 0.114 * p[2 * channel]) / (sizeof(T) == 1 ? 255 : 1));
      }
    const double want = plain(luma);
    expect(std::fabs(out[i] - want) <= 1e-5, "%d-byte pixels, interleaved %d, contrast %g, patch %ld: %.8g, not %.8g",
           int(sizeof(T)), interleaved, contrast, long(i), out[i], want);
  }
}

}  // namespace

int main() {
  for (bool interleaved : {false, true})
    for (double contrast : {1.0, 0.1, 0.0})
      compare<uint8_t>(interleaved, contrast), compare<float>(interleaved, contrast);
  return check::result();
}
