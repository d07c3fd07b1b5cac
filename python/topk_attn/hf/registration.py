"""Registration with transformers, whichever of the two packages is imported first.

transformers takes seconds to import, so it is not imported here. If its modules are loaded already they are
registered with at once; otherwise a finder on ``sys.meta_path`` waits for their import and registers right
after it. Nothing else of the import system is touched.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .settings import NAME

# Continuous batching of earlier releases asks for this prefix; later ones accept and drop it.
PAGED_NAME = "paged|topk_attn"
# Earlier releases ignore attn_implementation in config.json: a saved model would load dense without a word.
OLDEST = (5, 4)


def _supported() -> bool:
    """Whether the installed transformers is registered with; warns once when it is too old."""
    version = sys.modules["transformers"].__version__
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST:
        return True
    wanted = ".".join(map(str, OLDEST))
    warnings.warn(
        f"topk_attn is not registered with transformers {version}: it needs transformers >= {wanted}",
        stacklevel=2,
    )
    return False


def _register_attention(module: ModuleType) -> None:
    from .attention import topk_attention_forward

    for name in (NAME, PAGED_NAME):
        module.AttentionInterface.register(name, topk_attention_forward)


def _register_mask(module: ModuleType) -> None:
    from .masks import topk_attention_mask

    for name in (NAME, PAGED_NAME):
        module.AttentionMaskInterface.register(name, topk_attention_mask)


def _allow_continuous_batching(module: ModuleType) -> None:
    """Lets ``generate_batch`` keep our implementation.

    transformers switches every implementation it does not know to flash attention, which would silently be
    dense, or refuses it. The manager's choice is left alone for all other implementations.
    """
    manager = getattr(module, "ContinuousBatchingManager", None)
    switch = getattr(manager, "switch_to_cb_friendly_attn", None)
    if switch is None or getattr(switch, "_topk_attn", False):
        return

    @functools.wraps(switch)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation not in (NAME, PAGED_NAME):
            switch(self, model, *args, **kwargs)

    switch_to_cb_friendly_attn._topk_attn = True
    manager.switch_to_cb_friendly_attn = switch_to_cb_friendly_attn


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.modeling_utils": _register_attention,
    "transformers.masking_utils": _register_mask,
    "transformers.generation.continuous_batching.continuous_api": _allow_continuous_batching,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: wraps the loader of the hooked modules so that the hook runs after their
    import."""

    def __init__(self) -> None:
        self._busy = threading.local()

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _HOOKS or getattr(self._busy, "name", None) == fullname:
            return None
        self._busy.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.name = None
        if spec is not None and spec.loader is not None and not isinstance(spec.loader, _Loader):
            spec.loader = _Loader(spec.loader, _HOOKS[fullname])
        return spec


class _Loader(importlib.abc.Loader):
    """A module's own loader, followed by a hook."""

    def __init__(self, loader: Any, hook: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._hook = hook

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        # The module keeps its own loader: nothing that asks it for source or resources sees the wrapper.
        module.__loader__ = module.__spec__.loader = self._loader
        if _supported():
            self._hook(module)


def register() -> None:
    """Registers ``topk_attn`` with transformers now, or as soon as transformers is imported. Idempotent."""
    for name, hook in _HOOKS.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False) and _supported():
            hook(module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
