// What the CUDA kernels share: storage types in 16-byte packs, sums in a fixed order, and launching.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <vector>

#include "kernels.h"

namespace dgs::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kMaxThreads = 512;
// The largest cluster that a whole device grants unasked; a slice of one may not.
constexpr int kMaxCluster = 8;
// Some devices grant this many, if asked.
constexpr int kLargestCluster = 16;

template <typename T>
struct Storage {
  using Compute = float;
};
template <>
struct Storage<double> {
  using Compute = double;
};
template <typename T>
using Compute = typename Storage<T>::Compute;

// Elements in 16 bytes, and elements of a row that a thread keeps in registers: as many as leave room for two
// rows in the compute type without spilling. Off the aligned path addresses and masks need registers too.
template <typename T>
constexpr int kPack = 16 / sizeof(T);
template <typename T, bool Aligned>
constexpr int kShare = (Aligned ? 32 : 16) / (sizeof(T) == 8 ? 2 : 1);

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

template <typename T>
struct alignas(16) Pack {
  T at[kPack<T>];
};

// An element in the compute type. Halves of a word are told apart without registers of 16 bits.
template <typename T>
__device__ __forceinline__ Compute<T> element(const Pack<T>& pack, int j) {
  return widen(pack.at[j]);
}
__device__ __forceinline__ float element(const Pack<__nv_bfloat16>& pack, int j) {
  unsigned word;
  memcpy(&word, &pack.at[j & ~1], 4);
  word = j % 2 ? word & 0xffff0000u : word << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// Where a thread's j-th element of its v-th pack lies in a row shared by `lanes` threads. Off the aligned path
// neighbouring threads take neighbouring elements, which is the best that narrow accesses can do.
template <typename T, bool Aligned>
__device__ __forceinline__ int position(int v, int j, int lane, int lanes) {
  return Aligned ? (v * lanes + lane) * kPack<T> + j : (v * kPack<T> + j) * lanes + lane;
}

// The same address. Of one that a table holds, the compiler does not know that it is of no shared and no local memory,
// and would have the hardware look at every access.
template <bool Listed, typename T>
__device__ __forceinline__ T* in_global_memory(T* address) {
#ifdef __CUDACC__
  if constexpr (Listed) __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// A null row, and what lies beyond `count` elements, is zeros: they add nothing to any sum. `wide` lets a call use
// 16-byte accesses where not every one can. `Listed` are rows whose address a table holds.
template <typename T, bool Aligned, bool Listed = false>
__device__ __forceinline__ Pack<T> load(const T* row, int v, int lane, int lanes, int64_t count, bool wide = Aligned) {
  Pack<T> pack;
  if (!row) count = 0;
  if (Aligned || wide) {
    int i = position<T, true>(v, 0, lane, lanes);
    uint4 bits = i < count ? *reinterpret_cast<const uint4*>(in_global_memory<Listed>(row + i)) : uint4{0, 0, 0, 0};
    memcpy(&pack, &bits, 16);
  } else {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      int i = position<T, false>(v, j, lane, lanes);
      narrow(Compute<T>(0), pack.at[j]);
      if (i < count) pack.at[j] = *in_global_memory<Listed>(row + i);
    }
  }
  return pack;
}

// The compiler cannot split this store into narrower ones, as it does at times with others.
template <typename T>
__device__ __forceinline__ void store_whole(T* to, const Pack<T>& pack) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(to), "d"(pack.at[0]), "d"(pack.at[1]) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(pack.at[0]), "f"(pack.at[1]),
                 "f"(pack.at[2]), "f"(pack.at[3])
                 : "memory");
  } else {
    uint4 bits;
    memcpy(&bits, &pack, 16);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                 "r"(bits.w)
                 : "memory");
  }
#else
  memcpy(to, &pack, 16);
#endif
}

template <typename T, bool Aligned, bool Listed = false>
__device__ __forceinline__ void store(T* row, const Pack<T>& pack, int v, int lane, int lanes, int64_t count,
                                      bool wide = Aligned) {
  if (Aligned || wide) {
    int i = position<T, true>(v, 0, lane, lanes);
    if (i < count) store_whole(row + i, pack);
  } else {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      int i = position<T, false>(v, j, lane, lanes);
      if (i < count) *in_global_memory<Listed>(row + i) = pack.at[j];
    }
  }
}

__device__ __forceinline__ void prefetch_line(const void* place) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
#endif
}

// x / y and the root of x to two units in the last place and to one, without the branches for quotients that underflow.
__device__ __forceinline__ double quick_quotient(double x, double y) { return x / y; }
__device__ __forceinline__ double quick_root(double x) { return sqrt(x); }
__device__ __forceinline__ float quick_quotient(float x, float y) {
#ifdef __CUDACC__
  return __fdividef(x, y);
#else
  return x / y;
#endif
}
__device__ __forceinline__ float quick_root(float x) {
#ifdef __CUDACC__
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrt(x);
#endif
}

template <typename T>
__device__ __forceinline__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return reinterpret_cast<T*>(shim::shared_memory());
#endif
}

