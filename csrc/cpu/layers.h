// What the kernels on lists of tensors share: tensors sorted by layer, pieces of them, and threads that take turns.
#pragma once

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../objectives.h"
#include "parallel.h"

namespace dgs::cpu {

// body(i) for i from 0 to count, `grain` at a time by whichever thread comes first: a thread that has to be woken,
// which takes as long as tens of small tensors, finds less to do instead of keeping the others waiting.
template <typename Body>
void in_turns(ParallelFor parallel_for, int64_t count, int64_t grain, Body body) {
  std::atomic<int64_t> next = 0;
  auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(grain)) < count;)
      for (int64_t i = begin; i < std::min(count, begin + grain); ++i) body(i);
  };
  using Work = decltype(work);
  parallel_for(count, grain, [](int64_t, int64_t, void* mine) { (*static_cast<Work*>(mine))(); }, &work);
}

// The tensors of each group (layer), in the order of their list.
struct ByGroup {
  // Group g has tensors[begin[g]] to tensors[begin[g + 1]].
  std::vector<int64_t> begin, elements, tensors;

  template <typename Tensor>
  ByGroup(const Tensor* list, int64_t count, int64_t num_groups)
      : begin(num_groups + 1), elements(num_groups), tensors(count) {
    for (int64_t i = 0; i < count; ++i) {
      ++begin[list[i].group + 1];
      elements[list[i].group] += list[i].numel;
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < count; ++i) tensors[next[list[i].group]++] = i;
  }
};

// What a thread takes at a time: up to `size` elements of one group, from element `at` of its tensor `first` on, and
// on through the tensors behind it.
struct Piece {
  int64_t group, first, at, size;
};

// A list cut into pieces, sorted by group; every element is in one.
class Pieces {
  static constexpr int64_t piece_size = 65536;
  const ByGroup groups_;
  int64_t elements_ = 0;
  std::vector<Piece> pieces_;

 public:
  template <typename Tensor>
  Pieces(const Tensor* list, int64_t count, int64_t num_groups) : groups_(list, count, num_groups) {
    for (int64_t group = 0; group < num_groups; ++group) {
      elements_ += groups_.elements[group];
      int64_t i = groups_.begin[group], at = 0;
      for (int64_t left = groups_.elements[group]; left;) {
        const int64_t size = std::min(piece_size, left);
        pieces_.push_back({group, i, at, size});
        left -= size;
        at += size;
        for (; left && at >= list[groups_.tensors[i]].numel; ++i) at -= list[groups_.tensors[i]].numel;
      }
    }
  }

  int64_t size() const { return pieces_.size(); }
  const Piece& operator[](int64_t i) const { return pieces_[i]; }

  // body(i) for every piece, on all threads.
  template <typename Body>
  void run(ParallelFor parallel_for, Body body) const {
    if (pieces_.empty()) return;
    const int64_t each = std::max<int64_t>(1, elements_ / size());
    in_turns(parallel_for, size(), std::max<int64_t>(1, work_per_thread / each), body);
  }

  // body(tensor, begin, size) for blocks of a piece, each of one tensor.
  template <typename Tensor, typename Body>
  void for_blocks(const Piece& piece, const Tensor* list, int64_t block, Body body) const {
    int64_t left = piece.size, at = piece.at;
    for (int64_t i = piece.first; left; ++i, at = 0) {
      const Tensor& tensor = list[groups_.tensors[i]];
      for (; left && at < tensor.numel;) {
        const int64_t size = std::min({block, left, tensor.numel - at});
        body(tensor, at, size);
        at += size;
        left -= size;
      }
    }
  }
};

// Of every objective: they are read side by side.
constexpr int64_t objectives_block = 2048;

}  // namespace dgs::cpu
