// Runs CUDA kernels on the CPU: every thread of a cluster of blocks is a fiber of this one thread of the host.
// A fiber runs until it waits at a barrier or a shuffle. Shared memory starts as NaN. The order of blocks and
// of threads can be turned round, to show that no result depends on it. Then asynchronous copies land as late as
// they may, where in the forward order they land at once: neither a read too early nor a copy too early goes unseen.
// Shared memory is gone when its block has ended, so a block that ends before the others of its cluster have read is
// seen too.
#include <cuda_runtime.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <vector>

namespace shim {

int largest_cluster = 16;
int compiled_for = 90;
bool capturing = false;
int cache_bytes = 50 << 20;
bool (*on_launch)(const Launch*) = nullptr;
void (*after_block)() = nullptr;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedMemoryLimit = 227 << 10;
constexpr int kWarp = 32;
constexpr unsigned kPortableCluster = 8;

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
};
struct Warp {
  Barrier barrier;
  // Two, so that one barrier per exchange is enough.
  uint64_t slots[2][kWarp];
};
struct Block {
  uint3 index;
  // Threads that have not ended.
  unsigned rank, running;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
};
struct Copy {
  void* to;
  const void* from;
  size_t bytes, group;
};
// A fiber lives on from launch to launch, since making one takes system calls.
struct Fiber {
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  ucontext_t start;
  bool started = false;
  void* registers[5];
  void* sanitizer_stack = nullptr;
  Block* block;
  unsigned thread;
  bool done;
  // It waits while this generation is the one it arrived in.
  const unsigned* waits_for;
  unsigned generation;
  // The one that it arrived in last.
  unsigned cluster_generation;
  // Copies on their way.
  std::vector<Copy> copies;
  // How many groups of copies it has committed.
  size_t committed;
};

enum Order { kForward, kShuffled };
int order = kForward;
int launches = 0;
// In launches. 0: none fails.
int until_failure = 0;
Fiber* self = nullptr;
void* scheduler[5];
const void* scheduler_stack;
size_t scheduler_stack_size;
const std::function<void()>* body;
// Blocks of the running cluster.
std::vector<Block> blocks;
Barrier cluster;
std::vector<std::unique_ptr<Fiber>> fibers;
// Kernels that allow them.
std::set<const void*> large_clusters;

// swapcontext would do, but it asks the kernel for the signal mask every time. And the sanitizer takes a jump for the
// end of the frames it leaves: it would ask the kernel for the signal stack, and clear its marks off theirs.
[[noreturn, gnu::noinline, gnu::no_sanitize("address")]] void jump(void** to) { __builtin_longjmp(to, 1); }
[[gnu::noinline, gnu::no_sanitize("address")]] void switch_to(void** from, Fiber* fresh, void** to) {
  if (__builtin_setjmp(from)) return;
  if (fresh) setcontext(&fresh->start);
  jump(to);
}

