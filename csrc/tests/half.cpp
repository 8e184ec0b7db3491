// float16 to float and back, against the type's definition: every half, and what lies between two of them.
#include "cpu/simd.h"

#include "check.h"

namespace {

// Halves from 0 up to, not including, infinity.
constexpr int64_t count = 0x7c00;

uint16_t narrowed(float x) {
  // Eight, so that vectors are filled, and one more.
  float in[9];
  dgs::cpu::f16 out[9];
  std::fill_n(in, 9, x);
  dgs::cpu::narrow(in, out, 9);
  for (const auto& half : out) check::expect(half.bits == out[0].bits, "%a is rounded in two ways", double(x));
  return out[0].bits;
}

void rounds(double x, int want) {
  check::expect(narrowed(float(x)) == want, "%a becomes %x, not %x", x, narrowed(float(x)), want);
  check::expect(narrowed(float(-x)) == (want | 0x8000), "%a becomes %x", -x, narrowed(float(-x)));
}

}  // namespace

int main() {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const dgs::cpu::f16 half{uint16_t(bits)};
    float wide;
    dgs::cpu::widen(&half, &wide, 1);
    const double want = check::half_value(half.bits, 5);
    check::expect(std::isnan(want) ? std::isnan(wide) : wide == want && std::signbit(wide) == std::signbit(want),
                  "%x becomes %a, not %a", bits, double(wide), want);
  }
  for (int bits = 0; bits < count; ++bits) {
    // After the largest half comes what would be the next one: from halfway on it is infinity.
    const double low = check::half_value(uint16_t(bits), 5);
    const double high = bits + 1 < count ? check::half_value(uint16_t(bits + 1), 5) : 65536.0;
    const float middle = float((low + high) / 2);
    rounds(low, bits);
    rounds(std::nextafter(middle, 0.0f), bits);
    // Ties go to even.
    rounds(middle, bits + bits % 2);
    rounds(std::nextafter(middle, INFINITY), bits + 1);
  }
  rounds(INFINITY, 0x7c00);
  rounds(3e38, 0x7c00);
  check::expect(std::isnan(check::half_value(narrowed(NAN), 5)), "NaN becomes %x", narrowed(NAN));
  return check::result();
}
