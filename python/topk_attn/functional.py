"""The attention functions: exact top-k sparse attention on torch tensors.

Each query row keeps the ``W(n)`` keys of highest raw score ``q.k`` among the ``n`` keys it sees, and softmax
runs over those only. The arguments that every function shares:

``topk`` / ``ratio``
    exactly one is given: keys kept per row as an absolute number (>= 1), or as a share of the visible keys
    (0 < ratio <= 1).
``min_keys``, ``max_keys``
    floor (default 1) and ceiling (default none) of the number of kept keys.
``select``
    ``"head"``: a set per query head; ``"kv_group"``: one set per KV group, ordered by the largest score in
    the group.
``sink``, ``recent``
    the first / last visible keys that are always kept; they count inside the budget and never raise it.
``softmax_scale``
    positive and finite; default ``1 / sqrt(D)``.
``deterministic``
    gradients that are bit-identical from run to run (always so on the CPU).

Causal is bottom-right aligned, as in flash-attn: row ``i`` of ``Tq`` sees key ``j`` of ``Tk`` when
``j <= i + (Tk - Tq)``. Only ``scaled_dot_product_topk_attention`` is top-left aligned, as torch's SDPA is.

dtypes: float32, float64, bfloat16, float16, the same for q, k and v. Head dims D (q, k) and Dv (v) are
multiples of 8 up to 256; H is a multiple of Hkv. Tensors may be strided as long as the last dimension is
contiguous. Bad arguments raise before any kernel starts, with the name, the value and what it must be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _C

__all__ = [
    "budget",
    "scaled_dot_product_topk_attention",
    "topk_attn_func",
    "topk_attn_varlen_func",
    "topk_attn_with_kvcache",
    "topk_select",
    "topk_select_scores",
]


def topk_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    topk: int | None = None,
    ratio: float | None = None,
    min_keys: int = 1,
    max_keys: int | None = None,
    select: str = "head",
    sink: int = 0,
    recent: int = 0,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Top-k attention of a dense batch; differentiable in q, k and v.

    Args:
        q: (B, Tq, H, D).
        k: (B, Tk, Hkv, D).
        v: (B, Tk, Hkv, Dv).
        causal: bottom-right aligned; with ``Tq > Tk`` the first rows see nothing.

    Returns:
        out (B, Tq, H, Dv) in q's dtype; with ``return_lse`` also lse (B, H, Tq), natural log over the kept
        keys, float32 (float64 for float64 inputs), differentiable. A row that sees nothing gives zeros and
        ``lse = -inf``.

    Raises:
        RuntimeError, ValueError: a bad shape, dtype, device, stride or budget.
    """
    out, lse, *_ = torch.ops.topk_attn.fwd(
        q,
        k,
        v,
        causal=causal,
        topk=topk,
        ratio=ratio,
        min_keys=min_keys,
        max_keys=max_keys,
        select=select,
        sink=sink,
        recent=recent,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


def topk_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    topk: int | None = None,
    ratio: float | None = None,
    min_keys: int = 1,
    max_keys: int | None = None,
    select: str = "head",
    sink: int = 0,
    recent: int = 0,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Top-k attention of packed documents; a query sees keys of its own document only. Differentiable.

    Args:
        q: (total_q, H, D), the documents one after another.
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 (documents + 1), from 0 to total_q / total_k.
        max_seqlen_q, max_seqlen_k: length of the longest document, on the host.
        causal: bottom-right aligned in each document.

    Returns:
        out (total_q, H, Dv); with ``return_lse`` also lse (H, total_q).

    Raises:
        RuntimeError, ValueError: as ``topk_attn_func``. On the CPU bad offsets raise too; on CUDA they are
        not read back, touch no memory out of bounds and give zeros with ``lse = -inf``.
    """
    out, lse, *_ = torch.ops.topk_attn.fwd(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        topk=topk,
        ratio=ratio,
        min_keys=min_keys,
        max_keys=max_keys,
        select=select,
        sink=sink,
        recent=recent,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


def topk_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    key_codes: Tensor | None = None,
    causal: bool = True,
    topk: int | None = None,
    ratio: float | None = None,
    min_keys: int = 1,
    max_keys: int | None = None,
    select: str = "head",
    sink: int = 0,
    recent: int = 0,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_indices: bool = False,
    return_slots: bool = False,
    return_encoding: bool = False,
) -> Tensor | tuple:
    """Top-k attention against a KV cache, for prefill and decode. Not differentiable.

    Each sequence has ``cache_seqlens + Tnew`` keys, of which the first ``cache_leftpad`` are padding; the Tq
    queries are its last rows (causal is bottom-right aligned).

    Args:
        q: (B, Tq, H, D).
        k_cache, v_cache: contiguous (B, S, Hkv, D or Dv), or with ``block_table`` pages (P, page_size, Hkv,
            .) of any page size. Written in place when ``k`` and ``v`` are given.
        k, v: new rows (B, Tnew, Hkv, .), written at ``cache_seqlens`` before attending; give both or neither.
        cache_seqlens: int32 (B), valid keys before the new rows; not modified.
        cache_leftpad: int32 (B), leading keys that are padding.
        block_table: int32 (B, max_pages): position ``j`` of sequence b lies in page ``block_table[b, j //
            page_size]``.
        key_codes: int8 copy of K that allows the certified scan (``topk_attn.cuda.new_key_codes``); CUDA
            only. The codes of the new rows are written to it.
        deterministic: accepted for uniformity; there is no gradient.

    Returns:
        out (B, Tq, H, Dv), or a tuple of out and, in this order, what was asked for:
        lse (B, H, Tq);
        indices int32 (B, H, Tq, Wmax): kept positions in the sequence, ascending, -1 padded;
        slots int32, same shape: where those keys lie, ``page * page_size + offset`` (contiguous: ``b * S +
            position``);
        encoding: the pair (threshold, tie_index), each (B, H, Tq).

    Raises:
        RuntimeError, ValueError: a bad argument, or a gradient is required.
    """
    del deterministic
    out, lse, indices, slots, threshold, tie_index = torch.ops.topk_attn.fwd_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        cache_leftpad,
        block_table,
        key_codes,
        causal=causal,
        topk=topk,
        ratio=ratio,
        min_keys=min_keys,
        max_keys=max_keys,
        select=select,
        sink=sink,
        recent=recent,
        softmax_scale=softmax_scale,
        return_indices=return_indices or return_slots,
    )
    wanted = (
        (return_lse, lse),
        (return_indices, indices),
        (return_slots, slots),
        (return_encoding, (threshold, tie_index)),
    )
    extra = tuple(value for asked, value in wanted if asked)
    return (out, *extra) if extra else out


def topk_select(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    topk: int | None = None,
    ratio: float | None = None,
    min_keys: int = 1,
    max_keys: int | None = None,
    select: str = "head",
    sink: int = 0,
    recent: int = 0,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, ...]:
    """The selection alone: which keys each row keeps. Not differentiable.

    Args:
        q, k: dense (B, Tq, H, D) and (B, Tk, Hkv, D), or packed (total_q, H, D) and (total_k, Hkv, D) with
            ``cu_seqlens_q``, ``cu_seqlens_k`` int32 (documents + 1) and ``max_seqlen_q``, ``max_seqlen_k``.
        softmax_scale, deterministic: accepted so that one set of settings serves every call; neither changes
            a set.
        return_lse: must be False, no lse is computed here.

    Returns:
        threshold (float32; float64 for float64 inputs) and tie_index (int32), each (B, H, Tq), packed (H,
        total_q): key j of score s is kept iff ``s > threshold`` or ``s == threshold and j <= tie_index``, or
        j is always kept. With ``return_indices`` also indices int32 (B, H, Tq, Wmax), packed (H, total_q,
        Wmax), ascending and -1 padded. tie_index and indices count from the start of the document.
    """
    del deterministic
    _check_scale("softmax_scale", softmax_scale)
    if return_lse:
        raise ValueError("return_lse is True: topk_select computes no lse; call topk_attn_func for it")
    threshold, tie_index, indices = torch.ops.topk_attn.select(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        topk=topk,
        ratio=ratio,
        min_keys=min_keys,
        max_keys=max_keys,
        select=select,
        sink=sink,
        recent=recent,
        return_indices=return_indices,
    )
    return (threshold, tie_index, indices) if return_indices else (threshold, tie_index)


def topk_select_scores(
    scores: Tensor, topk: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``topk`` columns of each row in the contract's order: higher first, NaN before everything,
    ties by lower index.

    Args:
        scores: (rows, n) float32, bfloat16 or float16.
        topk: columns kept per row, >= 1; rows shorter than that keep all they have.
        lengths: int32 (rows), valid columns of each row; default n.

    Returns:
        threshold float32 (rows), tie_index int32 (rows), indices int32 (rows, topk), ascending and -1 padded.
    """
    return torch.ops.topk_attn.select_scores(scores, topk, lengths)


def budget(
    n: int,
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
    return_lse: bool = False,
) -> int:
    """``W(n)``, the number of keys a row keeps when it sees ``n``.

    ``clamp(topk or ceil(ratio * n), min_keys, max_keys)``, then clamped to ``[1, n]``; 0 when ``n`` is 0. The
    other arguments are accepted so that one set of settings serves every call; none of them changes the
    number.

    Raises:
        ValueError: ``n`` below 0 or a budget that is not one.
    """
    del select, sink, recent, softmax_scale, deterministic, return_lse
    return _C.budget(n, topk=topk, ratio=ratio, min_keys=min_keys, max_keys=max_keys)


def scaled_dot_product_topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Top-k attention with the arguments of ``torch.nn.functional.scaled_dot_product_attention``;
    differentiable.

    Args:
        query: (..., H, Tq, D); any number of leading dimensions, also none. They broadcast as in SDPA.
        key: (..., Hkv, Tk, D).
        value: (..., Hkv, Tk, Dv).
        attn_mask: None, or a bool mask broadcastable to (..., H, Tq, Tk), True = may be attended, that is
            equal for all query rows (a key padding mask). It may differ between batch entries and heads.
        dropout_p: must be 0.
        is_causal: **top-left** aligned, as in SDPA: row i sees keys 0..i. Cannot be combined with
            ``attn_mask``.
        scale: softmax scale, default ``1 / sqrt(D)``; ``softmax_scale`` is the same argument by the other
            name.
        enable_gqa: allows H to be a multiple of Hkv; otherwise they must be equal.

    Returns:
        out (..., H, Tq, Dv) in query's dtype; with ``return_lse`` also lse (..., H, Tq).

    Raises:
        ValueError: a call that cannot be honoured, with the reason.
        RuntimeError: a bad shape, dtype, device, stride or budget.
    """
    if dropout_p != 0.0:
        raise ValueError(
            f"dropout_p is {dropout_p}: top-k attention has no dropout (dropped keys would have to be "
            "replaced by keys that were not selected), so it must be 0.0"
        )
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal are both set: give one of them, as with torch's SDPA")
    if scale is not None and softmax_scale is not None and scale != softmax_scale:
        raise ValueError(
            f"scale is {scale} and softmax_scale is {softmax_scale}: they are one argument, give one"
        )

    q, k, v, leading = _sdpa_to_dense(query, key, value, enable_gqa)
    settings = dict(
        topk=topk,
        ratio=ratio,
        min_keys=min_keys,
        max_keys=max_keys,
        select=select,
        sink=sink,
        recent=recent,
        softmax_scale=scale if scale is not None else softmax_scale,
        deterministic=deterministic,
        return_lse=True,
    )
    if attn_mask is not None:
        out, lse = _masked_keys(q, k, v, attn_mask, leading, settings)
    elif is_causal:
        out, lse = _causal_top_left(q, k, v, settings)
    else:
        out, lse = topk_attn_func(q, k, v, causal=False, **settings)

    out = out.transpose(1, 2).reshape(*leading, query.shape[-2], value.shape[-1])
    return (out, lse.reshape(*leading, query.shape[-2])) if return_lse else out


def _check_scale(name: str, scale: float | None) -> None:
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{name} is {scale}: it must be positive and finite")


def _sdpa_to_dense(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool):
    """SDPA layout to the (B, T, heads, dim) views of ``topk_attn_func``, and the leading dims of the
    output."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a Tensor")
        if tensor.dim() < 2:
            raise ValueError(f"{name} has {tensor.dim()} dimensions: it must have at least 2, (..., T, dim)")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value has {value.shape[-2]} rows: it must have key's number, {key.shape[-2]}")
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise ValueError(
            "enable_gqa is True: query, key and value must have a head dimension, (..., heads, T, dim)"
        )

    heads, kv_heads = (x.shape[-3] if x.dim() >= 3 else 1 for x in (query, key))
    if enable_gqa:
        if value.shape[-3] != kv_heads:
            raise ValueError(f"value has {value.shape[-3]} heads: it must have key's number, {kv_heads}")
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"query has {heads} heads: the number must be a multiple of key's, {kv_heads}")
        lead_q, lead_k, lead_v = (x.shape[:-3] for x in (query, key, value))
    else:
        lead_q, lead_k, lead_v = (x.shape[:-2] for x in (query, key, value))
    try:
        batch = torch.broadcast_shapes(lead_q, lead_k, lead_v)
    except RuntimeError:
        hint = "" if enable_gqa else "; enable_gqa=True allows more query heads than key heads"
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} have "
            f"leading dimensions that do not broadcast{hint}"
        ) from None
    if not enable_gqa:
        heads = kv_heads = batch[-1] if batch else 1
        batch = batch[:-1]

    def dense(x: Tensor, num_heads: int) -> Tensor:
        x = x.expand(*batch, num_heads, *x.shape[-2:])
        return x.reshape(-1, num_heads, *x.shape[-2:]).transpose(1, 2)

    # Without a head dimension anywhere the output has none either.
    leading = (*batch, heads) if max(query.dim(), key.dim(), value.dim()) >= 3 else ()
    return dense(query, heads), dense(key, kv_heads), dense(value, kv_heads), leading