void leave() {
  Fiber* fiber = self;
  __sanitizer_start_switch_fiber(&fiber->sanitizer_stack, scheduler_stack, scheduler_stack_size);
  switch_to(fiber->registers, nullptr, scheduler);
  __sanitizer_finish_switch_fiber(fiber->sanitizer_stack, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {
    (*body)();
    self->done = true;
    leave();
  }
}

void enter(Fiber& fiber) {
  self = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = fiber.block->index;
  Fiber* fresh = fiber.started ? nullptr : &fiber;
  if (fresh) {
    getcontext(&fiber.start);
    fiber.start.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    makecontext(&fiber.start, fiber_main, 0);
    fiber.started = true;
  }
  void* own_stack;
  __sanitizer_start_switch_fiber(&own_stack, fiber.stack.get(), kStackBytes);
  switch_to(scheduler, fresh, fiber.registers);
  __sanitizer_finish_switch_fiber(own_stack, nullptr, nullptr);
}

unsigned arrive(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return generation;
}

void wait(const Barrier& barrier, unsigned generation) {
  if (barrier.generation != generation) return;
  self->waits_for = &barrier.generation;
  self->generation = generation;
  leave();
}

void arrive_and_wait(Barrier& barrier) { wait(barrier, arrive(barrier)); }

void run_cluster(unsigned first_block, unsigned size, unsigned threads, size_t shared_bytes) {
  blocks.clear();
  blocks.resize(size);
  cluster = {size * threads};
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = blocks[rank];
    block.index = {first_block + rank, 0, 0};
    block.rank = rank;
    block.running = threads;
    block.barrier = {threads};
    block.warps.resize(threads / kWarp);
    for (Warp& warp : block.warps) warp.barrier = {kWarp};
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes)) std::abort();
    std::memset(memory, 0xff, shared_bytes);
    block.shared.reset(static_cast<unsigned char*>(memory));
  }
  size_t count = size * threads;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < count; ++i) {
    fibers[i]->block = &blocks[i / threads];
    fibers[i]->thread = i % threads;
    fibers[i]->done = false;
    fibers[i]->waits_for = nullptr;
    fibers[i]->copies.clear();
    fibers[i]->committed = 0;
  }
  for (size_t running = count, progress = 1; running;) {
    if (!progress) {
      std::fprintf(stderr, "host shim: threads wait at a barrier that the others of their block never reach\n");
      std::abort();
    }
    progress = 0;
    // All in turn, or each warp as far as it can go: then one may be a barrier ahead of the others.
    const size_t together = order == kShuffled ? kWarp : count;
    for (size_t first = 0, ran; first < count; first += ran ? 0 : together) {
      ran = 0;
      for (size_t k = first; k < first + together; ++k) {
        Fiber& fiber = *fibers[order == kForward ? k : count - 1 - k];
        if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.generation)) continue;
        fiber.waits_for = nullptr;
        enter(fiber);
        ++ran;
        if (!fiber.done) continue;
        --running;
        if (!--fiber.block->running) fiber.block->shared.reset();
      }
      progress += ran;
    }
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread_body) {
  unsigned size = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  unsigned grid = config.gridDim.x, threads = config.blockDim.x;
  bool one_dimensional = config.gridDim.y * config.gridDim.z * config.blockDim.y * config.blockDim.z == 1;
  if (!one_dimensional || !grid || !threads || threads > 1024 || threads % kWarp || grid % size ||
      size > unsigned(largest_cluster) || (size > kPortableCluster && !large_clusters.count(kernel)) ||
      (size > 1 && compiled_for < 90) || config.dynamicSmemBytes > kSharedMemoryLimit)
    return cudaErrorInvalidValue;
  if (until_failure && !--until_failure) return cudaErrorInvalidValue;
  ++launches;
  if (!thread_body) return cudaSuccess;
  body = &thread_body;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::vector<unsigned> clusters(grid / size);
  std::iota(clusters.begin(), clusters.end(), 0u);
  if (order == kShuffled) std::shuffle(clusters.begin(), clusters.end(), std::mt19937(launches));
  for (unsigned i : clusters) {
    run_cluster(i * size, size, threads, config.dynamicSmemBytes);
    if (after_block) after_block();
  }
  return cudaSuccess;
}

unsigned char* shared_memory() { return self->block->shared.get(); }
unsigned char* shared_memory(unsigned rank) { return blocks.at(rank).shared.get(); }
unsigned cluster_rank() { return self->block->rank; }
unsigned cluster_size() { return blocks.size(); }
void block_barrier() { arrive_and_wait(self->block->barrier); }
void arrive_at_cluster_barrier() { self->cluster_generation = arrive(cluster); }
void wait_at_cluster_barrier() { wait(cluster, self->cluster_generation); }
void allow_large_clusters(const void* kernel) { large_clusters.insert(kernel); }
int most_clusters(const cudaLaunchConfig_t& config) {
  return config.attrs[0].val.clusterDim.x <= unsigned(largest_cluster);
}

uint64_t exchange(uint64_t value, unsigned source_lane) {
  Warp& warp = self->block->warps[self->thread / kWarp];
  uint64_t* slots = warp.slots[warp.barrier.generation % 2];
  slots[self->thread % kWarp] = value;
  arrive_and_wait(warp.barrier);
  return slots[source_lane];
}

unsigned ballot(bool predicate) {
  Warp& warp = self->block->warps[self->thread / kWarp];
  uint64_t* slots = warp.slots[warp.barrier.generation % 2];
  exchange(predicate, 0);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= static_cast<unsigned>(slots[lane]) << lane;
  return votes;
}

void copy(void* to, const void* from, size_t bytes) {
  if (order == kForward)
    std::memcpy(to, from, bytes);
  else
    self->copies.push_back({to, from, bytes, self->committed});
}

void commit_copies() { ++self->committed; }

void wait_for_copies(size_t prior) {
  auto first = self->copies.begin(), end = first;
  for (; end != self->copies.end() && end->group + prior < self->committed; ++end)
    std::memcpy(end->to, end->from, end->bytes);
  self->copies.erase(first, end);
}

}  // namespace shim

// For the tests, through ctypes.
extern "C" void shim_set_order(int order) { shim::order = order; }
extern "C" void shim_set_largest_cluster(int size) { shim::largest_cluster = size; }
extern "C" void shim_set_compiled_for(int architecture) { shim::compiled_for = architecture; }
extern "C" void shim_set_capturing(bool capturing) { shim::capturing = capturing; }
extern "C" void shim_set_cache_bytes(int bytes) { shim::cache_bytes = bytes; }
extern "C" void shim_on_launch(bool (*call)(const shim::Launch*)) { shim::on_launch = call; }
extern "C" void shim_after_block(void (*call)()) { shim::after_block = call; }
extern "C" void shim_fail_launch(int which) { shim::until_failure = which; }
extern "C" int shim_launches() { return shim::launches; }
