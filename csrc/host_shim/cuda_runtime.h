// Stands in for CUDA's header of the same name, so that a host C++ compiler builds the kernels in csrc/cuda
// unchanged and runs them on the CPU: a block's threads are fibers, scheduled round robin at barriers and
// shuffles (fibers.cpp); the blocks of a cluster run together, clusters one after the other.
#pragma once

// It has the overloads for float in the global namespace, as CUDA has them.
#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __host__
#define __device__
// The compiler decides: with sanitizers, a copy in every kernel takes long to compile.
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The running fiber's own, set at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14
};
enum cudaDeviceAttr { cudaDevAttrL2CacheSize = 38, cudaDevAttrClusterLaunch = 120 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace shim {

// What a GPU would be told of a launch.
struct Launch {
  const void* kernel;
  unsigned grid, threads, cluster, shared_bytes;
  const void* params;
  uint64_t params_bytes;
};
// If not null, it sees each launch and says whether to run it.
extern bool (*on_launch)(const Launch*);
// If not null, it is called when a block has ended, or a cluster.
extern void (*after_block)();

// Without a body it only counts the launch.
cudaError_t run(const cudaLaunchConfig_t&, const void* kernel, const std::function<void()>& thread_body);
void allow_large_clusters(const void* kernel);
// How many clusters run at once.
int most_clusters(const cudaLaunchConfig_t&);
// The running block's, exactly as large as asked for.
unsigned char* shared_memory();
// That of another block of the cluster.
unsigned char* shared_memory(unsigned rank);
unsigned cluster_rank();
unsigned cluster_size();
void block_barrier();
void arrive_at_cluster_barrier();
void wait_at_cluster_barrier();
// What source_lane passed, after a warp barrier.
uint64_t exchange(uint64_t value, unsigned source_lane);
unsigned ballot(bool predicate);
// It lands at once or when it is waited for, as the order has it.
void copy(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t prior);
// 1: there are none; more than 8 for kernels that allow it.
extern int largest_cluster;
// The virtual architecture of the code that was loaded, as 90.
extern int compiled_for;
extern bool capturing;
// Of the L2 cache.
extern int cache_bytes;

template <typename T>
T shuffle(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace shim

template <typename P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& params) {
  const shim::Launch launch{reinterpret_cast<const void*>(kernel),
                            config->gridDim.x,
                            config->blockDim.x,
                            config->numAttrs ? config->attrs[0].val.clusterDim.x : 1,
                            static_cast<unsigned>(config->dynamicSmemBytes),
                            &params,
                            sizeof(P)};
  if (shim::on_launch && !shim::on_launch(&launch)) return shim::run(*config, launch.kernel, nullptr);
  return shim::run(*config, launch.kernel, [=] { kernel(params); });
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid launch"; }
inline cudaError_t cudaGetLastError() { return cudaErrorInvalidValue; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed)
    shim::allow_large_clusters(reinterpret_cast<const void*>(kernel));
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config) {
  return *count = shim::most_clusters(*config), cudaSuccess;
}
// Every kind of device has its own number, as what is known of one does not hold for another.
inline cudaError_t cudaGetDevice(int* device) { return *device = shim::largest_cluster, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = which == cudaDevAttrL2CacheSize ? shim::cache_bytes : shim::largest_cluster > 1, cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
  return attributes->ptxVersion = shim::compiled_for, cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatus(shim::capturing), cudaSuccess;
}

inline void __syncthreads() { shim::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { shim::exchange(0, threadIdx.x % 32); }
inline unsigned __ballot_sync(unsigned, bool predicate) { return shim::ballot(predicate); }

template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  unsigned lane = threadIdx.x % 32;
  return shim::shuffle(value, lane / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::shuffle(value, threadIdx.x % 32 ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  unsigned lane = threadIdx.x % 32;
  return shim::shuffle(value, lane + delta < 32 ? lane + delta : lane);
}
