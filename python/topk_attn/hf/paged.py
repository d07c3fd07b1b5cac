"""Continuous batching: the keys that transformers' paged cache holds for the requests of a batch.

The rows of all requests come as one row of tokens; ``cu_seq_lens_q`` and ``cu_seq_lens_k`` bound the
requests. The cache is asked to store the new rows and to return every key of every request, request after
request.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import layout
from .dense import dense_packed


def gather(module, query, key, value, cache, cu_q, cu_k, lengths, kwargs: dict[str, Any]):
    """Updates the cache and returns q (total_q, H, D), k and v (total_k, Hkv, .) and the documents."""
    if cu_q is None or cu_k is None:
        raise ValueError(
            "a paged cache is given without cu_seq_lens_q and cu_seq_lens_k: the requests are not known"
        )
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "block_table is given: transformers' block table decode path belongs to flash attention; set "
            "max_blocks_per_request=0 in the continuous batching config"
        )
    max_q, max_k = lengths
    # Older releases call these arguments max_seqlen_q and max_seqlen_k.
    max_q = kwargs.get("max_seqlen_q") if max_q is None else max_q
    max_k = kwargs.get("max_seqlen_k") if max_k is None else max_k
    if isinstance(cu_k, dict):
        cu_k, max_k = _full_attention(cu_k), _full_attention(max_k)

    where = {"read_index": kwargs["read_index"], "write_index": kwargs["write_index"]}
    if "kwargs" in inspect.signature(cache.update).parameters:
        bounds = {"cu_seq_lens_k": {"full_attention": cu_k}, "max_length_k": {"full_attention": max_k}}
        k, v = cache.update(
            key_states=key,
            value_states=value,
            layer_idx=module.layer_idx,
            kwargs={**kwargs, **where, **bounds},
        )
        k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
    else:
        k, v = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, **where)
    q = query[0].transpose(0, 1)
    return q, k, v, _documents(cu_q, cu_k, max_q, max_k, q.shape[0], k.shape[0])


def dense_prefill(run, q: Tensor, k: Tensor, v: Tensor, packing: layout.Packing) -> Tensor:
    """Requests with several new rows are dense, those with one (decode) are sparse; returns (total_q, H,
    Dv)."""
    bounds_q, bounds_k = packing.bounds
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    groups: dict[bool, list[int]] = {False: [], True: []}
    for i in range(len(bounds_q) - 1):
        if bounds_q[i + 1] > bounds_q[i]:
            groups[bounds_q[i + 1] - bounds_q[i] > 1].append(i)
    for is_prefill, documents in groups.items():
        if not documents:
            continue
        rows_q, cu_q, max_q = _rows(bounds_q, documents, q.device)
        rows_k, cu_k, max_k = _rows(bounds_k, documents, k.device)
        part = layout.Packing(None, None, cu_q, cu_k, max_q, max_k)
        inputs = (q[rows_q], k[rows_k], v[rows_k])
        attended = (
            dense_packed(*inputs, run.scale, run.causal, part) if is_prefill else run.documents(*inputs, part)
        )
        out[rows_q] = attended
    return out


def _full_attention(by_type: dict[str, Any]) -> Any:
    if set(by_type) != {"full_attention"}:
        raise ValueError(
            f"the paged cache has layers of type {sorted(by_type)}: topk_attn takes full_attention only"
        )
    return by_type["full_attention"]


def _documents(
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, total_q: int, total_k: int
) -> layout.Packing:
    """Requests, and one more document for the rows that a padded batch has after them."""
    cu_q = torch.nn.functional.pad(cu_q.to(torch.int32), (0, 1), value=total_q)
    cu_k = torch.nn.functional.pad(cu_k.to(torch.int32), (0, 1), value=total_k)
    if cu_q.device.type == "cpu":
        max_q = max(int(max_q), total_q - int(cu_q[-2]))
        max_k = max(int(max_k), total_k - int(cu_k[-2]))
    return layout.Packing(None, None, cu_q, cu_k, int(max_q), int(max_k))


def _rows(bounds: list[int], documents: list[int], device: torch.device) -> tuple[Tensor, Tensor, int]:
    spans = [(bounds[i], bounds[i + 1]) for i in documents]
    rows = torch.cat([torch.arange(begin, end) for begin, end in spans]).to(device)
    cu = torch.tensor([0, *(end - begin for begin, end in spans)]).cumsum(0).to(device, torch.int32)
    return rows, cu, max(end - begin for begin, end in spans)
