// surgery_head and its backward on the CPU against plain loops in long double.
#include "surgery_head.h"

#include "check.h"

namespace {

using check::expect;
using dgs::DType;
using dgs::Order;

using Numbers = std::vector<long double>;

// An array of random numbers, as stored and as they are.
struct Array {
  std::vector<char> memory;
  Numbers value;

  Array(DType dtype, int64_t count, check::Random& random, double scale = 1) : memory(count * check::size_of(dtype)) {
    for (int64_t i = 0; i < count; ++i) {
      check::set(memory.data(), i, dtype, scale * random());
      value.push_back(check::get(memory.data(), i, dtype));
    }
  }
};

void close(const void* got, DType dtype, int64_t count, const long double* want, double error, const char* what,
           int64_t dim) {
  for (int64_t i = 0; i < count; ++i) {
    const double x = check::get(got, i, dtype), y = double(want[i]);
    expect(std::fabs(x - y) <= error + 1.01 * check::unit_roundoff(dtype) * std::fabs(y),
           "%s of type %d, dim %ld: [%ld] = %.9g, not %.9g", what, int(dtype), long(dim), long(i), x, y);
  }
}

void compare(DType dtype, int64_t batch, int64_t dim, bool text, Order order, int64_t asked, bool expert) {
  check::Random random;
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const double scale = 1 / std::sqrt(double(dim)), eps = 1e-2, reference = asked ? asked : batch;
  const int64_t stride = dim + 3;
  const Array f(dtype, batch * stride, random), t(dtype, batch * stride, random), x(dtype, batch * stride, random);
  Array labels(wide, batch, random);
  for (int64_t n = 0; n < batch; ++n) check::set(labels.memory.data(), n, wide, double(labels.value[n] = n % 2));
  // Powers of two keep the products' numbers short, and the errors those of the sums.
  const double shrink = std::exp2(std::floor(std::log2(scale)));
  const Array w(wide, dim, random, shrink), v(wide, dim, random, shrink), u(wide, dim, random, shrink);
  const Array biases(wide, 3, random), scales(wide, 3, random), offsets(wide, batch, random);
  const double distillation = expert ? 0.25 : 0;
  std::vector<char> differences(distillation ? batch * dim * check::size_of(dtype) : 0, char(0xff));
  std::vector<double> losses(4), logits(3 * batch), residuals(3 * batch), grads(2 * (dim + 1));
  const size_t width = check::size_of(wide);
  dgs::cpu::surgery_head({.dtype = dtype,
                          .expert = expert,
                          .features = f.memory.data(),
                          .teacher_features = t.memory.data(),
                          .text_features = text ? x.memory.data() : nullptr,
                          .features_stride = stride,
                          .teacher_stride = stride,
                          .text_stride = stride,
                          .labels = labels.memory.data(),
                          .offsets = expert ? offsets.memory.data() : nullptr,
                          .image_weight = w.memory.data(),
                          .teacher_weight = v.memory.data(),
                          .text_weight = u.memory.data(),
                          .image_bias = biases.memory.data(),
                          .teacher_bias = biases.memory.data() + width,
                          .text_bias = biases.memory.data() + 2 * width,
                          .batch = batch,
                          .dim = dim,
                          .reference_batch_size = double(asked),
                          .distillation = distillation,
                          .losses = losses.data(),
                          .logits = logits.data(),
                          .residuals = residuals.data(),
                          .head_grads = grads.data(),
                          .differences = distillation ? differences.data() : nullptr},
                         check::parallel_for);

  Numbers loss(4), logit(3 * batch), residual(3 * batch), grad(2 * (dim + 1));
  const auto part = [](long double sign, long double a) { return std::min(sign * a, 0.0L); };
  for (int64_t n = 0; n < batch; ++n) {
    const Array* rows[] = {&f, &x, &t};
    const Array* weights[] = {&w, &u, &v};
    const int bias[] = {0, 2, 1};
    for (int b : {1, 0, 2}) {
      if (b == 1 && !text) continue;
      long double z = biases.value[bias[b]];
      for (int64_t d = 0; d < dim; ++d) z += rows[b]->value[n * stride + d] * weights[b]->value[d];
      logit[b * batch + n] = z;
      if (b == 0 && expert) z += logit[batch + n] + offsets.value[n];
      const long double y = labels.value[n], r = 1 / (1 + std::exp(-z)) - y;
      residual[b * batch + n] = r;
      if (b == 2) continue;
      loss[b] += (std::log1p(std::exp(-std::fabs(z))) + std::max(z, 0.0L) - z * y) / batch;
      for (int64_t d = 0; d < dim; ++d) grad[b * (dim + 1) + d] += r * rows[b]->value[n * stride + d] / batch;
      grad[b * (dim + 1) + dim] += r / batch;
    }
    const long double r = residual[2 * batch + n];
    for (int64_t d = 0; d < dim; ++d)
      loss[3] += distillation / (2 * dim * batch) * std::pow(f.value[n * stride + d] - t.value[n * stride + d], 2);
    for (int64_t d = 0; d < dim; ++d)
      loss[2] += std::fabs(r) / reference * part(r > 0 ? 1 : -1, v.value[d]) * f.value[n * stride + d] / batch;
  }
  const double error = (wide == DType::f64 ? 0x1p-53 : 0x1p-24) * 64;
  close(losses.data(), wide, 4, loss.data(), error * 4, "losses", dim);
  close(logits.data(), wide, 3 * batch, logit.data(), error * 4, "logits", dim);
  close(residuals.data(), wide, 3 * batch, residual.data(), error * 4, "residuals", dim);
  close(grads.data(), wide, 2 * (dim + 1), grad.data(), error, "head_grads", dim);

  // All ones is NaN.
  std::vector<char> out(batch * dim * check::size_of(dtype), char(0xff));
  dgs::cpu::surgery_head_backward({.dtype = dtype,
                                   .order = order,
                                   .residuals = residuals.data(),
                                   .image_weight = w.memory.data(),
                                   .teacher_weight = v.memory.data(),
                                   .text_weight = text ? u.memory.data() : nullptr,
                                   .image_scale = scales.memory.data(),
                                   .alignment_scale = scales.memory.data() + width,
                                   .differences = distillation ? differences.data() : nullptr,
                                   .distillation_scale = scales.memory.data() + 2 * width,
                                   .batch = batch,
                                   .dim = dim,
                                   .reference_batch_size = double(asked),
                                   .eps = eps,
                                   .distillation = distillation,
                                   .grad_features = out.data(),
                                   .wide = wide == DType::f64},
                                  check::parallel_for);
  // Row by row what project_align does to the image loss's gradient.
  for (int64_t n = 0; n < batch; ++n) {
    Numbers row(dim), pull(dim), h(dim);
    long double inner = 0, square = 0;
    const long double ri = residual[n], rx = residual[batch + n], rt = residual[2 * batch + n];
    for (int64_t d = 0; d < dim; ++d) {
      row[d] = ri * scales.value[0] / batch * w.value[d];
      pull[d] = std::fabs(rt) / reference * scales.value[1] / batch * part(rt > 0 ? 1 : -1, v.value[d]);
      h[d] = text ? std::max(rx / reference * u.value[d], 0.0L) : 0;
      inner += (row[d] + (order == Order::align_first ? pull[d] : 0)) * h[d], square += h[d] * h[d];
    }
    const long double norm = std::sqrt(square) + eps;
    for (int64_t d = 0; d < dim; ++d) {
      const long double difference = f.value[n * stride + d] - t.value[n * stride + d];
      row[d] += pull[d] - inner / norm / norm * h[d] + distillation / (dim * batch) * scales.value[2] * difference;
    }
    close(out.data() + n * dim * check::size_of(dtype), dtype, dim, row.data(),
          error + (dtype == DType::f16 ? 0x1p-25 : 0), "grad_features", dim);
  }
}

}  // namespace

int main() {
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (bool text : {true, false})
      for (Order order : {Order::align_first, Order::project_first})
        for (auto [batch, dim] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {33, 123}, {1030, 24}, {17, 4097}})
          for (bool expert : {false, true}) compare(dtype, batch, dim, text, order, batch == 33 ? 32 : 0, expert);
  return check::result();
}