// Adds values[] over `lanes` threads and leaves the result in all of them, always in the same order. Up to a
// warp, `lanes` is a power of two; beyond it, it is the whole block, and scratch holds N numbers per warp that
// the previous sum did not use.
template <int N, typename A>
__device__ __forceinline__ void sum_over(int lanes, A (&values)[N], A* scratch) {
  for (int step = (lanes < kWarp ? lanes : kWarp) / 2; step; step /= 2)
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] += __shfl_xor_sync(kAllLanes, values[n], step);
  if (lanes <= kWarp) return;
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) scratch[threadIdx.x / kWarp * N + n] = values[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = 0;
  for (int warp = 0; warp < lanes / kWarp; ++warp)
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] += scratch[warp * N + n];
}

template <typename A>
__host__ __device__ constexpr int scratch_bytes(int numbers, int threads) {
  return (threads / kWarp + 1) * numbers * static_cast<int>(sizeof(A));
}

// Numbers in the shared memory of another block of the cluster. The space is named, where a generic address would hide
// from the compiler, and from a proof, that it is no global memory.
template <int N, typename A>
__device__ __forceinline__ void read_of_block(unsigned rank, A* shared, A (&values)[N]) {
#ifdef __CUDACC__
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "r"(rank));
#pragma unroll
  for (int n = 0; n < N; ++n)
    if constexpr (sizeof(A) == 8)
      asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(values[n]) : "r"(there + 8 * n) : "memory");
    else
      asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(values[n]) : "r"(there + 4 * n) : "memory");
#else
  const A* there = cooperative_groups::this_cluster().map_shared_rank(shared, rank);
  for (int n = 0; n < N; ++n) values[n] = there[n];
#endif
}

// The same over the blocks of a cluster, through distributed shared memory; scratch holds N numbers. A block
// must not end before the others have read: they say so here, and cluster_done(), which comes last, waits for it.
// Never reached on a device without clusters, because the launcher then chooses other kernels.
template <int N, typename A>
__device__ __forceinline__ void sum_over_cluster(int blocks, A (&values)[N], A* scratch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (blocks == 1) return;
  auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) scratch[n] = values[n];
  cluster.sync();
  // Each lane takes what the block of its number found.
  int lane = threadIdx.x % kWarp;
  read_of_block(lane % blocks, scratch, values);
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = lane < blocks ? values[n] : A(0);
  cluster.barrier_arrive();
  sum_over(kWarp, values, static_cast<A*>(nullptr));
#endif
}

__device__ __forceinline__ void cluster_done(int blocks) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (blocks > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
}

// Whether clusters of so many blocks of a kernel, each of so many threads, run on the current device: it is asked once
// for each size, as a slice of a device may have no room for what every whole one grants.
bool grants_cluster(const void* kernel, int64_t blocks, int threads, int shared_bytes);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The smallest power of two that is at least n, within [1, limit].
constexpr int power_of_two(int64_t n, int limit) {
  int p = 1;
  while (p < n && p < limit) p *= 2;
  return p;
}

inline bool is_aligned(const void* pointer, int64_t stride_bytes = 0) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

// What the runtime is told of a launch of `blocks` blocks of `threads` threads in clusters of `cluster`.
struct LaunchConfig : cudaLaunchConfig_t {
  cudaLaunchAttribute cluster_size{};

  LaunchConfig(int64_t blocks, int threads, int shared_bytes, void* on_stream, int cluster) : cudaLaunchConfig_t{} {
    cluster_size.id = cudaLaunchAttributeClusterDimension;
    cluster_size.val.clusterDim.x = cluster;
    cluster_size.val.clusterDim.y = cluster_size.val.clusterDim.z = 1;
    gridDim = dim3(static_cast<unsigned>(blocks));
    blockDim = dim3(threads);
    dynamicSmemBytes = shared_bytes;
    stream = static_cast<cudaStream_t>(on_stream);
    attrs = &cluster_size;
    numAttrs = cluster > 1;
  }
  // It points into itself.
  LaunchConfig(const LaunchConfig&) = delete;
};

// Launches it; an empty grid is no work.
template <typename P>
const char* launch(void (*kernel)(P), int64_t blocks, int threads, int shared_bytes, void* stream, const P& params,
                   int cluster = 1) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more blocks than one grid can hold";
  const LaunchConfig config(blocks, threads, shared_bytes, stream, cluster);
  cudaError_t error = cudaSuccess;
  // So much is granted without asking.
  if (shared_bytes > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaSuccess) return nullptr;
  // Asking for the error also forgets it: the next call of others is none the worse.
  return cudaGetErrorString(cudaGetLastError());
}

// Calls run with a value of the storage type.
template <typename F>
const char* dispatch(DType dtype, F run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::f64:
      return run(double{});
    case DType::bf16:
      return run(__nv_bfloat16{});
    case DType::f16:
      return run(__half{});
  }
  return "unknown dtype";
}

}  // namespace dgs::cuda
