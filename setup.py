"""Drives the CMake build of operators, Python module and trainer; everything else is in pyproject.toml.

Extra CMake arguments come from CMAKE_ARGS (e.g. CMAKE_ARGS="-DTOPK_BUILD_TRAINER=OFF"), the number of
parallel jobs from MAX_JOBS.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake" / "backend"))

from topk_build_env import MIN_CMAKE, BuildError, find_program, find_torch, jobs  # noqa: E402

COMPONENTS = ("topk_ops", "topk_python", "topk_trainer", "topk_devel")


class CMakeBuild(build_ext):
    """Builds and installs the whole native side: into build_lib, or beside the sources when editable."""

    def run(self):
        try:
            self.native_files = self.cmake_build()
        except BuildError as error:
            sys.exit(str(error))
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"topk-attn: the native build failed (exit code {error.returncode}); the reason stands above."
            )

    def cmake_build(self) -> list[Path]:
        torch = find_torch()
        cmake = find_program("cmake", MIN_CMAKE)
        ninja = find_program("ninja", (1, 10))
        for name, command in (("cmake>=3.24", cmake), ("ninja", ninja)):
            if command is None:
                raise BuildError(f"topk-attn: {name} was not found; install it first (pip install '{name}').")
        # Not build_temp, a throw-away folder when editable: a second build starts from the first one's.
        build = ROOT / "build" / f"setup-cp{sys.version_info[0]}{sys.version_info[1]}"
        prefix = ROOT / "python" if self.inplace else Path(self.build_lib).resolve()
        print(f"topk-attn: building against torch {torch.version} in {torch.folder}", flush=True)
        # --fresh: paths into the isolated environment of an earlier build are gone.
        configure = [*cmake, "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={_executable(ninja)}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [
            f"-DTOPK_TORCH_DIR={torch.folder}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DTOPK_PYTHON_INPLACE=OFF",
        ]
        subprocess.run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        subprocess.run([*cmake, "--build", str(build), "--parallel", str(jobs())], check=True)
        files = []
        for component in COMPONENTS:
            install = [*cmake, "--install", str(build), "--prefix", str(prefix), "--component", component]
            subprocess.run(install, check=True)
            manifest = build / f"install_manifest_{component}.txt"
            files += [Path(line) for line in manifest.read_text().splitlines()] if manifest.exists() else []
        return files

    def get_outputs(self) -> list[str]:
        return [str(f) for f in getattr(self, "native_files", [])]

    def get_output_mapping(self) -> dict[str, str]:
        """For strict editable installs: where a file would lie in a wheel -> where it lies in the sources."""
        if not self.inplace:
            return {}
        source, target = ROOT / "python", Path(self.build_lib)
        return {str(target / f.relative_to(source)): str(f) for f in getattr(self, "native_files", [])}


def _executable(command: list[str]) -> str:
    """Path of the program behind `python -m ninja`, which CMake cannot call with arguments."""
    if len(command) == 1:
        return command[0]
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def version() -> str:
    """The version, written once, in CMakeLists.txt."""
    return re.search(r"project\(topk_attn VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]


def torch_requirement() -> str:
    """A wheel is bound to the minor version of torch that it was built against; a source archive is not."""
    try:
        return f"torch=={find_torch().minor}.*"
    except BuildError:
        return "torch>=2.11"


setup(
    version=version(),
    install_requires=[torch_requirement(), "numpy"],
    ext_modules=[Extension("topk_attn._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
