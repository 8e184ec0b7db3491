// Stands in for CUDA's header of the same name: a thread's asynchronous copies from global to shared memory.
#pragma once

#include <cuda_runtime.h>

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) { shim::copy(to, from, bytes); }
inline void __pipeline_commit() { shim::commit_copies(); }
inline void __pipeline_wait_prior(size_t prior) { shim::wait_for_copies(prior); }
