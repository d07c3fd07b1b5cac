"""The mask function registered with transformers: what of a padding mask the attention needs.

transformers calls it once per forward and hands the result to every layer. It never builds a (Tq, Tk) mask;
causality is the attention's own. Results:

None
    every key up to the call's last token counts and the cache holds nothing else.
int32 (B, 1, 1, 2)
    the keys [begin, end) of each row count: left padding, and caches that are longer than what they hold.
bool (B, 1, 1, L)
    any other padding: key j counts iff True; L is the number of keys up to the call's last token.

Four dimensions, because transformers passes masks of four dimensions through unchanged (``generate`` makes
masks ahead of the forward for static caches).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .settings import keep_in_saves

# The leaves of the mask functions that need no mask here: causality, and documents of a packed row, which the
# attention finds by itself from position_ids.
_CAUSAL = {
    "causal_mask_function",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
}
_BIDIRECTIONAL = {"bidirectional_mask_function"}


def topk_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """See the file header. ``attention_mask`` is the model's 2D mask (B, past + new), True = token.

    Raises:
        ValueError: sliding or chunked attention, or a mask pattern that is neither causal nor padding.
    """
    del kwargs
    if config is not None and not torch.compiler.is_compiling():
        keep_in_saves(config)
    if local_size is not None:
        raise ValueError(
            f"the model asks for sliding-window or chunked attention over {local_size} keys: topk_attn does "
            "not combine top-k with a window and never ignores one; use a config without it "
            "(sliding_window=None)"
        )
    tracing = torch.compiler.is_compiling()
    leaves = _traced_leaves(mask_function, use_vmap) if tracing else _leaves(mask_function)
    unknown = leaves - _CAUSAL - _BIDIRECTIONAL
    if unknown:
        raise ValueError(
            f"the model asks for the mask pattern {', '.join(sorted(unknown))}: topk_attn knows causal and "
            "bidirectional attention with padding, and packed documents"
        )
    bidirectional = bool(leaves & _BIDIRECTIONAL)
    length = kv_length if bidirectional else q_offset + q_length
    known = not isinstance(length, Tensor)
    if not known and not tracing:
        length, known = int(length), True
    if attention_mask is None:
        if known and length == kv_length:
            return None
        if known and length > kv_length:
            raise ValueError(
                f"the call sees {length} keys (past and new), but the cache holds {kv_length} at most"
            )
        begin = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return _spans(begin, begin + (length if known else length.to(torch.int32)))

    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be ({batch_size}, past + new "
            "tokens)"
        )
    valid = attention_mask.to(torch.bool)
    if known and valid.shape[1] < length:
        raise ValueError(
            f"attention_mask has {valid.shape[1]} columns, but the call sees {length} keys (past and new)"
        )
    valid = valid[:, :length] if known else valid
    if tracing:
        return valid[:, None, None, :]

    count = valid.sum(dim=1, dtype=torch.int32)
    # Keys of a row are one run that ends at the last token iff its first `length - count` keys are the
    # padding.
    end = torch.full_like(count, length)
    begin = end - count
    if bool((valid == (torch.arange(length, device=valid.device) >= begin[:, None])).all()):
        if length == kv_length and bool((count == length).all()):
            return None
        return _spans(begin, end)
    return valid[:, None, None, :]


def _spans(begin: Tensor, end: Tensor) -> Tensor:
    return torch.stack((begin, end), dim=-1)[:, None, None, :]


def _leaves(function: Callable | None) -> set[str]:
    """Names of the elementary mask functions of a transformers mask function; intersections are taken
    apart."""
    if function is None:
        return set()
    name = getattr(function, "__qualname__", repr(function))
    if name == "and_masks.<locals>.and_mask":
        parts = function.__closure__[0].cell_contents
        return set().union(*(_leaves(part) for part in parts))
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        inner = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))["mask_function"]
        return {name} | _leaves(inner.cell_contents)
    return {name}


def _traced_leaves(function: Callable | None, custom: bool) -> set[str]:
    """As ``_leaves`` while tracing, where a function shows its name but not what it closes over.

    transformers builds the intersections (``and_mask``) of a traced forward itself, for packed documents and
    for windows; windows come with a local_size, and patterns of the model's own with ``use_vmap``.
    """
    if function is None:
        return set()
    if custom:
        return {"of the model's own"}
    return {"causal_mask_function"} if function.__name__ == "and_mask" else {function.__name__}
