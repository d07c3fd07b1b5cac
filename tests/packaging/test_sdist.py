"""The source archive holds every source file and nothing built."""

import tarfile

import pytest
from install_helpers import ROOT, SOURCE_FOLDERS

SOURCE_SUFFIXES = {
    ".cpp",
    ".h",
    ".cu",
    ".cuh",
    ".py",
    ".cmake",
    ".in",
    ".txt",
    ".yaml",
    ".sh",
    ".md",
    ".typed",
}
TOP_LEVEL = (
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
    "Makefile",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
)


@pytest.fixture(scope="module")
def members(sdist):
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_holds_every_source(members):
    expected = set(TOP_LEVEL)
    for folder in SOURCE_FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in SOURCE_SUFFIXES and path.name != "_build_info.py":
                expected.add(str(path.relative_to(ROOT)))
    in_place = ("python/topk_attn/lib/", "python/topk_attn/bin/", "python/topk_attn/include/")
    missing = {e for e in expected if not e.startswith(in_place) and ".egg-info" not in e} - members
    assert not missing


def test_holds_nothing_built(members):
    built = {
        m for m in members if m.endswith((".so", ".pyc", ".o", "_build_info.py")) or m.startswith("build/")
    }
    assert not built
