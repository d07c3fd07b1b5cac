"""`pip install .` with build isolation: which torch it used, what it installed, use from Python and C++."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess

import pytest
from install_helpers import ROOT, WORK, run, succeed, tools

PYTHON_SIDE = """
import topk_attn, torch
def values(shape, step):
    count = 1
    for extent in shape:
        count *= extent
    return torch.arange(count, dtype=torch.float32).mul(step).sin().reshape(shape)
q, k, v = values((1, 9, 4, 16), 0.37), values((1, 9, 2, 16), 0.73), values((1, 9, 2, 16), 1.31)
out, lse = topk_attn.topk_attn_func(q, k, v, topk=3, return_lse=True)
for tensor in (out, lse):
    for word in tensor.contiguous().view(torch.int32).flatten().tolist():
        print("%08x" % (word & 0xFFFFFFFF))
"""


def test_uses_the_torch_of_the_environment(installed):
    site = installed.environment.site
    torch = importlib.metadata.version("torch")
    assert f"building against torch {torch}" in installed.log
    assert re.search(r"Requirement already satisfied: torch==\d+\.\d+\.\*", installed.log)
    assert not (site / "torch").exists()
    assert not list(site.glob("nvidia*"))
    new = {p.name for p in site.glob("*.dist-info")}
    assert {n.split("-")[0] for n in new} <= {"topk_attn", "pip", "setuptools"}, new


def test_layout(installed):
    package = installed.environment.package
    for name in (
        "lib/libtopk_attn.so",
        "include/topk_attn/topk_attn.h",
        "include/topk_attn/contract.h",
        "lib/cmake/topk_attn/topk_attn-config.cmake",
        "lib/cmake/topk_attn/topk_attn-config-version.cmake",
        "lib/cmake/topk_attn/TopkTorch.cmake",
        "bin/topk-sft",
        "bin/topk-generate",
        "_build_info.py",
    ):
        assert (package / name).is_file(), name
    assert len(list(package.glob("_C.*.so"))) == 1
    assert not (package / "lib" / "libstale.so").exists()
    installed_modules = {str(p.relative_to(package)) for p in package.rglob("*.py")}
    here = ROOT / "python" / "topk_attn"
    assert {str(p.relative_to(here)) for p in here.rglob("*.py")} | {"_build_info.py"} == installed_modules


def test_operator_library_has_no_python_symbols(installed):
    library = installed.environment.package / "lib" / "libtopk_attn.so"
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_python" not in needed and "libpython" not in needed
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    assert not re.search(r"\bU (Py|_Py)", symbols.stdout)


def test_import_and_operators(installed):
    code = (
        "import topk_attn, torch; print(topk_attn.__file__); "
        "ops = ('select', 'fwd', 'bwd', 'select_scores', 'fwd_kvcache'); "
        "[getattr(torch.ops.topk_attn, op).default for op in ops]"
    )
    done = succeed([installed.environment.python, "-c", code], cwd=WORK)
    assert done.stdout.strip() == str(installed.environment.package / "__init__.py")


@pytest.fixture(scope="module")
def cpp_program(installed):
    """tests/packaging/cpp_project, configured with nothing but the package's folder."""
    build = WORK / "cpp_project"
    configure = ["cmake", "-S", ROOT / "tests/packaging/cpp_project", "-B", build, "--fresh", "-G", "Ninja"]
    configure += [f"-DCMAKE_PREFIX_PATH={installed.environment.package}"]
    configure += [f"-DPython_EXECUTABLE={installed.environment.python}"]
    succeed(configure, cwd=WORK, env=tools())
    succeed(["cmake", "--build", build], cwd=WORK, env=tools())
    return build / "uses_topk_attn"


def test_cpp_project_gives_the_bits_of_python(installed, cpp_program):
    from_cpp = succeed([cpp_program], cwd=WORK).stdout.split()
    from_python = succeed([installed.environment.python, "-c", PYTHON_SIDE], cwd=WORK).stdout.split()
    assert len(from_cpp) == 9 * 4 * 16 + 4 * 9
    assert from_cpp == from_python


