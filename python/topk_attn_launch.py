"""Console scripts that become the native programs of topk_attn: ``topk-sft`` and ``topk-generate``.

Outside the package, so that starting a program does not import it, and with it torch. The process is replaced
(``exec``): nothing of Python stays.
"""

import importlib.util
import os
import re
import runpy
import sys
from pathlib import Path


def _package_folder(name: str) -> Path | None:
    """Folder of a top-level package, found without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _run(program: str) -> None:
    package = _package_folder("topk_attn")
    binary = package / "bin" / program if package else None
    if binary is None or not binary.is_file():
        sys.exit(
            f"{program}: error: {binary} does not exist: "
            "this topk-attn was built with -DTOPK_BUILD_TRAINER=OFF"
        )
    torch = _package_folder("torch")
    if torch is None:
        sys.exit(
            f"{program}: error: torch was not found for {sys.executable}; "
            'install it (pip install "torch>=2.11")'
        )
    built = runpy.run_path(str(package / "_build_info.py"))["torch_version"]
    match = re.search(
        r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"]+)", (torch / "version.py").read_text(), re.M
    )
    found = match[1] if match else "unknown"
    if _minor(found) != _minor(built):
        sys.exit(
            f"{program}: error: topk-attn was built against torch {built}, but torch {found} is installed: "
            "reinstall topk-attn in this environment"
        )
    if not (package.parent / "torch" / "lib").is_dir():
        # torch lies in another site-packages than topk_attn, where the program's search path does not reach.
        paths = [str(torch / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(p for p in paths if p)
    sys.stdout.flush()
    os.execv(binary, [str(binary), *sys.argv[1:]])


def topk_sft() -> None:
    _run("topk-sft")


def topk_generate() -> None:
    _run("topk-generate")
