// What a list of tensors becomes on the device: a table of its tensors and one of its chunks, which are sorted by
// group. Made by kernels whose arguments carry the addresses, kept from call to call; tables.cu tells how.
#pragma once

#include "common.cuh"

namespace dgs::cuda {

// So few that AdamW's seven arrays find registers.
constexpr int kListThreads = 256;
// Blocks that a multiprocessor is to hold: two of them have 128 registers a thread, too few for fp64.
template <typename T>
constexpr int kListBlocks = sizeof(T) == 8 ? 1 : 2;

// What one block works on: consecutive elements of one tensor.
template <typename T, bool Aligned>
constexpr int64_t kChunk = int64_t(kListThreads) * kShare<T, Aligned>;

struct Chunk {
  int64_t offset;
  // The tensor's place in the order of the table.
  int32_t place;
  // Whether it can be accessed 16 bytes at a time.
  int32_t wide;
};

// How it lies in the table: behind a copy of its tensor's record, so that one load and not two lead to the data.
template <typename Tensor>
struct ChunkRecord {
  Tensor tensor;
  Chunk chunk;
};

// Places one after the other.
struct Range {
  int64_t begin, end;
  __host__ __device__ int64_t count() const { return end - begin; }
};

// Groups that are read again before what came with their first reading has left the L2 cache.
struct Turn {
  Range groups, chunks;
  // Whether a launch of its own adds up its chunks' sums, as a group has many chunks or none.
  bool added;
};

// Cuts groups into turns of at most `most_bytes`, and of one group where it alone has more. A group is never cut, so
// that no sum depends on the turns. From where each group's chunks begin, and the bytes it is read from and written to.
std::vector<Turn> turns_of(const std::vector<int64_t>& group_begin, const std::vector<int64_t>& group_bytes,
                           int64_t most_bytes);

struct Tables {
  // Records [num_chunks], sorted by group, otherwise in the order of the list.
  const void* chunks;
  // [num_groups + 1]: a group's chunks are group_begin[g] to group_begin[g + 1].
  const int64_t* group_begin;
  // Room for `sums` numbers of the compute type for each chunk.
  void* partials;
  int64_t num_chunks, max_group_chunks;
  // Whether every chunk of every tensor can be accessed 16 bytes at a time.
  bool aligned;
};

struct KeptTables {
  Tables device;
  std::vector<Turn> turns;
  // The table's tensors as places in the list.
  std::vector<int64_t> order;
  std::shared_ptr<void> memory;
};

// A list as its tables are made from it. A record holds a tensor's numel and group, then nothing but pointers.
struct Records {
  DType dtype;
  int64_t num_groups;
  // Records in the host's memory.
  const void* tensors;
  int64_t count, bytes_each;
  // Partial sums of each chunk.
  int64_t sums;
  // Whether groups are worked on in turns, or all in one launch.
  bool in_turns;

  template <typename List>
  Records(const List& list, int64_t sums, bool in_turns = false)
      : dtype(list.dtype),
        num_groups(list.num_groups),
        tensors(list.tensors),
        count(list.num_tensors),
        bytes_each(sizeof(*list.tensors)),
        sums(sums),
        in_turns(in_turns) {}
};

// The tables of a list, or null and what went wrong. They are ready for what `stream` runs next; the caller keeps
// them until it has enqueued that.
std::shared_ptr<const KeptTables> tables_of(const Records&, const Allocate&, void* stream, const char*& error);

// A chunk, with a pointer to any of its tensor's arrays of T.
template <typename T, bool Aligned, typename Tensor>
struct ChunkAt {
  const Tensor* tensor;
  int64_t offset, count, group;
  // The tensor's place in its table.
  int32_t place;
  // Whether this chunk can be accessed 16 bytes at a time.
  bool wide;

  __device__ __forceinline__ ChunkAt(const Tables& tables, int64_t index) {
    const ChunkRecord<Tensor>& record = static_cast<const ChunkRecord<Tensor>*>(tables.chunks)[index];
    tensor = &record.tensor;
    offset = record.chunk.offset;
    place = record.chunk.place;
    group = tensor->group;
    count = tensor->numel - offset < kChunk<T, Aligned> ? tensor->numel - offset : kChunk<T, Aligned>;
    wide = Aligned || record.chunk.wide;
  }
  template <typename P>
  __device__ __forceinline__ P* at(P* array) const {
    return array ? array + offset : nullptr;
  }
};

// Copies `bytes`, a multiple of 16, to the device as kernel arguments: nothing on the host has to outlive the call,
// pinned or not, and a captured graph contains them.
const char* write_bytes(void* to, const void* from, int64_t bytes, void* stream);

}  // namespace dgs::cuda