def test_cpp_project_takes_the_torch_beside_the_package(installed):
    """In an ordinary environment torch is the package's neighbour: nothing but the prefix is needed."""
    beside = WORK / "beside"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(installed.environment.package, beside / "topk_attn")
    (beside / "torch").symlink_to(importlib.util.find_spec("torch").submodule_search_locations[0])
    configure = [
        "cmake",
        "-S",
        ROOT / "tests/packaging/cpp_project",
        "-B",
        WORK / "cpp_beside",
        "--fresh",
        "-G",
        "Ninja",
    ]
    configure += [f"-DCMAKE_PREFIX_PATH={beside / 'topk_attn'}", "-DPython_EXECUTABLE=/nonexistent/python"]
    done = succeed(configure, cwd=WORK, env=tools())
    assert f": {beside / 'torch'}\n" in done.stdout
    # The program finds it too, before the torch of the build.
    libraries = succeed(["ldd", beside / "topk_attn" / "bin" / "topk-sft"], cwd=WORK).stdout
    assert str(beside) in next(line for line in libraries.splitlines() if "libtorch.so" in line)


def test_cpp_project_refuses_another_torch(installed):
    """find_package against a torch of another minor version: one sentence, at configure time."""
    other = _fake_torch("2.99.0")
    configure = [
        "cmake",
        "-S",
        ROOT / "tests/packaging/cpp_project",
        "-B",
        WORK / "cpp_other",
        "--fresh",
        "-G",
        "Ninja",
    ]
    configure += [
        f"-DCMAKE_PREFIX_PATH={installed.environment.package}",
        f"-DTOPK_TORCH_DIR={other / 'torch'}",
    ]
    done = run(configure, cwd=WORK, env=tools())
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    built = importlib.metadata.version("torch").split("+")[0]
    assert f"topk_attn was built against torch {built}, but" in message and "is torch 2.99.0" in message


@pytest.mark.parametrize("program", ["topk-sft", "topk-generate"])
def test_native_console_scripts(installed, program):
    script = installed.environment.folder / "bin" / program
    done = succeed([script, "--help"], cwd=WORK)
    assert program in done.stdout
    # The installed binary finds torch by itself too.
    direct = succeed([installed.environment.package / "bin" / program, "--help"], cwd=WORK)
    assert direct.stdout == done.stdout
    wrong = run([script, "--no-such-option"], cwd=WORK)
    assert wrong.returncode == 2 and wrong.stderr.startswith(f"{program}: error: ")


def test_data_console_script(installed):
    done = succeed([installed.environment.folder / "bin" / "topk-data", "--help"], cwd=WORK)
    assert "prepare" in done.stdout


def _fake_torch(version):
    """A folder with a torch package that is only a version and the files by which it is recognised."""
    folder = WORK / f"torch-{version}"
    (folder / "torch" / "lib").mkdir(parents=True, exist_ok=True)
    (folder / "torch" / "include" / "ATen" / "core").mkdir(parents=True, exist_ok=True)
    (folder / "torch" / "lib" / "libtorch_cpu.so").touch()
    (folder / "torch" / "include" / "ATen" / "core" / "Tensor.h").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    (folder / "torch" / "__init__.py").write_text("from torch.version import __version__\n")
    return folder


def test_import_against_another_torch_minor_version(installed):
    """torch of another minor version: one sentence that names both, not an undefined symbol."""
    built = importlib.metadata.version("torch").split("+")[0]
    code = "import torch; torch.__version__ = '2.99.1+cu999'; import topk_attn"
    done = run([installed.environment.python, "-c", code], cwd=WORK)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and built in last and "2.99.1" in last
    # A patch release of the same minor version is served.
    minor = built.rsplit(".", 1)[0]
    succeed(
        [installed.environment.python, "-c", code.replace("2.99.1+cu999", f"{minor}.77")],
        cwd=WORK,
    )


def test_console_script_against_another_torch_minor_version(installed):
    script = installed.environment.folder / "bin" / "topk-sft"
    done = run([script, "--help"], cwd=WORK, env={"PYTHONPATH": str(_fake_torch("2.99.0"))})
    assert done.returncode == 1
    assert (
        done.stderr.startswith("topk-sft: error: topk-attn was built against torch")
        and "2.99.0" in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1


def test_editable(installed, sources):
    """`pip install -e .`: Python files stay in the sources, native files lie beside them."""
    environment = installed.environment
    flags = {"CMAKE_ARGS": "-DTOPK_WERROR=ON -DTOPK_CUDA=OFF"} | tools()
    succeed([environment.python, "-m", "pip", "install", "-e", "."], cwd=sources, env=flags)
    try:
        code = "import topk_attn, torch; torch.ops.topk_attn.fwd.default; print(topk_attn.__file__)"
        done = succeed([environment.python, "-c", code], cwd=WORK)
        assert done.stdout.strip() == str(sources / "python" / "topk_attn" / "__init__.py")
        succeed([environment.folder / "bin" / "topk-sft", "--help"], cwd=WORK)
    finally:
        succeed([environment.python, "-m", "pip", "uninstall", "-y", "topk-attn"], cwd=WORK)
