"""scripts/setup_env.sh: what it installs for a profile, that a second run does nothing, and its errors."""

import shutil
import subprocess
import sys

import pytest
from install_helpers import CLEAN_ENV, ROOT


@pytest.fixture
def tree(tmp_path):
    """The script and the requirement files beside a .venv whose Python only notes its arguments."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    (fake.parent / "pip").touch(0o755)
    return tmp_path


def setup(tree, profile, **env):
    command = [tree / "scripts" / "setup_env.sh", profile]
    environment = CLEAN_ENV | {"PYTHON": sys.executable} | env
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    calls = (tree / "calls").read_text().splitlines() if (tree / "calls").exists() else []
    (tree / "calls").unlink(missing_ok=True)
    return done, calls


@pytest.mark.parametrize(
    ("profile", "files"),
    [("build", ["build"]), ("demo", ["build", "demo"]), ("test", ["build", "demo", "test"])],
)
def test_second_run_does_nothing(tree, profile, files):
    done, calls = setup(tree, profile)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(calls) == 1 and "pip install" in calls[0]
    for file in files:
        assert f"-r requirements/{file}.txt" in calls[0]
    again, calls = setup(tree, profile)
    assert (again.returncode, again.stdout, calls) == (0, "", [])
    with open(tree / "requirements" / f"{files[-1]}.txt", "a") as file:
        file.write("# changed\n")
    _, calls = setup(tree, profile)
    assert len(calls) == 1


def test_failed_installation_is_repeated(tree):
    fake = tree / ".venv" / "bin" / "python"
    works = fake.read_text()
    fake.write_text("#!/bin/sh\nexit 1\n")
    done, _ = setup(tree, "build")
    assert done.returncode != 0
    fake.write_text(works)
    done, calls = setup(tree, "build")
    assert done.returncode == 0 and len(calls) == 1


def test_unknown_profile(tree):
    done, calls = setup(tree, "everything")
    assert (done.returncode, calls) == (2, [])
    assert done.stderr == "usage: scripts/setup_env.sh build|demo|test\n"


def test_python_too_old(tree):
    old = tree / "old_python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done, calls = setup(tree, "build", PYTHON=str(old))
    assert (done.returncode, calls) == (1, [])
    assert done.stderr == (
        "setup: Python 3.8.1 is too old: Python >= 3.10 is needed (name another one by PYTHON=...).\n"
    )


def test_pins(tree):
    """Every requirement is pinned, and torch to the version that tests and carried builds use."""
    for path in (tree / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            assert line.startswith("#") or "==" in line, f"{path.name}: {line}"
    assert "torch==2.11.0" in (tree / "requirements" / "build.txt").read_text().splitlines()
