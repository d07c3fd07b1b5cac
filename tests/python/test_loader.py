"""What is checked before native code is loaded."""

import pytest

from topk_attn import _loader


@pytest.fixture
def built(monkeypatch):
    def set_version(cuda: str):
        monkeypatch.setattr(_loader._build_info, "cuda_version", cuda)

    return set_version


@pytest.mark.parametrize("running", [None, "12.8", "13.0"])
def test_a_library_without_cuda_goes_with_every_torch(built, running):
    built("")
    _loader.check_cuda(running)


def test_the_major_version_of_cuda_must_match(built):
    built("13.0")
    _loader.check_cuda("13.2")
    with pytest.raises(ImportError, match=r"built with CUDA 13\.0 but the installed torch is for CUDA 12\.8"):
        _loader.check_cuda("12.8")
    with pytest.raises(ImportError, match="the installed torch has no CUDA"):
        _loader.check_cuda(None)
