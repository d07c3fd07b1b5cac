"""What TopKCache hands to the attention in place of all cached keys: the new rows and where they belong.

Kept apart from the cache, which needs transformers, so that the attention can know the type without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NewRows(Tensor):
    """The new keys (B, Hkv, T, D) of a layer, with ``cache`` and ``layer``. Not all keys of the sequence: an
    attention that took it for them would be silently wrong, so nothing but ``plain`` computes with it."""

    cache: Any
    layer: int

    @staticmethod
    def of(rows: Tensor, cache: Any, layer: int) -> NewRows:
        made = rows.as_subclass(NewRows)
        made.cache, made.layer = cache, layer
        return made

    def plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # Attributes (shape, dtype, device) come as descriptors' __get__.
        if getattr(func, "__name__", "") == "__get__":
            return super().__torch_function__(func, types, args, kwargs or {})
        raise ValueError(
            f"{getattr(func, '__name__', func)} was called on the keys that a TopKCache returned: only "
            "attn_implementation='topk_attn' reads its pages. Call topk_attn.hf.configure(model, ...), or "
            "use another cache."
        )
