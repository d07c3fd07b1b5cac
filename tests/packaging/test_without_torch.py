"""Installing where there is no torch, an old torch or a wrong TOPK_TORCH_DIR: one sentence each."""

import pytest
from install_helpers import WORK, make_environment, run

HOOKS = (
    "get_requires_for_build_wheel()",
    "get_requires_for_build_editable()",
    "prepare_metadata_for_build_wheel('metadata')",
    "prepare_metadata_for_build_editable('metadata')",
    "build_wheel('.')",
    "build_editable('.')",
)


@pytest.fixture(scope="module")
def bare():
    return make_environment("bare", with_torch=False)


def _the_sentence(output):
    lines = [line for line in output.splitlines() if "topk-attn: " in line]
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.parametrize("option", [[], ["-e"]])
def test_pip_install(bare, sources, option):
    done = run([bare.python, "-m", "pip", "install", *option, "."], cwd=sources)
    assert done.returncode != 0
    sentence = _the_sentence(done.stdout + done.stderr)
    assert f"torch was not found for {bare.python}" in sentence
    assert 'pip install "torch>=2.11"' in sentence and "TOPK_TORCH_DIR" in sentence
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook(bare, sources, hook):
    """Installers may call any hook first."""
    setuptools = (
        "import sys; sys.path[:0] = ['cmake/backend', sys.argv[1]]; import topk_build_backend as b; b."
    )
    # setuptools of the test environment alone, so that no torch comes with it.
    import setuptools as package

    only = WORK / "only_setuptools"
    only.mkdir(exist_ok=True)
    for name in ("setuptools", "pkg_resources", "_distutils_hack"):
        link = only / name
        source = f"{package.__path__[0]}/../{name}"
        if not link.exists():
            link.symlink_to(source)
    done = run([bare.python, "-S", "-c", setuptools + hook, only], cwd=sources)
    assert done.returncode == 1, done.stdout + done.stderr
    assert _the_sentence(done.stderr) == done.stderr.strip()


@pytest.mark.parametrize(
    ("version", "fragment"),
    [
        ("2.10.1", "torch 2.10.1 in {folder} is too old; install torch >= 2.11"),
        (None, "must be the folder of a torch"),
    ],
)
def test_wrong_torch_dir(bare, sources, version, fragment):
    folder = WORK / "torch_dir"
    folder.mkdir(exist_ok=True)
    (folder / "version.py").unlink(missing_ok=True)
    if version:
        (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    done = run([bare.python, "-m", "pip", "install", "."], cwd=sources, env={"TOPK_TORCH_DIR": str(folder)})
    assert done.returncode != 0
    assert fragment.format(folder=folder) in _the_sentence(done.stdout + done.stderr)
