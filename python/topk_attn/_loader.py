"""What must be true before native code is loaded: it was built, and against this torch."""

try:
    from . import _build_info
except ImportError:
    _build_info = None


def version() -> str:
    return _build_info.version


def check_torch(running: str) -> None:
    """Raises ImportError, in one sentence, when the native part is missing or was built against another
    torch.

    torch's C++ interface changes between minor versions; loading a library built against another one would
    end in an undefined symbol or worse.
    """
    if _build_info is None:
        raise ImportError(
            "topk_attn is not built: install it with `pip install .` in the source folder, or build the "
            "CMake target inplace_python."
        )
    built = _build_info.torch_version
    if running.split(".")[:2] != built.split(".")[:2]:
        raise ImportError(
            f"topk_attn was built against torch {built} but torch {running} is installed: reinstall "
            "topk-attn in this environment so that it is built against the installed torch."
        )


def check_cuda(running: str | None) -> None:
    """Raises ImportError, in one sentence, when CUDA kernels were built that this torch cannot load.

    `running`: torch.version.cuda. A library without CUDA kernels goes with every torch.
    """
    built = _build_info.cuda_version
    if built and (running or "").split(".")[0] != built.split(".")[0]:
        found = f"is for CUDA {running}" if running else "has no CUDA"
        raise ImportError(
            f"topk_attn was built with CUDA {built} but the installed torch {found}: reinstall "
            "topk-attn in this environment so that it is built against the installed torch."
        )