def _causal_top_left(q: Tensor, k: Tensor, v: Tensor, settings: dict) -> tuple[Tensor, Tensor]:
    """Row i sees keys 0..i. Keys past Tq are seen by nobody; rows past Tk see every key."""
    tq, tk = q.shape[1], k.shape[1]
    if tq <= tk:
        return topk_attn_func(q, k[:, :tq], v[:, :tq], causal=True, **settings)
    head_out, head_lse = topk_attn_func(q[:, :tk], k, v, causal=True, **settings)
    tail_out, tail_lse = topk_attn_func(q[:, tk:], k, v, causal=False, **settings)
    return torch.cat((head_out, tail_out), dim=1), torch.cat((head_lse, tail_lse), dim=2)


def _masked_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, leading: tuple, settings: dict):
    """Attention under a key mask: every sequence's kept keys are moved to its front and become its
    document."""
    batch, tq, heads, _ = q.shape
    tk, kv_heads = k.shape[1], k.shape[2]
    keys = _key_mask(mask, leading, tq, tk)  # (*leading, tk) with broadcast dims of size 1
    keys = keys.reshape(1, tk) if not leading else keys
    # A mask that differs between heads makes every head a batch entry of its own.
    folded = 1
    if keys.shape[-2] == 1:
        keys = keys.expand(*leading[:-1], 1, tk).reshape(batch, tk)
    else:
        folded = heads
        if settings["select"] == "kv_group" and heads != kv_heads:
            raise ValueError("attn_mask differs between heads: select='kv_group' keeps one set per KV group")
        keys = keys.expand(*leading, tk).reshape(batch * heads, tk)
        k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2).reshape(batch * heads, -1, 1, x.shape[-1]) for x in (q, k, v))
        kv_heads = 1
    rows = keys.shape[0]

    # Two documents per sequence: its queries with the keys that count, and no queries with the rest. The
    # shapes do not depend on the mask's values, so nothing is read back from the device.
    order = (~keys).to(torch.uint8).argsort(dim=1, stable=True)
    index = (order + torch.arange(rows, device=k.device)[:, None] * tk).reshape(-1)
    k_packed, v_packed = (x.reshape(rows * tk, kv_heads, x.shape[-1]).index_select(0, index) for x in (k, v))
    start = torch.arange(rows + 1, device=k.device, dtype=torch.int32)
    cu_q = (start * tq).repeat_interleave(2)[1:]
    cu_k = (start * tk).repeat_interleave(2)[1:].clone()
    cu_k[1::2] = start[:-1] * tk + keys.sum(dim=1, dtype=torch.int32)
    out, lse = topk_attn_varlen_func(
        q.reshape(rows * tq, heads // folded, q.shape[-1]),
        k_packed,
        v_packed,
        cu_q,
        cu_k,
        tq,
        tk,
        causal=False,
        **settings,
    )
    out = out.reshape(batch, folded, tq, heads // folded, v.shape[-1]).transpose(2, 3)
    out = out.reshape(batch, heads, tq, v.shape[-1]).transpose(1, 2)
    lse = lse.reshape(heads // folded, batch, folded, tq).permute(1, 2, 0, 3).reshape(batch, heads, tq)
    return out, lse


def _key_mask(mask: Tensor, leading: tuple, tq: int, tk: int) -> Tensor:
    """Checks ``attn_mask`` and reduces it to its keys: (..., tk) that broadcasts to (*leading, tk)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask is a {type(mask).__name__}: it must be None or a bool Tensor")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"attn_mask has dtype {mask.dtype}: additive masks would change the scores that select the "
            "keys, so it must be None or a bool mask of keys"
        )
    full = (*leading, tq, tk)
    try:
        broadcast = torch.broadcast_shapes(mask.shape, full) == full
    except RuntimeError:
        broadcast = False
    if not broadcast:
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}: it must broadcast to {full}")
    mask = mask.reshape((1,) * (len(full) - mask.dim()) + mask.shape)
    if mask.shape[-1] != tk:
        mask = mask.expand(*mask.shape[:-1], tk)
    if mask.shape[-2] == 1 or mask.stride(-2) == 0:
        return mask[..., 0, :]
    first = mask[..., :1, :]
    if not torch.equal(mask, first.expand_as(mask)):
        raise ValueError(
            "attn_mask differs between query rows: only a mask of keys that is equal for all rows can be "
            "honoured; use is_causal=True, or topk_attn_varlen_func for packed documents"
        )
    return first[..., 0, :]
