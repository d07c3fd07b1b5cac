"""PEP 517 / PEP 660 backend: setuptools, plus what a build against the user's own torch needs.

torch is never a build requirement: an isolated build would fetch the newest one and compile against a library
that the user does not run. Instead the torch of the environment being installed into is found
(topk_build_env.find_torch), and every hook stops with one sentence if there is none. cmake, ninja and the C++
libraries are requested from PyPI where the system lacks them.
"""

import shutil
import sys
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist  # noqa: F401  (hooks as they are)
from topk_build_env import MIN_CMAKE, BuildError, find_program, find_torch

_INCLUDE_DIRS = ("/usr/include", "/usr/local/include")


def _need_torch():
    """Stop with one sentence, not a traceback, when the build cannot work."""
    try:
        find_torch()
    except BuildError as error:
        sys.exit(str(error))


def _requires() -> list[str]:
    _need_torch()
    requires = []
    if find_program("cmake", MIN_CMAKE) is None:
        requires.append("cmake>=3.24")
    if find_program("ninja", (1, 10)) is None:
        requires.append("ninja>=1.10")
    if not any(Path(d, "yaml-cpp/yaml.h").exists() for d in _INCLUDE_DIRS):
        requires.append("cmeel-yaml-cpp>=0.8")
    if not any(Path(d, "nlohmann/json.hpp").exists() for d in _INCLUDE_DIRS):
        requires.append("nlohmann-json>=3.11")
    return requires


def get_requires_for_build_wheel(config_settings=None):
    return _requires() + _setuptools.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _requires() + _setuptools.get_requires_for_build_editable(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _need_torch()
    return _setuptools.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _need_torch()
    return _setuptools.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _need_torch()
    # Modules removed from the sources since the last build would otherwise live on in the wheel.
    for stale in Path("build").glob("lib.*"):
        shutil.rmtree(stale)
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _need_torch()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
