"""``TopKAttention``: a self-attention module on the top-k functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import functional

__all__ = ["TopKAttention"]

_DEFAULTS = {
    "topk": None,
    "ratio": None,
    "min_keys": 1,
    "max_keys": None,
    "select": "head",
    "sink": 0,
    "recent": 0,
    "softmax_scale": None,
    "deterministic": False,
}


class TopKAttention(torch.nn.Module):
    """Multi-head self-attention that keeps the top-k keys of every query row.

    Projects to queries, keys and values, attends with ``topk_attn_func`` (``topk_attn_varlen_func`` for
    packed input) and projects back. Grouped-query attention when ``num_kv_heads < num_heads``. It has no
    positional encoding
    and no KV cache: models that need them call the functions directly.

    Args:
        embed_dim: size E of the input and output rows.
        num_heads: query heads H.
        num_kv_heads: key/value heads Hkv, a divisor of ``num_heads``; default ``num_heads``.
        head_dim: default ``embed_dim // num_heads``; a multiple of 8 up to 256.
        topk, ratio, min_keys, max_keys, select, sink, recent, softmax_scale, deterministic: as in
            ``topk_attn.functional``; exactly one of ``topk`` and ``ratio``.
        causal: bottom-right aligned.
        bias: whether the four projections have a bias.
        device, dtype: of the parameters.

    Shapes:
        input (B, T, E) or packed (total, E) with ``cu_seqlens``; output the same.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        topk: int | None = None,
        ratio: float | None = None,
        min_keys: int = 1,
        max_keys: int | None = None,
        select: str = "head",
        sink: int = 0,
        recent: int = 0,
        softmax_scale: float | None = None,
        deterministic: bool = False,
        causal: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (
            ("embed_dim", embed_dim),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads is {num_heads}: it must be a multiple of num_kv_heads, {num_kv_heads}"
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim is {embed_dim}: it must be a multiple of num_heads, {num_heads}")
            head_dim = embed_dim // num_heads
        if head_dim % 8 or not 8 <= head_dim <= 256:
            raise ValueError(f"head_dim is {head_dim}: it must be a multiple of 8 and at most 256")
        if select not in ("head", "kv_group"):
            raise ValueError(f"select is {select!r}: it must be 'head' or 'kv_group'")
        for name, value in (("sink", sink), ("recent", recent)):
            if value < 0:
                raise ValueError(f"{name} is {value}: it must be at least 0")
        if softmax_scale is not None and not (softmax_scale > 0 and math.isfinite(softmax_scale)):
            raise ValueError(f"softmax_scale is {softmax_scale}: it must be positive and finite")
        # Raises for a budget that is not one.
        functional.budget(1, topk=topk, ratio=ratio, min_keys=min_keys, max_keys=max_keys)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.settings = {
            "topk": topk,
            "ratio": ratio,
            "min_keys": min_keys,
            "max_keys": max_keys,
            "select": select,
            "sink": sink,
            "recent": recent,
            "softmax_scale": softmax_scale,
            "deterministic": deterministic,
        }
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = torch.nn.Linear(embed_dim, num_heads * head_dim, **factory)
        self.k_proj = torch.nn.Linear(embed_dim, num_kv_heads * head_dim, **factory)
        self.v_proj = torch.nn.Linear(embed_dim, num_kv_heads * head_dim, **factory)
        self.o_proj = torch.nn.Linear(num_heads * head_dim, embed_dim, **factory)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """Attends within each batch row, or within each document of packed rows.

        Args:
            x: (B, T, E), or (total, E) with ``cu_seqlens``.
            cu_seqlens: int32 (documents + 1), from 0 to total.
            max_seqlen: longest document; read from ``cu_seqlens`` (a synchronisation on CUDA) when not given.
        """
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"x has rows of {x.shape[-1]}: they must be embed_dim, {self.embed_dim}")
        wanted = 3 if cu_seqlens is None else 2
        if x.dim() != wanted:
            form = "(B, T, E)" if cu_seqlens is None else "(total, E) with cu_seqlens"
            raise ValueError(f"x has {x.dim()} dimensions: it must be {form}")
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if cu_seqlens is None:
            out = functional.topk_attn_func(q, k, v, causal=self.causal, **self.settings)
        else:
            if max_seqlen is None:
                max_seqlen = int(cu_seqlens.diff().max())
            out = functional.topk_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=self.causal, **self.settings
            )
        return self.o_proj(out.flatten(-2))

    def extra_repr(self) -> str:
        parts = [
            f"embed_dim={self.embed_dim}",
            f"num_heads={self.num_heads}",
            f"num_kv_heads={self.num_kv_heads}",
        ]
        parts += [f"head_dim={self.head_dim}", f"causal={self.causal}"]
        parts += [f"{key}={value!r}" for key, value in self.settings.items() if value != _DEFAULTS[key]]
        return ", ".join(parts)
