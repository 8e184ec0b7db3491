// Tables of lists of tensors in device memory. A training step works on the same tensors again and again: their
// tables are kept, found again by comparing all that they were made from, and then the host does nothing but look.
//
// Tables of another stream are not shared: nothing would order their making before their use, or their use before
// the end of their memory. Under graph capture they are made anew, inside the graph and in its memory, so that a
// graph depends on nothing outside.
#include <algorithm>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <numeric>
#include <tuple>

#include "tables.cuh"

namespace dgs::cuda {
namespace {

// Lists whose tables are kept; an optimiser has one for each of its calls and streams.
constexpr size_t kKept = 32;

// Of a group, whose sums every block that edits adds up by itself. Those of more take a launch of their own.
constexpr int64_t kMostChunksAdded = 2 * kListThreads;

struct Piece {
  void* to;
  int64_t count;
  // With the rest they are just under the 4096 bytes that a kernel's arguments may take.
  uint4 bits[248];
};

__global__ void write_piece(const __grid_constant__ Piece p) {
  if (threadIdx.x < p.count) static_cast<uint4*>(p.to)[threadIdx.x] = p.bits[threadIdx.x];
}

// What a record begins with; the rest of it is pointers.
struct Size {
  int64_t numel, group;
};

struct RecordsAt {
  const unsigned char* data;
  int64_t bytes_each;

  __host__ __device__ const Size& operator[](int64_t i) const {
    return *reinterpret_cast<const Size*>(data + i * bytes_each);
  }
  __host__ __device__ bool divide_by_16(int64_t i) const {
    const uintptr_t* pointers = reinterpret_cast<const uintptr_t*>(&(*this)[i] + 1);
    uintptr_t bits = 0;
    for (int64_t n = 0; n < num_pointers(); ++n) bits |= pointers[n];
    return bits % 16 == 0;
  }
  // That a tensor has memory behind.
  int64_t arrays(int64_t i) const {
    const uintptr_t* pointers = reinterpret_cast<const uintptr_t*>(&(*this)[i] + 1);
    return num_pointers() - std::count(pointers, pointers + num_pointers(), 0);
  }
  __host__ __device__ int64_t num_pointers() const { return (bytes_each - sizeof(Size)) / sizeof(uintptr_t); }
};

struct Cut {
  RecordsAt tensors;
  // Where a tensor's chunks begin among all of them.
  const int64_t* begin;
  // Records of a tensor, each with a chunk behind it.
  unsigned char* chunks;
  int64_t chunk_size, pack;
};

// One block per tensor.
__global__ void cut_tensors(const __grid_constant__ Cut p) {
  const Size& tensor = p.tensors[blockIdx.x];
  const int64_t* words = reinterpret_cast<const int64_t*>(&tensor);
  const int64_t record_words = p.tensors.bytes_each / 8;
  bool aligned = p.tensors.divide_by_16(blockIdx.x);
  int64_t numel = tensor.numel, begin = p.begin[blockIdx.x], end = p.begin[blockIdx.x + 1];
  for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
    int64_t offset = (c - begin) * p.chunk_size, count = numel - offset;
    bool whole = count >= p.chunk_size || count % p.pack == 0;
    int64_t* record = reinterpret_cast<int64_t*>(p.chunks + c * (p.tensors.bytes_each + sizeof(Chunk)));
    for (int64_t n = 0; n < record_words; ++n) record[n] = words[n];
    *reinterpret_cast<Chunk*>(record + record_words) = {offset, static_cast<int32_t>(blockIdx.x), aligned && whole};
  }
}

// Half of the current device's L2 cache: a device may have two, and keep in both what both of its halves read.
int64_t bytes_of_a_turn() {
  int device = 0, bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device) == cudaSuccess && bytes > 0;
  return known ? bytes / 2 : INT64_MAX;
}

