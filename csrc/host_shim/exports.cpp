// The entry points under C names, for the tests to call through ctypes.
#include "../cuda/kernels.h"

using namespace dgs;
using namespace dgs::cuda;

extern "C" {
const char* c_project_align(const ProjectAlign* args) { return project_align(*args, nullptr); }
const char* c_surgery_head(const SurgeryHead* args) { return surgery_head(*args, nullptr); }
const char* c_surgery_head_backward(const SurgeryHeadBackward* args) { return surgery_head_backward(*args, nullptr); }
int64_t c_surgery_head_workspace(int64_t batch, int64_t dim) { return surgery_head_workspace(batch, dim); }
int64_t c_plan_chunks(int dtype, bool aligned, const int64_t* numel, const int64_t* groups, int64_t num_tensors,
                      int64_t num_groups, Chunk* chunks, int64_t* group_begin) {
  return plan_chunks(DType(dtype), aligned, numel, groups, num_tensors, num_groups, chunks, group_begin);
}
const char* c_project_align_(const TensorList* list) { return project_align_(*list, nullptr); }
const char* c_surgery_adamw_(const TensorList* list, const AdamW* options) {
  return surgery_adamw_(*list, *options, nullptr);
}
const char* c_spectral_entropy(const SpectralEntropy* args) { return spectral_entropy(*args, nullptr); }
}
