// gramian on the CPU. Threads take pieces of a layer. Of each block, small enough for the cache, the products of all
// pairs are summed before the next is read, so memory is read once; they are made in tiles of at most four by four
// objectives, whose sums stay in registers.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../objectives.h"
#include "lanes.h"
#include "layers.h"

namespace dgs::cpu {
namespace {

// Elements; they are summed in vector lanes, and in double over the blocks in their order.
constexpr int64_t block = objectives_block;

// Rows of one block.
template <typename T, int rows>
struct Rows {
  const T* at[rows];
};

// sums[a, b] += <left row a, right row b>; with `triangle` the rows are the same ones, and only b >= a is summed.
template <int rows, int columns, bool triangle, typename T>
DGS_INLINE void products(const Rows<T, rows> left, const Rows<T, columns> right, int64_t size, double* sums) {
  using F = decltype(load(T()));
  Lanes<F> total[rows][columns];
  const auto add = [&](const T* const* left, const T* const* right) {
    Lanes<F> x[rows], y[columns];
    for (int a = 0; a < rows; ++a) read(left[a], x[a]);
    for (int b = 0; b < columns; ++b) read(right[b], y[b]);
    for (int a = 0; a < rows; ++a)
      for (int b = triangle ? a : 0; b < columns; ++b) total[a][b].of += x[a].of * y[b].of;
  };
  constexpr int64_t lanes = Lanes<F>::count;
  const T *x[rows], *y[columns];
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    for (int a = 0; a < rows; ++a) x[a] = left.at[a] + i;
    for (int b = 0; b < columns; ++b) y[b] = right.at[b] + i;
    add(x, y);
  }
  if (i < size) {
    T rest[rows + columns][lanes] = {};
    for (int a = 0; a < rows; ++a) std::memcpy(rest[a], left.at[a] + i, (size - i) * sizeof(T)), x[a] = rest[a];
    for (int b = 0; b < columns; ++b)
      std::memcpy(rest[rows + b], right.at[b] + i, (size - i) * sizeof(T)), y[b] = rest[rows + b];
    add(x, y);
  }
  for (int a = 0; a < rows; ++a)
    for (int b = triangle ? a : 0; b < columns; ++b)
      for (int64_t l = 0; l < lanes; ++l) sums[a * columns + b] += total[a][b].of[l];
}

// Multiversioning is for plain functions only, hence the list.
#define DGS_KERNELS(T)                                                                                    \
  DGS_MULTIVERSION void triangle(const Rows<T, 2>& x, int64_t size, double* sums) {                       \
    products<2, 2, true>(x, x, size, sums);                                                               \
  }                                                                                                       \
  DGS_MULTIVERSION void triangle(const Rows<T, 4>& x, int64_t size, double* sums) {                       \
    products<4, 4, true>(x, x, size, sums);                                                               \
  }                                                                                                       \
  DGS_MULTIVERSION void rectangle(const Rows<T, 4>& x, const Rows<T, 2>& y, int64_t size, double* sums) { \
    products<4, 2, false>(x, y, size, sums);                                                              \
  }
DGS_KERNELS(float)
DGS_KERNELS(double)
DGS_KERNELS(bf16)
#undef DGS_KERNELS

// The Gramian of one piece of a layer; of a pair (i, j) only i <= j counts.
struct Sums {
  double at[max_objectives][max_objectives] = {};

  template <int rows, int columns>
  void add(int first_row, int first_column, const double (&tile)[rows * columns]) {
    for (int a = 0; a < rows; ++a)
      for (int b = 0; b < columns; ++b) at[first_row + a][first_column + b] += tile[a * columns + b];
  }
};

// Objectives beyond the last one stand for the first: what they add to the sums lies outside of the result.
template <typename T, int rows>
DGS_INLINE Rows<T, rows> rows_from(const T* const (&x)[max_objectives], int first) {
  Rows<T, rows> chosen;
  for (int n = 0; n < rows; ++n) chosen.at[n] = x[first + n];
  return chosen;
}

template <typename T>
void add_block(const T* const (&x)[max_objectives], int count, int64_t size, Sums& sums) {
  if (count == 2) {
    double tile[4] = {};
    triangle(rows_from<T, 2>(x, 0), size, tile);
    return sums.add<2, 2>(0, 0, tile);
  }
  for (int i = 0; i < count; i += 4) {
    const auto rows = rows_from<T, 4>(x, i);
    double tile[16] = {};
    triangle(rows, size, tile);
    sums.add<4, 4>(i, i, tile);
    for (int j = i + 4; j < count; j += 2) {
      double tile[8] = {};
      rectangle(rows, rows_from<T, 2>(x, j), size, tile);
      sums.add<4, 2>(i, j, tile);
    }
  }
}

template <typename T>
Sums sums_of(const Objectives& o, const Pieces& pieces, const Piece& piece) {
  using Seen = typename Widened<T>::Seen;
  Sums sums;
  Widened<T, block> blocks[max_objectives];
  pieces.for_blocks(piece, o.tensors, block, [&](const ObjectivesTensor& t, int64_t at, int64_t size) {
    const Seen* x[max_objectives] = {};
    for (int k = 0; k < max_objectives; ++k) x[k] = k < o.count ? blocks[k].of(t.objectives[k], at, size) : x[0];
    add_block(x, o.count, size, sums);
  });
  return sums;
}

template <typename T>
void gramian(const Objectives& o, ParallelFor parallel_for) {
  using F = decltype(load(typename Widened<T>::Seen()));
  const Pieces pieces(o.tensors, o.num_tensors, o.num_groups);
  const int size = o.count * o.count;
  std::vector<double> parts(pieces.size() * size);
  pieces.run(parallel_for, [&](int64_t i) {
    const Sums sums = sums_of<T>(o, pieces, pieces[i]);
    for (int a = 0; a < o.count; ++a) std::copy_n(sums.at[a], o.count, &parts[i * size + a * o.count]);
  });
  int64_t next = 0;
  for (int64_t group = 0; group < o.num_groups; ++group) {
    double total[max_objectives * max_objectives] = {};
    for (; next < pieces.size() && pieces[next].group == group; ++next)
      for (int n = 0; n < size; ++n) total[n] += parts[next * size + n];
    F* out = static_cast<F*>(o.gramian) + group * size;
    for (int a = 0; a < o.count; ++a)
      for (int b = a; b < o.count; ++b) out[a * o.count + b] = out[b * o.count + a] = F(total[a * o.count + b]);
  }
}

}  // namespace

void gramian(const Objectives& o, ParallelFor parallel_for) {
  dispatch(o.dtype, [&](auto zero) { gramian<decltype(zero)>(o, parallel_for); });
}

}  // namespace dgs::cpu
