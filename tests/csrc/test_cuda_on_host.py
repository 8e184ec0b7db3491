"""Builds the CUDA kernels for the CPU (csrc/host_shim) with sanitizers on, and runs the cases of
`cuda_on_host` through them."""

import pytest

from tests.csrc.host_library import COMPILER, build, run, run_cases

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to build the CUDA kernels for the CPU with")


@pytest.fixture(scope="module")
def library():
    return build()


def test_kernels_agree_with_the_reference(library):
    done = run_cases(library)
    assert done.returncode == 0, done.stdout[-6000:]


def test_sanitizer_sees_a_write_past_the_end(library):
    """The guard itself: a result that is one row too short must stop the run."""
    done = run(
        library,
        "-c",
        "import torch; from tests.csrc.cuda_on_host.rows import project_align;"
        "x = torch.ones(3, 5); short = torch.empty(2, 5);"
        "project_align(x, x, None, alignment=1.0, scale=None, order='align_first', rule='full', out=short)",
    )
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout, done.stdout[-2000:]
