"""The parts of the build that look at the machine: job count, program versions, torch's version file."""

import subprocess
import sys

import pytest
from install_helpers import CLEAN_ENV, ROOT

sys.path.insert(0, str(ROOT / "cmake" / "backend"))
import topk_build_env  # noqa: E402


def jobs(**env):
    script = ROOT / "cmake" / "backend" / "topk_build_env.py"
    environment = {k: v for k, v in CLEAN_ENV.items() if k != "MAX_JOBS"} | env
    return subprocess.run([sys.executable, script, "jobs"], env=environment, capture_output=True, text=True)


def test_jobs_honours_max_jobs():
    assert jobs(MAX_JOBS="3").stdout == "3\n"
    assert int(jobs().stdout) >= 1


@pytest.mark.parametrize("bad", ["0", "-1", "two", "1.5"])
def test_jobs_refuses_nonsense(bad):
    done = jobs(MAX_JOBS=bad)
    assert done.returncode == 1
    assert done.stderr == f"topk-attn: MAX_JOBS is {bad!r}; it must be a whole number of at least 1.\n"


def test_jobs_is_capped_by_memory(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(topk_build_env, "JOB_BYTES", 1 << 60)
    assert topk_build_env.jobs() == 1


@pytest.mark.parametrize(
    ("line", "version", "minor"),
    [
        ("__version__ = '2.11.0+cu130'", "2.11.0+cu130", "2.11"),
        ('__version__: str = "2.12.0a0+git1234"', "2.12.0a0+git1234", "2.12"),
        ("__version__ = '3.0.1'", "3.0.1", "3.0"),
    ],
)
def test_reads_the_version_of_torch(tmp_path, monkeypatch, line, version, minor):
    (tmp_path / "version.py").write_text(f"from typing import Optional\n{line}\ndebug = False\n")
    monkeypatch.setenv("TOPK_TORCH_DIR", str(tmp_path))
    assert topk_build_env.find_torch() == (tmp_path, version, minor)


@pytest.mark.parametrize("how", ["VIRTUAL_ENV", "PATH"])
@pytest.mark.parametrize("throw_away", [True, False])
def test_finds_the_torch_of_the_active_environment(tmp_path, monkeypatch, how, throw_away):
    """A build in a throw-away environment (uv) finds the torch of the active one; pip never looks there."""
    folder = tmp_path / "site" / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "version.py").write_text("__version__ = '2.11.5'\n")
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "env" / "pyvenv.cfg").touch()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    for variable in ("TOPK_TORCH_DIR", "CONDA_PREFIX", "VIRTUAL_ENV"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv(how, str(tmp_path / "env" if how == "VIRTUAL_ENV" else python.parent))
    monkeypatch.setattr(topk_build_env, "_throw_away_environment", lambda: throw_away)
    monkeypatch.setattr(topk_build_env.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    if throw_away:
        assert topk_build_env.find_torch() == (folder, "2.11.5", "2.11")
    else:
        with pytest.raises(topk_build_env.BuildError, match="torch was not found for /nonexistent/python"):
            topk_build_env.find_torch()


def test_takes_only_programs_that_run(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    works = tmp_path / "works"
    for folder, body in ((broken, "exit 1"), (works, "echo cmake version 3.30.2")):
        folder.mkdir()
        (folder / "cmake").write_text(f"#!/bin/sh\n{body}\n")
        (folder / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken}:{works}:/usr/bin:/bin")
    monkeypatch.setattr(topk_build_env.importlib.util, "find_spec", lambda name: None)
    assert topk_build_env.find_program("cmake", (3, 24)) == [str(works / "cmake")]
    assert topk_build_env.find_program("cmake", (99, 0)) is None
