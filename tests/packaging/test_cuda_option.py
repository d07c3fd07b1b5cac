"""TOPK_CUDA: what the build decides about CUDA and says, by configuring alone. Nothing is compiled.

Fake nvcc programs answer with a version, so that the cases are the same on every machine; only the last test
asks for a real one.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from install_helpers import ROOT, WORK, run, tools

TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
CASES = WORK / "cuda_option"


def torch_cuda() -> str:
    """The CUDA version of the torch of this environment; skips the test where it has none."""
    found = re.search(r"^cuda\b.*?['\"]([0-9.]+)['\"]", (TORCH / "version.py").read_text(), re.M)
    if not found:
        pytest.skip("the torch of this environment has no CUDA")
    return found[1]


def fake_nvcc(version: str) -> Path:
    program = CASES / f"nvcc-{version}"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    program.chmod(0o755)
    return program


def fake_torch_without_cuda() -> Path:
    """A folder that passes for a torch package of the same version, built without CUDA."""
    folder = CASES / "torch"
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    (folder / "include" / "ATen" / "core").mkdir(parents=True, exist_ok=True)
    (folder / "include" / "torch" / "csrc" / "api" / "include").mkdir(parents=True, exist_ok=True)
    (folder / "lib" / "libtorch_cpu.so").touch()
    (folder / "include" / "ATen" / "core" / "Tensor.h").touch()
    version = importlib.metadata.version("torch").split("+")[0]
    (folder / "version.py").write_text(f"__version__ = '{version}+cpu'\ncuda: str | None = None\n")
    return folder


def configure(*options, torch=TORCH, nvcc=None, name="off", env=None):
    """(exit code, output in one line) of a configuration of the operators alone."""
    command = ["cmake", "-S", ROOT, "-B", CASES / name, "-G", "Ninja", f"-DTOPK_TORCH_DIR={torch}"]
    command += ["-DTOPK_BUILD_PYTHON=OFF", "-DTOPK_BUILD_TRAINER=OFF", *options]
    CASES.mkdir(parents=True, exist_ok=True)
    done = run(command, cwd=WORK, env=tools() | ({"CUDACXX": str(nvcc)} if nvcc else {}) | (env or {}))
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def other_major(version: str) -> str:
    return f"{int(version.split('.')[0]) + 1}.2"


def test_off_is_off():
    code, said = configure("-DTOPK_CUDA=OFF")
    assert code == 0 and "CUDA kernels: off (TOPK_CUDA=OFF: asked for)" in said


def test_auto_without_a_torch_with_cuda():
    code, said = configure("-DTOPK_CUDA=AUTO", torch=fake_torch_without_cuda(), nvcc=fake_nvcc("13.0"))
    assert code == 0, said
    assert re.search(r"CUDA kernels: off \(TOPK_CUDA=AUTO: torch \S+ in '\S+' was built without CUDA\)", said)


def test_auto_without_nvcc():
    major = torch_cuda().split(".")[0]
    code, said = configure("-DTOPK_CUDA=AUTO", nvcc="/nonexistent/nvcc")
    assert code == 0
    assert "CUDA kernels: off (TOPK_CUDA=AUTO: '/nonexistent/nvcc' is not a working nvcc)" in said
    # No nvcc anywhere; a toolkit in its usual folder would be found: this part needs a machine without one.
    if not any(Path(f"/usr/local/cuda{suffix}/bin/nvcc").exists() for suffix in ("", f"-{major}")):
        nothing = {"PATH": f"{tools()['PATH'].split(':')[0]}:/usr/bin:/bin", "CUDA_HOME": "", "CUDA_PATH": ""}
        code, said = configure("-DTOPK_CUDA=AUTO", env=nothing)
        assert code == 0 and f"no nvcc was found: install the CUDA {major} toolkit" in said


def test_auto_with_an_nvcc_of_another_major_version():
    wrong = other_major(torch_cuda())
    nvcc = fake_nvcc(wrong)
    code, said = configure("-DTOPK_CUDA=AUTO", nvcc=nvcc)
    assert code == 0
    assert (
        f"CUDA kernels: off (TOPK_CUDA=AUTO: '{nvcc}' is of CUDA {wrong}, but torch was built with CUDA"
        in said
    )


def test_on_says_why_it_cannot_be():
    wrong = other_major(torch_cuda())
    for options, reason in (
        ({"nvcc": fake_nvcc(wrong)}, f"is of CUDA {wrong}, but torch was built with CUDA {torch_cuda()}"),
        ({"nvcc": "/nonexistent/nvcc"}, "'/nonexistent/nvcc' is not a working nvcc"),
        ({"torch": fake_torch_without_cuda(), "nvcc": fake_nvcc("13.0")}, "was built without CUDA"),
    ):
        code, said = configure("-DTOPK_CUDA=ON", **options)
        assert code != 0
        assert "TOPK_CUDA is ON, but " in said and reason in said, said
    code, said = configure("-DTOPK_CUDA=ON", "-DTOPK_SANITIZE=address", name="sanitize")
    assert code != 0 and "TOPK_SANITIZE is for builds without CUDA" in said


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("-DTOPK_CUDA=MAYBE", "TOPK_CUDA is 'MAYBE': it must be AUTO, ON or OFF."),
        (
            "-DTOPK_CUDA_ARCHS=80;75",
            "TOPK_CUDA_ARCHS holds '75': it must hold GPU architectures of at least 80",
        ),
        ("-DTOPK_CUDA_DTYPES=bf16;int8", "TOPK_CUDA_DTYPES holds 'int8': it must hold bf16, fp16 or both."),
        ("-DTOPK_CUDA_HEAD_DIMS=96", "TOPK_CUDA_HEAD_DIMS holds '96': it must hold some of 64, 128, 256."),
        ("-DTOPK_CUDA_DTYPES=", "TOPK_CUDA_DTYPES is empty: it must hold bf16, fp16 or both."),
    ],
)
def test_bad_values(option, sentence):
    """Refused by name. The nvcc is fake: the lists are looked at before the compiler is."""
    mode = [] if option.startswith("-DTOPK_CUDA=") else ["-DTOPK_CUDA=ON"]
    shutil.rmtree(CASES / "bad", ignore_errors=True)
    code, said = configure(option, *mode, nvcc=fake_nvcc(torch_cuda()), name="bad")
    assert code != 0 and sentence in said, said


def test_auto_and_on_with_nvcc():
    """A real nvcc of torch's major version: both say yes, and the flags are those that matter."""
    major = torch_cuda().split(".")[0]
    found = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", f"/usr/local/cuda-{major}/bin/nvcc"]
    nvcc = next((p for p in found if p and Path(p).is_file()), None)
    version = nvcc and subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if not nvcc or f"release {major}." not in version:
        pytest.skip(f"no nvcc of CUDA {major} on this machine")
    for mode in ("AUTO", "ON"):
        options = [f"-DTOPK_CUDA={mode}", "-DTOPK_CUDA_DTYPES=bf16", "-DTOPK_CUDA_HEAD_DIMS=64"]
        code, said = configure(*options, nvcc=nvcc, name="on")
        assert code == 0, said
        assert (
            f"CUDA kernels: on (TOPK_CUDA={mode}: torch has CUDA {torch_cuda()}, {nvcc} is {major}." in said
        )
        assert "architectures 80, 90a; bf16; head dims 64" in said
    rules = (CASES / "on" / "build.ninja").read_text()
    assert "arch=compute_90a,code=[sm_90a]" in rules and "arch=compute_80,code=[compute_80]" in rules
    assert "-Xptxas=-warn-spills,-Werror" in rules and "-std=c++20" in rules
    # Loads where there is no driver, and brings its own CUDA runtime.
    assert "-lcuda " not in rules and "cudart_static" in rules and not re.search(r"libcudart\.so", rules)
    # One file per type and head dim, all in the build folder.
    instances = sorted(p.name for p in (CASES / "on").rglob("instances/**/*.cu"))
    assert instances and all(name.endswith("_bf16_64.cu") for name in instances)
