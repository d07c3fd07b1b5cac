"""What a build finds on the machine: the user's torch, cmake and ninja, the number of parallel jobs.

Used by the build backend, by setup.py and by the Makefile (``python3 topk_build_env.py jobs``). It must run
on a bare Python: standard library only.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

MIN_TORCH = (2, 11)
MIN_CMAKE = (3, 24)
# A file that includes torch's headers takes up to this much memory to compile.
JOB_BYTES = 2 << 30


class BuildError(Exception):
    """Something that the user has to do first, in one sentence."""


class Torch(NamedTuple):
    """A torch package: its folder, its full version ("2.11.0+cu130") and its minor version ("2.11")."""

    folder: Path
    version: str
    minor: str


_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
# Prints version and torch folder of an interpreter, without importing torch.
_PROBE = (
    "import importlib.util as u, sys; s = u.find_spec('torch'); "
    "print('%d.%d' % sys.version_info[:2]); print((s.submodule_search_locations or [''])[0] if s else '')"
)


def _ask(python: Path) -> str | None:
    """Torch folder of the interpreter `python`, free of the variables by which pip isolates builds."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")}
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE], env=env, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    same_python = done.returncode == 0 and len(lines) == 2 and lines[0] == _PYTHON
    return lines[1] or None if same_python else None


def _throw_away_environment() -> bool:
    """Whether this process runs in an environment that the installer made for the build alone (uv, build).

    pip does not make one: it runs the user's interpreter and adds the build's packages from elsewhere.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    return (site / "setuptools").is_dir() and not (site / "pip").is_dir()


def _candidates():
    """Torch folders, most specific first: this interpreter's own, then those of the active environments."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        yield spec.submodule_search_locations[0]
    # pip's isolation hides the site-packages of its interpreter from this process.
    yield _ask(Path(sys.executable))
    # Elsewhere only the active environment can be the one that is being installed into. uv overwrites
    # VIRTUAL_ENV, but leaves the environment's programs in PATH.
    if _throw_away_environment():
        for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            if os.environ.get(variable):
                yield _ask(Path(os.environ[variable]) / "bin" / "python")
        for folder in map(Path, os.get_exec_path()):
            if (folder.parent / "pyvenv.cfg").is_file():
                yield _ask(folder / "python")


def find_torch() -> Torch:
    """The torch to build against: TOPK_TORCH_DIR, else that of the environment that pip installs into."""
    named = os.environ.get("TOPK_TORCH_DIR")
    folder = named or next((c for c in _candidates() if c and (Path(c) / "version.py").is_file()), None)
    if folder is None:
        raise BuildError(
            f"topk-attn: torch was not found for {sys.executable}; install it there first "
            '(pip install "torch>=2.11") and repeat, with the environment activated if your installer builds '
            "in one of its own (uv), or set TOPK_TORCH_DIR to the folder of the torch package."
        )
    path = Path(folder).absolute()
    version_file = path / "version.py"
    match = version_file.is_file() and re.search(
        r"^__version__\s*(?::[^=]*)?=\s*['\"](([0-9]+)\.([0-9]+)[^'\"]*)['\"]", version_file.read_text(), re.M
    )
    if not match:
        raise BuildError(
            f"topk-attn: TOPK_TORCH_DIR is {folder!r}, which must be the folder of a torch package."
        )
    if (int(match[2]), int(match[3])) < MIN_TORCH:
        raise BuildError(
            f"topk-attn: torch {match[1]} in {path} is too old; "
            f"install torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]} there."
        )
    return Torch(path, match[1], f"{match[2]}.{match[3]}")


def _runs(command: list[str]) -> str | None:
    """First line that `command --version` prints, or None if it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def find_program(name: str, minimum: tuple[int, ...]) -> list[str] | None:
    """Command line of cmake or ninja >= `minimum`: PyPI's module if importable, else from PATH; or None."""
    commands = []
    if importlib.util.find_spec(name):
        commands.append([sys.executable, "-m", name])
    # A wrapper script of another environment may lie in PATH and fail in an isolated build: only what runs
    # counts.
    commands += [[found] for d in os.get_exec_path() if (found := shutil.which(name, path=d))]
    for command in commands:
        version = re.search(r"(\d+)\.(\d+)", _runs(command) or "")
        if version and tuple(map(int, version.groups())) >= minimum:
            return command
    return None


def jobs() -> int:
    """Parallel compile jobs: MAX_JOBS if set, else the cores, but no more than the free memory carries."""
    named = os.environ.get("MAX_JOBS")
    if named:
        if not named.isdigit() or int(named) < 1:
            raise BuildError(f"topk-attn: MAX_JOBS is {named!r}; it must be a whole number of at least 1.")
        return int(named)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = int(re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)[1]) << 10
    except (OSError, TypeError):
        return cores
    return max(1, min(cores, free // JOB_BYTES))


if __name__ == "__main__":
    if sys.argv[1:] != ["jobs"]:
        sys.exit("usage: topk_build_env.py jobs")
    try:
        print(jobs())
    except BuildError as error:
        sys.exit(str(error))
