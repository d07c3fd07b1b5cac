"""The attention function registered with transformers under ``topk_attn`` (and ``paged|topk_attn``).

Every layer of every call comes through ``topk_attention_forward``. It reads the model's settings, refuses
what it cannot honour, finds out which rows form sequences (padding, packing, caches) and calls the operators;
layers and calls that are configured dense go to torch's SDPA with the same sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from . import layout, settings
from .dense import dense_attention, dense_masked_keys, dense_packed
from .new_rows import NewRows

# Arguments of other attention functions that change the result and have no counterpart here.
_UNSUPPORTED = (
    "alibi",
    "alibi_slopes",
    "attention_bias",
    "attention_chunk_size",
    "attn_bias",
    "block_mask",
    "chunk_size",
    "head_mask",
    "indices",
    "position_bias",
    "qv",
    "s_aux",
    "score_mod",
    "sinks",
    "softcap",
    "window_size",
)

# Calls of up to this many rows per sequence read keys where they lie, through the cache operator made for few
# rows. Longer ones are worth a copy of the keys that count.
_FEW_ROWS = 16

_per_forward = layout.PerForward()


def topk_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Args:
        module: the attention layer; its ``config.topk_attention`` holds the settings.
        query: (B, H, Tq, D).
        key, value: (B, Hkv, Tk, .); with a cache, all cached keys, or the new rows as TopKCache returns them.
        attention_mask: what ``topk_attention_mask`` made, a bool (B, L) key mask, or None.
        position_ids: (1 or B, Tq); documents begin where they restart, unless ``cu_seq_lens_q`` says it.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed documents of the flattened batch.
        cache: transformers' paged cache, in continuous batching.

    Returns:
        (B, Tq, H, Dv) and None (attention weights are never made).
    """
    cfg = settings.read(module.config)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(module, query, dropout, sliding_window, kwargs)
    layer = getattr(module, "layer_idx", None)
    if cfg.dense_layers and layer is None:
        raise ValueError("config.topk_attention has dense_layers, but this attention module has no layer_idx")
    if cfg.prefill == "dense" and module.training:
        raise ValueError(
            "config.topk_attention['prefill'] is 'dense', the decode-only experiment: training would be "
            "dense in every row; set it to 'topk' to train, or call model.eval()"
        )
    run = _Attend(cfg, scaling, causal, dense_layer=layer in cfg.dense_layers)
    if cache is not None:
        lengths = (max_length_q, max_length_k)
        return _paged(
            run, module, query, key, value, cache, cu_seq_lens_q, cu_seq_lens_k, lengths, kwargs
        ), None

    packed = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    q, v = query.transpose(1, 2), value.transpose(1, 2)
    if isinstance(key, NewRows):
        pages, layer, k = key.cache, key.layer, key.plain().transpose(1, 2)
        mask = None if packed else attention_mask
        if not packed and _read_in_pages(run, pages.past, q, mask, position_ids, causal):
            leftpad = None if mask is None else mask[:, 0, 0, 0].contiguous()
            return pages.attend(layer, q, k, v, leftpad, **run.arguments), None
        k, v = pages.write(layer, k, v)
    else:
        k = key.transpose(1, 2)
    if packed:
        if attention_mask is not None:
            raise ValueError(
                "cu_seq_lens_q and a padding mask are both given: packed rows have no padding, give one"
            )
        packing = _given_documents(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, q, k)
        return run.packed(q, k, v, packing), None
    if attention_mask is None:
        return _unmasked(run, q, k, v, position_ids, causal), None
    return _masked(run, q, k, v, attention_mask, position_ids, causal), None


