"""Swapping ``torch.nn.functional.scaled_dot_product_attention`` for top-k attention.

    with topk_attention(ratio=0.05):
        out = model(x)              # every SDPA call of this thread is top-k

    patch_model(model, ratio=0.05)  # every SDPA call inside this model, until unpatch_model(model)

Calls keep SDPA's meaning (causal top-left, ``(..., heads, T, dim)``); one that cannot be honoured raises with
the reason and is never computed densely. The swap is per thread: other threads keep torch's own attention.

How: a ``TorchFunctionMode`` sees every call of torch's SDPA, however the caller got hold of the function.
Functions of torch that hide their SDPA call from modes (``multi_head_attention_forward``) look it up in
``torch.nn.functional``, so that name is replaced as well while a swap is active anywhere, by a function that
leaves the calls of other threads alone.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from . import functional

__all__ = ["patch_model", "topk_attention", "unpatch_model"]

_TORCH_SDPA = F.scaled_dot_product_attention
_FUSED = tuple(
    getattr(torch, name)
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
    if hasattr(torch, name)
)
_local = threading.local()
_lock = threading.Lock()
_swaps = 0


@contextmanager
def topk_attention(**arguments: Any) -> Iterator[None]:
    """Within the block, SDPA calls of this thread are ``scaled_dot_product_topk_attention``.

    Args:
        **arguments: ``topk`` or ``ratio``, and any of ``min_keys``, ``max_keys``, ``select``, ``sink``,
            ``recent``, ``deterministic``. Blocks may be nested; the innermost counts.

    Raises:
        ValueError: on entry, a budget that is not one; inside, an SDPA call that cannot be honoured: additive
            masks, masks that differ between rows, dropout; ``torch.nn.MultiheadAttention`` with
            ``need_weights=True`` (its default), which computes attention without SDPA.

    Recomputation in the backward pass (activation checkpointing) must also run within the block, or use
    ``patch_model``, which takes care of it.
    """
    scope = _Scope(arguments)
    scope.enter()
    try:
        yield
    finally:
        scope.leave()


def patch_model(model: torch.nn.Module, **arguments: Any) -> torch.nn.Module:
    """Makes every SDPA call inside ``model`` and its submodules top-k, and returns the model.

    Takes the arguments of ``topk_attention``. Patching again replaces the settings. Works with activation
    checkpointing, since each submodule brings the swap along. For transformers models prefer
    ``topk_attn.hf.configure``, which also handles padding, packing and caches.
    """
    scope = _Scope(arguments)
    unpatch_model(model)
    for module in model.modules():
        module.register_forward_pre_hook(_Enter(scope), prepend=True, with_kwargs=True)
        module.register_forward_hook(_Leave(scope), with_kwargs=True, always_call=True)
    return model


def unpatch_model(model: torch.nn.Module) -> torch.nn.Module:
    """Removes what ``patch_model`` did; a model that is not patched stays as it is. Returns the model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (_Enter, _Leave))]:
                del hooks[key]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)
    return model


class _Scope:
    """One set of arguments, entered and left by threads; entering it again inside itself costs nothing."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        allowed = {"topk", "ratio", "min_keys", "max_keys", "select", "sink", "recent", "deterministic"}
        for name in arguments:
            if name not in allowed:
                raise TypeError(
                    f"{name!r} is not an argument of the swap: it takes {', '.join(sorted(allowed))}"
                )
        functional.budget(1, **arguments)
        self.arguments = arguments

    def enter(self) -> None:
        global _swaps
        stack = _stack()
        mode = None
        if not stack or stack[-1][0] is not self:
            mode = _Mode(self)
            mode.__enter__()
            with _lock:
                _swaps += 1
                F.scaled_dot_product_attention = _dispatch
        stack.append((self, mode))

    def leave(self) -> None:
        global _swaps
        scope, mode = _stack().pop()
        assert scope is self
        if mode is not None:
            mode.__exit__(None, None, None)
            with _lock:
                _swaps -= 1
                if _swaps == 0:
                    F.scaled_dot_product_attention = _TORCH_SDPA

    def attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return functional.scaled_dot_product_topk_attention(*args, **kwargs, **self.arguments)


class _Mode(TorchFunctionMode):
    """Sends SDPA calls to the scope; refuses the calls of torch that attend without SDPA."""

    def __init__(self, scope: _Scope) -> None:
        super().__init__()
        self.scope = scope

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _TORCH_SDPA or func is _dispatch:
            return self.scope.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and kwargs.get("need_weights", True):
            raise ValueError(
                "torch.nn.MultiheadAttention was called with need_weights=True: it then computes dense "
                "attention without scaled_dot_product_attention; pass need_weights=False"
            )
        if func in _FUSED:
            raise ValueError(f"torch.{func.__name__} attends densely without scaled_dot_product_attention")
        return func(*args, **kwargs)


class _Enter:
    """Forward pre-hook that enters a scope."""

    def __init__(self, scope: _Scope) -> None:
        self.scope = scope

    def __call__(self, module, args, kwargs) -> None:
        self.scope.enter()


class _Leave:
    """Forward hook that leaves a scope, also after an exception."""

    def __init__(self, scope: _Scope) -> None:
        self.scope = scope

    def __call__(self, module, args, kwargs, output) -> None:
        self.scope.leave()


def _stack() -> list[tuple[_Scope, _Mode | None]]:
    if not hasattr(_local, "stack"):
        _local.stack = []
    return _local.stack


@functools.wraps(_TORCH_SDPA)
def _dispatch(*args: Any, **kwargs: Any) -> torch.Tensor:
    stack = _stack()
    return stack[-1][0].attend(*args, **kwargs) if stack else _TORCH_SDPA(*args, **kwargs)
