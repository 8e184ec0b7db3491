// The entry points under C names, for the tests to call through ctypes.
#include "../cuda/kernels.h"

using namespace dgs;
using namespace dgs::cuda;

extern "C" {
const char* c_project_align(const ProjectAlign* args) { return project_align(*args, nullptr); }
}