constexpr int64_t round_up(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

std::shared_ptr<const KeptTables> make(const Records& list, const Allocate& allocate, Lifetime lifetime, void* stream,
                                       const char*& error) {
  const RecordsAt tensors{static_cast<const unsigned char*>(list.tensors), list.bytes_each};
  const int64_t count = list.count, groups = list.num_groups;
  const int64_t width = list.dtype == DType::f64 ? 8 : list.dtype == DType::f32 ? 4 : 2, pack = 16 / width;
  bool aligned = true;
  for (int64_t i = 0; i < count; ++i) aligned &= tensors.divide_by_16(i) && tensors[i].numel % pack == 0;
  // kShare depends on whether a type has 8 bytes alone.
  const int64_t chunk_size = width == 8 ? (aligned ? kChunk<double, true> : kChunk<double, false>)
                                        : (aligned ? kChunk<float, true> : kChunk<float, false>);

  auto made = std::make_shared<KeptTables>();
  made->order.resize(count);
  std::iota(made->order.begin(), made->order.end(), 0);
  std::stable_sort(made->order.begin(), made->order.end(),
                   [&](int64_t a, int64_t b) { return tensors[a].group < tensors[b].group; });
  std::vector<int64_t> begin{0}, group_begin(groups + 1), group_bytes(groups);
  for (int64_t i : made->order) {
    const int64_t chunks = ceil_div(tensors[i].numel, chunk_size);
    begin.push_back(begin.back() + chunks);
    group_begin[tensors[i].group + 1] += chunks;
    group_bytes[tensors[i].group] += tensors[i].numel * width * tensors.arrays(i);
  }
  const int64_t longest = groups ? *std::max_element(group_begin.begin(), group_begin.end()) : 0;
  std::partial_sum(group_begin.begin(), group_begin.end(), group_begin.begin());
  made->turns = turns_of(group_begin, group_bytes, list.in_turns ? bytes_of_a_turn() : INT64_MAX);

  // One allocation: tensors, begin, group_begin, which are sent; chunks, partials, which the device makes.
  const int64_t num_chunks = begin.back();
  const int64_t begin_at = count * list.bytes_each, groups_at = begin_at + begin.size() * 8;
  const int64_t chunks_at = round_up(groups_at + group_begin.size() * 8);
  const int64_t partials_at = chunks_at + num_chunks * (list.bytes_each + sizeof(Chunk));
  std::vector<unsigned char> sent(chunks_at);
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(&sent[i * list.bytes_each], &tensors[made->order[i]], list.bytes_each);
  std::memcpy(&sent[begin_at], begin.data(), begin.size() * 8);
  std::memcpy(&sent[groups_at], group_begin.data(), group_begin.size() * 8);

  made->memory = allocate(partials_at + num_chunks * list.sums * (width == 8 ? 8 : 4), lifetime);
  unsigned char* memory = static_cast<unsigned char*>(made->memory.get());
  unsigned char* chunks = memory + chunks_at;
  made->device = {
      chunks, reinterpret_cast<const int64_t*>(memory + groups_at), memory + partials_at, num_chunks, longest, aligned};
  const Cut cut{
      {memory, list.bytes_each}, reinterpret_cast<const int64_t*>(memory + begin_at), chunks, chunk_size, pack};
  error = write_bytes(memory, sent.data(), chunks_at, stream);
  if (!error) error = launch(cut_tensors, count, kListThreads, 0, stream, cut);
  return error ? nullptr : made;
}

// What tables are made from: every byte of it decides whether they fit.
struct Key {
  void* stream;
  int device;
  DType dtype;
  int64_t num_groups, bytes_each, sums;
  std::vector<unsigned char> tensors;

  auto parts() const { return std::tie(stream, device, dtype, num_groups, bytes_each, sums, tensors); }
};

// Whether the current device has clusters and the code that was loaded for it their instructions: code for sm_80 that
// the driver compiles anew for a later device has none. All kernels of the library are compiled alike.
bool has_clusters() {
  int device = 0, value = 0;
  cudaFuncAttributes loaded{};
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&value, cudaDevAttrClusterLaunch, device) == cudaSuccess && value &&
         cudaFuncGetAttributes(&loaded, cut_tensors) == cudaSuccess && loaded.ptxVersion >= 90;
}

}  // namespace

