"""Dense attention for layers and calls that are configured dense: torch's SDPA, document by document.

Kept free of masks of size (Tq, Tk) wherever SDPA can do without: whole documents use its causal flag, single
query rows need none. Only a chunk of queries against a longer past builds a (Tq, Tk) mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .layout import Packing


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """q (B, Tq, H, D), k and v (B, Tk, Hkv, .) -> (B, Tq, H, Dv); causal is bottom-right aligned, Tk >=
    Tq."""
    tq, tk = q.shape[1], k.shape[1]
    mask = None
    if causal and tq > 1 and tq != tk:
        mask = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
    return _sdpa(q, k, v, scale, mask, causal and tq > 1 and tq == tk)


def dense_masked_keys(q: Tensor, k: Tensor, v: Tensor, scale: float | None, valid: Tensor) -> Tensor:
    """One query row per sequence against the keys that ``valid`` (B, L) admits; k may hold more than L
    keys."""
    length = valid.shape[1]
    return _sdpa(q, k[:, :length], v[:, :length], scale, valid[:, None, None, :], False)


def dense_packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, packing: Packing
) -> Tensor:
    """q (total_q, H, D), k and v (total_k, Hkv, .) -> (total_q, H, Dv); every document by itself."""
    bounds_q, bounds_k = packing.bounds
    outs = [
        dense_attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], scale, causal)[0]
        for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False)
        if q1 > q0
    ]
    return torch.cat(outs) if outs else q.new_zeros(0, q.shape[1], v.shape[-1])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    heads, kv_heads, tq = q.shape[1], k.shape[1], q.shape[2]
    if tq == 1 and heads != kv_heads:
        # The group's query heads become rows: no repeated keys, and masks keep the fast kernels.
        rows = q.reshape(q.shape[0], kv_heads, heads // kv_heads, q.shape[-1])
        out = scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        return out.reshape(q.shape[0], 1, heads, v.shape[-1])
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
    )
    return out.transpose(1, 2)
