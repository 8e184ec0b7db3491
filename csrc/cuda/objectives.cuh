// Lists of objectives cut into chunks, one per block: what gramian and combine_ have in common.
#pragma once

#include "tables.cuh"

namespace dgs::cuda {

struct ChunkedObjectives {
  Tables tables;
  int64_t num_groups;
  int count;
  void* gramian;
  const void* weights;
  int64_t weights_stride;

  ChunkedObjectives(const Objectives& given, const Tables& tables)
      : tables(tables),
        num_groups(given.num_groups),
        count(given.count),
        gramian(given.gramian),
        weights(given.weights),
        weights_stride(given.weights_stride) {}
};

template <typename T, bool Aligned>
struct ObjectivesChunk : ChunkAt<T, Aligned, ObjectivesTensor> {
  using ChunkAt<T, Aligned, ObjectivesTensor>::ChunkAt;

  // Null beyond the last objective.
  __device__ __forceinline__ const T* objective(int k) const {
    return this->at(static_cast<const T*>(this->tensor->objectives[k]));
  }
};

}  // namespace dgs::cuda
