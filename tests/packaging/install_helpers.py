"""Running commands away from the source tree, and making virtual environments."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "packaging"
# Folders whose every source file a build, a test or a user of the source archive needs.
SOURCE_FOLDERS = (
    "benchmarks",
    "cmake",
    "csrc",
    "docs",
    "python",
    "recipes",
    "requirements",
    "scripts",
    "tests",
    "trainer",
)
# Variables that would lead an installed package back to this source tree or name a torch.
CLEAN_ENV = {
    k: v
    for k, v in os.environ.items()
    if k
    not in ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "TOPK_TORCH_DIR", "LD_LIBRARY_PATH", "CMAKE_ARGS")
}


def run(command, *, cwd, env=None, timeout=900):
    """Run a command away from the source tree; returns the finished process, output captured."""
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**CLEAN_ENV, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def succeed(command, **kwargs):
    done = run(command, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


class Environment(NamedTuple):
    """A virtual environment: its folder, and the package in it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    @property
    def package(self) -> Path:
        return self.site / "topk_attn"


def make_environment(name: str, *, with_torch: bool) -> Environment:
    environment = Environment(WORK / name)
    shutil.rmtree(environment.folder, ignore_errors=True)
    succeed([sys.executable, "-m", "venv", environment.folder], cwd=WORK)
    if with_torch:
        (environment.site / "torch_of_the_machine.pth").write_text(f"{torch_site()}\n")
    return environment


def torch_site() -> Path:
    """The folder that holds torch; by way of a link in build/packaging/src if it lies in this tree."""
    site = Path(sysconfig.get_paths()["purelib"])
    if ROOT not in site.parents:
        return site
    inside = site.relative_to(ROOT)
    link = WORK / "src" / inside.parts[0]
    if not link.is_symlink():
        link.symlink_to(ROOT / inside.parts[0])
    return WORK / "src" / inside


def tools() -> dict[str, str]:
    """PATH with the cmake and ninja of this environment in front, which pip's isolation would break.

    The same CMake as the tree's own build writes the same compiler commands, which ccache then knows.
    """
    folder = WORK / "tools"
    folder.mkdir(exist_ok=True)
    for name in ("cmake", "ninja"):
        program = Path(sys.executable).parent / name
        if program.is_file():
            (folder / name).write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {program} "$@"\n')
            (folder / name).chmod(0o755)
    return {"PATH": os.pathsep.join([str(folder), CLEAN_ENV["PATH"]])}


class Installation(NamedTuple):
    """An environment with the package in it, and what pip said."""

    environment: Environment
    log: str