bool grants_cluster(const void* kernel, int64_t blocks, int threads, int shared_bytes) {
  if (blocks <= 1) return true;
  if (blocks > kLargestCluster || !has_clusters()) return false;

  static std::mutex mutex;
  static auto& known = *new std::map<std::tuple<int, const void*, int64_t, int>, bool>;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const std::lock_guard lock(mutex);
  const auto [entry, fresh] = known.try_emplace({device, kernel, blocks, threads}, false);
  if (fresh) {
    const LaunchConfig config(blocks, threads, shared_bytes, nullptr, static_cast<int>(blocks));
    int at_once = 0;
    entry->second = (blocks <= kMaxCluster ||
                     cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess) &&
                    cudaOccupancyMaxActiveClusters(&at_once, kernel, &config) == cudaSuccess && at_once > 0;
    // The error, if there is one, is not the caller's.
    cudaGetLastError();
  }
  return entry->second;
}

std::vector<Turn> turns_of(const std::vector<int64_t>& group_begin, const std::vector<int64_t>& group_bytes,
                           int64_t most_bytes) {
  std::vector<Turn> turns;
  int64_t bytes = 0;
  for (int64_t g = 0; g < int64_t(group_bytes.size()); ++g) {
    bytes += group_bytes[g];
    if (turns.empty() || bytes > most_bytes) {
      turns.push_back({{g, g}, {group_begin[g], group_begin[g]}, false});
      bytes = group_bytes[g];
    }
    Turn& turn = turns.back();
    turn.groups.end = g + 1, turn.chunks.end = group_begin[g + 1];
    const int64_t chunks = group_begin[g + 1] - group_begin[g];
    turn.added |= chunks == 0 || chunks > kMostChunksAdded;
  }
  return turns;
}

const char* write_bytes(void* to, const void* from, int64_t bytes, void* stream) {
  constexpr int64_t limit = sizeof(Piece::bits);
  for (int64_t at = 0; at < bytes; at += limit) {
    Piece piece{static_cast<unsigned char*>(to) + at, std::min(limit, bytes - at) / 16, {}};
    std::memcpy(piece.bits, static_cast<const unsigned char*>(from) + at, piece.count * 16);
    if (const char* error = launch(write_piece, 1, 256, 0, stream, piece)) return error;
  }
  return nullptr;
}

std::shared_ptr<const KeptTables> tables_of(const Records& list, const Allocate& allocate, void* stream,
                                            const char*& error) {
  static std::mutex mutex;
  // Most recent first. Never freed: when a process ends, there may be no device any more to free memory on.
  static auto& kept = *new std::list<std::pair<Key, std::shared_ptr<const KeptTables>>>;

  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const unsigned char* const bytes = static_cast<const unsigned char*>(list.tensors);
  Key key{stream,
          0,
          list.dtype,
          list.num_groups,
          list.bytes_each,
          list.sums,
          {bytes, bytes + list.count * list.bytes_each}};
  cudaError_t status = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
  if (status == cudaSuccess) status = cudaGetDevice(&key.device);
  if (status != cudaSuccess) return error = cudaGetErrorString(status), nullptr;
  if (capture != cudaStreamCaptureStatusNone) return make(list, allocate, Lifetime::call, stream, error);

  const std::lock_guard lock(mutex);
  auto found =
      std::find_if(kept.begin(), kept.end(), [&](const auto& entry) { return entry.first.parts() == key.parts(); });
  if (found != kept.end()) {
    kept.splice(kept.begin(), kept, found);
  } else {
    auto made = make(list, allocate, Lifetime::longer, stream, error);
    if (!made) return nullptr;
    kept.emplace_front(std::move(key), std::move(made));
    if (kept.size() > kKept) kept.pop_back();
  }
  return kept.front().second;
}

}  // namespace dgs::cuda
