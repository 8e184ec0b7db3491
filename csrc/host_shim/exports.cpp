// The entry points under C names, for the tests to call through ctypes.
#include <cstdlib>
#include <cstring>

#include "../cuda/kernels.h"

using namespace dgs;
using namespace dgs::cuda;

namespace {

// How many of each lifetime are held.
int allocations[2] = {};

// Exactly as much as is asked for, so that the sanitizer sees what lies beyond; it starts as NaN.
std::shared_ptr<void> allocate(int64_t bytes, Lifetime lifetime) {
  int& held = allocations[lifetime == Lifetime::longer];
  ++held;
  return {std::memset(std::malloc(bytes), 0xff, bytes), [&held](void* memory) {
            --held;
            std::free(memory);
          }};
}

}  // namespace

extern "C" {
const char* c_project_align(const ProjectAlign* args) { return project_align(*args, allocate, nullptr); }
const char* c_surgery_head(const SurgeryHead* args) { return surgery_head(*args, nullptr); }
const char* c_surgery_head_backward(const SurgeryHeadBackward* args) { return surgery_head_backward(*args, nullptr); }
int64_t c_surgery_head_workspace(int64_t batch, int64_t dim) { return surgery_head_workspace(batch, dim); }
const char* c_project_align_(const TensorList* list, void* stream) { return project_align_(*list, allocate, stream); }
const char* c_surgery_adamw_(const TensorList* list, const AdamW* options, void* stream) {
  return surgery_adamw_(*list, *options, allocate, stream);
}
const char* c_gramian(const Objectives* args, void* stream) { return gramian(*args, allocate, stream); }
const char* c_combine_(const Objectives* args, void* stream) { return combine_(*args, allocate, stream); }
// Those that outlive calls.
int c_allocations() { return allocations[1]; }
// Those that should not have outlived a call.
int c_left_behind() { return allocations[0]; }
const char* c_spectral_entropy(const SpectralEntropy* args) { return spectral_entropy(*args, nullptr); }
}
