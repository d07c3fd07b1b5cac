"""Runs the native programs that are installed beside the package (topk-sft, topk-generate, topk-parity)."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path


def program(name: str) -> str:
    """Path of a native program of this package.

    Raises:
        FileNotFoundError: the package was built without it.
    """
    path = Path(__file__).resolve().parents[1] / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: build with -DTOPK_BUILD_TRAINER=ON (in a source tree: make build)"
        )
    return str(path)


def environment() -> dict[str, str]:
    """os.environ, with the libraries of this interpreter's torch findable wherever torch is installed."""
    import torch

    library = str(Path(torch.__file__).parent / "lib")
    paths = [library, os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(p for p in paths if p)}


def _show(command: list[str]) -> str:
    """Prints a command so that a reader can repeat it; returns the program's name."""
    shown = (
        ["python", *command[1:]] if command[0] == sys.executable else [Path(command[0]).name, *command[1:]]
    )
    print(f"  $ {shlex.join(shown)}", flush=True)
    return shown[0]


def run(command: list[str]) -> None:
    """Runs a command with its output on the screen.

    Raises:
        RuntimeError: the command failed; its own message is on the screen.
    """
    name = _show(command)
    status = subprocess.run(command, env=environment(), check=False).returncode
    if status:
        raise RuntimeError(f"{name} ended with exit status {status} (its message is above)")


def capture(command: list[str]) -> str:
    """Runs a command and returns its standard output.

    Raises:
        RuntimeError: the command failed; its own message is on the screen.
    """
    name = _show(command)
    result = subprocess.run(command, env=environment(), check=False, text=True, stdout=subprocess.PIPE)
    if result.returncode:
        raise RuntimeError(f"{name} ended with exit status {result.returncode} (its message is above)")
    return result.stdout
