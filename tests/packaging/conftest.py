"""One real installation for all packaging tests: sources -> sdist -> `pip install .` in a fresh environment.

The fresh environment reaches the torch that is already on the machine through a .pth file, as an environment
with system site-packages does, so that nothing large is copied. All of it lies in build/packaging. Where
ccache is installed, the build finds the objects of the tree's own build: sources and torch lie the same way
to each other (see `torch_site`).
"""

import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from install_helpers import ROOT, SOURCE_FOLDERS, WORK, Installation, make_environment, succeed, tools


@pytest.fixture(scope="session")
def sdist() -> Path:
    """The source archive, built from a copy of the working tree, left-over native files included."""
    copy = WORK / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy2(entry, copy)
        elif entry.name in SOURCE_FOLDERS:
            shutil.copytree(entry, copy / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "python/topk_attn/lib").mkdir(exist_ok=True)
    (copy / "python/topk_attn/lib/libstale.so").write_bytes(b"left over")
    (copy / "python/topk_attn/_build_info.py").write_text("torch_version = 'stale'\n")
    code = "import sys; sys.path[:0] = ['cmake/backend']; from topk_build_backend import build_sdist; "
    code += "print(build_sdist(sys.argv[1]))"
    done = succeed([sys.executable, "-c", code, WORK], cwd=copy)
    return WORK / done.stdout.split()[-1]


@pytest.fixture(scope="session")
def sources(sdist) -> Path:
    """The unpacked source archive: what `pip install .` sees."""
    folder = WORK / "src"
    # Sources are replaced, the native build of an earlier run (build/) is kept: timestamps of unchanged files
    # are the tree's own, so it is still valid.
    for entry in folder.iterdir() if folder.is_dir() else []:
        if entry.is_symlink() or entry.is_file():
            entry.unlink()
        elif entry.name != "build":
            shutil.rmtree(entry)
    with tarfile.open(sdist) as archive:
        top = archive.getnames()[0].split("/")[0]
        shutil.rmtree(WORK / top, ignore_errors=True)
        archive.extractall(WORK)
    folder.mkdir(exist_ok=True)
    for entry in (WORK / top).iterdir():
        entry.rename(folder / entry.name)
    (WORK / top).rmdir()
    return folder


@pytest.fixture(scope="session")
def installed(sources) -> Installation:
    """`pip install .` with build isolation, in an environment that holds torch."""
    environment = make_environment("venv", with_torch=True)
    # Warnings are errors here too, which also makes the flags those of `make test`. Without CUDA, whose
    # kernels take minutes; test_cuda_option.py covers the option.
    flags = {"CMAKE_ARGS": "-DTOPK_WERROR=ON -DTOPK_CUDA=OFF"} | tools()
    done = succeed([environment.python, "-m", "pip", "install", "-v", "."], cwd=sources, env=flags)
    return Installation(environment, done.stdout + done.stderr)