class _Attend:
    """Runs one layer's attention on a given arrangement of sequences, sparse or dense."""

    def __init__(self, cfg: settings.Settings, scale: float | None, causal: bool, dense_layer: bool) -> None:
        self.scale = scale
        self.causal = causal
        self.dense_layer = dense_layer
        self.dense_prefill = cfg.prefill == "dense"
        self.arguments = {**cfg.selection(), "softmax_scale": scale}

    def is_dense(self, tq: int) -> bool:
        """Whether a call with tq query rows per sequence is dense."""
        return self.dense_layer or (self.dense_prefill and tq > 1)

    def batch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every row one sequence without padding: q (B, Tq, H, D), k and v (B, Tk, Hkv, .)."""
        tq, tk = q.shape[1], k.shape[1]
        if self.is_dense(tq):
            return dense_attention(q, k, v, self.scale, self.causal)
        if tq == tk or tq > _FEW_ROWS or not self.causal or _needs_grad(q, k, v):
            return functional.topk_attn_func(q, k, v, causal=self.causal, **self.arguments)
        lengths = torch.full((q.shape[0],), tk, dtype=torch.int32, device=q.device)
        return functional.topk_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **self.arguments)

    def spans(self, q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """Keys [begin, end) of every row, the queries being the last of them; no gradient."""
        return functional.topk_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=end.contiguous(),
            cache_leftpad=begin.contiguous(),
            causal=self.causal,
            **self.arguments,
        )

    def packed(self, q: Tensor, k: Tensor, v: Tensor, packing: layout.Packing) -> Tensor:
        """Documents of the flattened batch; rows that take no part come out as zeros."""
        batch, tq = q.shape[:2]
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        rows = q.shape[0]
        if packing.q_index is not None:
            q = q.index_select(0, packing.q_index)
        if packing.k_index is not None:
            k, v = k.index_select(0, packing.k_index), v.index_select(0, packing.k_index)
        if packing.q_index is not None and packing.q_index.numel() == 0:
            out = q.new_zeros(0, q.shape[1], v.shape[-1])
        elif self.is_dense(tq):
            out = dense_packed(q, k, v, self.scale, self.causal, packing)
        else:
            out = self.documents(q, k, v, packing)
        if packing.q_index is not None:
            out = out.new_zeros(rows, *out.shape[1:]).index_copy(0, packing.q_index, out)
        return out.reshape(batch, tq, *out.shape[1:])

    def documents(self, q: Tensor, k: Tensor, v: Tensor, packing: layout.Packing) -> Tensor:
        return functional.topk_attn_varlen_func(
            q,
            k,
            v,
            packing.cu_seqlens_q,
            packing.cu_seqlens_k,
            packing.max_seqlen_q,
            packing.max_seqlen_k,
            causal=self.causal,
            **self.arguments,
        )


def _read_in_pages(
    run: _Attend, past: int, q: Tensor, mask: Tensor | None, position_ids: Tensor | None, causal: bool
) -> bool:
    """Whether the operator reads the keys where a TopKCache has them: sparse calls of few rows that continue
    sequences, whole or padded on the left. Others take a copy of the rows, and then go the usual way."""
    batch, tq = q.shape[:2]
    if past == 0 or tq > _FEW_ROWS or not causal or run.is_dense(tq):
        return False
    if mask is not None:
        return tq == 1 and _mask_kind(mask, batch, tq, past + tq) == "spans"
    tk = past + tq
    rows = ("rows", batch, tq, tk)
    return (
        tq == 1
        or _per_forward.get((position_ids,), rows, lambda: layout.from_positions(position_ids, batch, tq, tk))
        is None
    )


def _unmasked(
    run: _Attend, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor | None, causal: bool
) -> Tensor:
    batch, tq, tk = q.shape[0], q.shape[1], k.shape[1]
    if causal and tq > tk:
        raise ValueError(
            f"the call has {tq} queries but {tk} keys: causal attention needs at least as many keys"
        )
    packing = None
    if tq > 1 and (causal or tq == tk):
        packing = _per_forward.get(
            (position_ids,),
            ("rows", batch, tq, tk),
            lambda: layout.from_positions(position_ids, batch, tq, tk),
        )
    return run.batch(q, k, v) if packing is None else run.packed(q, k, v, packing)


def _masked(
    run: _Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, position_ids: Tensor | None, causal: bool
) -> Tensor:
    batch, tq, tk = q.shape[0], q.shape[1], k.shape[1]
    kind = _mask_kind(mask, batch, tq if causal else 0, tk)
    if not causal:
        if kind == "spans":
            mask = _valid_from_spans(mask, tk)
        packing = _per_forward.get(
            (mask,), ("keys", batch, tq, tk), lambda: layout.keys_only(mask.reshape(batch, -1), tq, tk)
        )
        return run.packed(q, k, v, packing)
    if kind == "spans" and tq == 1:
        begin, end = mask.reshape(batch, 2).unbind(1)
        if run.is_dense(tq):
            return dense_masked_keys(q, k, v, run.scale, _valid_from_spans(mask, tk))
        if not _needs_grad(q, k, v):
            return run.spans(q, k, v, begin, end)
    packing = _per_forward.get(
        (mask, position_ids),
        ("documents", batch, tq, tk),
        lambda: _documents_of_mask(mask, kind, position_ids, tq, tk),
    )
    if (
        kind == "spans"
        and tq <= _FEW_ROWS
        and packing.whole_rows
        and not run.is_dense(tq)
        and not _needs_grad(q, k, v)
    ):
        begin, end = mask.reshape(batch, 2).unbind(1)
        return run.spans(q, k, v, begin, end)
    return run.packed(q, k, v, packing)


def _mask_kind(mask: Tensor, batch: int, least: int, tk: int) -> str:
    """'spans' or 'keys' (masks.py), the latter of ``least`` to ``tk`` columns; anything else raises."""
    if isinstance(mask, Tensor):
        shape = tuple(mask.shape)
        if mask.dtype == torch.int32 and shape == (batch, 1, 1, 2):
            return "spans"
        keys = (mask.dim() == 2 and shape[0] == batch) or shape[:3] == (batch, 1, 1)
        if mask.dtype == torch.bool and keys and least <= shape[-1] <= tk:
            return "keys"
        what = f"a {mask.dtype} tensor of shape {shape}"
    else:
        what = f"a {type(mask).__name__}"
    raise ValueError(
        f"attention_mask is {what}: topk_attn takes a 2D padding mask (batch, past + new tokens) given to "
        "the model; custom 4D masks and additive masks would change which keys a row sees row by row and "
        "are not supported"
    )


def _valid_from_spans(mask: Tensor, tk: int) -> Tensor:
    begin, end = mask.reshape(-1, 2).unbind(1)
    position = torch.arange(tk, device=mask.device)
    return (position >= begin[:, None]) & (position < end[:, None])


@torch.compiler.disable
def _documents_of_mask(
    mask: Tensor, kind: str, position_ids: Tensor | None, tq: int, tk: int
) -> layout.Packing:
    if kind == "spans":
        # All rows end at the call's last token.
        valid = _valid_from_spans(mask, int(mask[:, 0, 0, 1].max()))
    else:
        valid = mask.reshape(mask.shape[0], -1)
    return layout.from_mask(valid, position_ids, tq, tk)


def _given_documents(cu_q, cu_k, max_q, max_k, q: Tensor, k: Tensor) -> layout.Packing:
    tokens_q, tokens_k = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    if cu_q is None or (cu_k is None and tokens_q != tokens_k):
        missing = "cu_seq_lens_q" if cu_q is None else "cu_seq_lens_k"
        raise ValueError(
            f"{missing} is not given: packed documents need both cu_seq_lens_q and cu_seq_lens_k"
        )
    if cu_k is None:
        cu_k, max_k = cu_q, max_q
    max_q, max_k = (x if x is None else int(x) for x in (max_q, max_k))
    return _per_forward.get(
        (cu_q, cu_k),
        ("given", tokens_q, tokens_k, max_q, max_k),
        lambda: layout.from_cu_seqlens(cu_q, cu_k, max_q, max_k),
    )


def _paged(
    run: _Attend, module, query, key, value, cache, cu_q, cu_k, lengths, kwargs: dict[str, Any]
) -> Tensor:
    """Continuous batching: new rows of many requests in one row, their keys in transformers' paged cache."""
    from . import paged

    q, k, v, packing = paged.gather(module, query, key, value, cache, cu_q, cu_k, lengths, kwargs)
    if run.dense_prefill and not run.dense_layer:
        return paged.dense_prefill(run, q, k, v, packing)[None]
    return run.packed(q[None], k[None], v[None], packing)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _refuse(
    module, query: Tensor, dropout: float, sliding_window: int | None, kwargs: dict[str, Any]
) -> None:
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}: it must be (batch, heads, tokens, head_dim)")
    if sliding_window is not None:
        raise ValueError(
            f"the layer has a sliding window of {sliding_window} keys: topk_attn does not combine top-k "
            "with a window and never ignores one; use a config without it (sliding_window=None)"
        )
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}: top-k attention has none; set config.attention_dropout to 0.0 "
            "to train"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is given: topk_attn has no such argument and never ignores it")
    if getattr(module, "sinks", None) is not None:
        raise ValueError(
            "the layer has learned attention sinks: topk_attn has no such term and never ignores it"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions is True: topk_attn never makes attention weights; use 'eager' to see them"
        )
