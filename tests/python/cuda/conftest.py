"""Set-up of the CUDA operator tests: the device they run on, and when they are skipped.

TOPK_TEST_DEVICE unset: the CUDA device; without one, or with a package built without CUDA, tests are skipped.
TOPK_TEST_DEVICE=cuda:  the same, but the absence is an error.
TOPK_TEST_DEVICE=cpu:   the device-neutral tests run against the CPU operators; the others are skipped.
"""

import os

import cuda_helpers
import pytest
import torch


def unavailable() -> str | None:
    if cuda_helpers.DEVICE.type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("topk_attn::select", "CUDA"):
        return "topk_attn is built without CUDA"
    return None


@pytest.fixture(autouse=True)
def available_device(request):
    """Skips where there is nothing to test; a module that needs no device says NEEDS_DEVICE = False."""
    reason = unavailable()
    if reason is None or not getattr(request.module, "NEEDS_DEVICE", True):
        return
    if os.environ.get("TOPK_TEST_DEVICE"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Builds for tests leave out head dims and dtypes (TOPK_CUDA_*): what they lack is skipped, aloud."""
    try:
        return (yield)
    except RuntimeError as error:
        if "this build of the library has no" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise


@pytest.fixture
def gpu(available_device):
    """For tests of what only CUDA has: streams, graphs, plans."""
    if cuda_helpers.DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def full_precision_products():
    """References are computed without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True, scope="module")
def released_memory():
    yield
    if cuda_helpers.DEVICE.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
