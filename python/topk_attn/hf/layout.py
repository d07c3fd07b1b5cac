"""Padding masks and position_ids to documents: which rows of a batch form sequences of their own.

``Packing`` is the common form: the rows of q and k that take part, flattened over the batch, and the
documents they form, ready for ``topk_attn_varlen_func``. Causality is exact for any padding: the queries of a
call are the last Tq tokens of a row, so after dropping the padded ones the remaining queries are the last of
the remaining keys.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class Packing:
    """Documents of a flattened batch.

    Attributes:
        q_index, k_index: int64, rows of the (B*Tq) queries and (B*Tk) keys that take part; None: all of them.
        cu_seqlens_q, cu_seqlens_k: int32 (documents + 1).
        max_seqlen_q, max_seqlen_k: longest document.
        whole_rows: every batch row is one document, in order.
    """

    q_index: Tensor | None
    k_index: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    whole_rows: bool = False

    @functools.cached_property
    def bounds(self) -> tuple[list[int], list[int]]:
        """The offsets on the host."""
        return self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()


def from_cu_seqlens(
    cu_q: Tensor, cu_k: Tensor, max_q: int | Tensor | None, max_k: int | Tensor | None
) -> Packing:
    """Documents that the caller names. Lengths that are not given are read from the offsets."""
    for name, value in (("cu_seq_lens_q", cu_q), ("cu_seq_lens_k", cu_k)):
        if value.dim() != 1 or value.numel() < 2:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: it must be one-dimensional, (documents + 1)"
            )

    def longest(given, cu: Tensor) -> int:
        return int(given) if given is not None else int(cu.diff().max())

    return Packing(
        None, None, cu_q.to(torch.int32), cu_k.to(torch.int32), longest(max_q, cu_q), longest(max_k, cu_k)
    )


def restarts(position_ids: Tensor | None, batch: int, tq: int) -> Tensor | None:
    """bool (B, Tq): True where ``position_ids`` begins another document; None when there is nothing to go
    by."""
    if position_ids is None or tq == 1:
        return None
    positions = position_ids[None] if position_ids.dim() == 1 else position_ids
    if positions.dim() != 2 or positions.shape[1] != tq or positions.shape[0] not in (1, batch):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: it must be (1, {tq}) or ({batch}, {tq}) "
            "so that packed documents can be told apart"
        )
    flags = torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
    # transformers' own rule for packed rows: the next token of a document is at the next position.
    flags[:, 1:] = positions.diff(dim=1) != 1
    return flags.expand(batch, tq)


def from_positions(position_ids: Tensor | None, batch: int, tq: int, tk: int) -> Packing | None:
    """Documents of unpadded rows; None when every row is one document.

    Raises:
        ValueError: documents begin in a call that continues a cache; which keys are theirs cannot be known.
    """
    flags = restarts(position_ids, batch, tq)
    if flags is None:
        return None
    if torch.compiler.is_compiling():
        return _from_flags_static(flags) if tq == tk else None
    if not bool(flags.any()):
        return None
    if tq != tk:
        if bool((position_ids.diff(dim=-1) <= 0).any()):
            raise _cannot_continue(tq, tk)
        return None
    starts = flags.clone()
    starts[:, 0] = True
    cu = _offsets(starts.reshape(-1).nonzero().squeeze(1), batch * tq)
    longest = int(cu.diff().max())
    return Packing(None, None, cu, cu, longest, longest)


def from_mask(valid: Tensor, position_ids: Tensor | None, tq: int, tk: int) -> Packing:
    """Documents of rows with padding anywhere.

    Args:
        valid: bool (B, L), True = token; the queries are its last tq columns.
        tk: keys per row in memory, >= L.
    """
    batch, length = valid.shape
    valid_q = valid[:, length - tq :]
    # A row without queries needs no keys either.
    valid_k = valid & valid_q.any(dim=1, keepdim=True)
    row, column = valid_k.nonzero(as_tuple=True)
    k_index = row * tk + column
    q_index = valid_q.reshape(-1).nonzero().squeeze(1)

    lengths_k, lengths_q = valid_k.sum(dim=1), valid_q.sum(dim=1)
    has_queries = lengths_q > 0
    whole_rows = bool(has_queries.all())
    cu_k = _cumulative(lengths_k[has_queries])
    cu_q = _cumulative(lengths_q[has_queries])

    if position_ids is not None and tq > 1:
        positions = position_ids[None] if position_ids.dim() == 1 else position_ids
        if positions.dim() != 2 or positions.shape[1] != tq or positions.shape[0] not in (1, batch):
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}: it must be (1, {tq}) or ({batch}, {tq})"
            )
        # Padding may leave gaps in the positions, so only going back begins another document here.
        at = positions.expand(batch, tq).reshape(-1)[q_index]
        back = torch.zeros_like(at, dtype=torch.bool)
        back[1:] = at.diff() <= 0
        back[cu_q[:-1].long()] = False
        if bool(back.any()):
            if tq != length:
                raise _cannot_continue(tq, length)
            back[cu_q[:-1].long()] = True
            whole_rows = False
            cu_q = cu_k = _offsets(back.nonzero().squeeze(1), at.numel())
    if q_index.numel() == 0:
        return Packing(q_index, k_index, cu_q, cu_k, 0, 0)
    return Packing(q_index, k_index, cu_q, cu_k, int(cu_q.diff().max()), int(cu_k.diff().max()), whole_rows)


def keys_only(valid: Tensor, tq: int, tk: int) -> Packing:
    """Bidirectional attention under a key mask: every query row takes part and sees the valid keys of its
    row."""
    batch = valid.shape[0]
    row, column = valid.nonzero(as_tuple=True)
    cu_q = torch.arange(batch + 1, device=valid.device, dtype=torch.int32) * tq
    cu_k = _cumulative(valid.sum(dim=1))
    return Packing(None, row * tk + column, cu_q, cu_k, tq, int(cu_k.diff().max()) if batch else 0)


def _from_flags_static(flags: Tensor) -> Packing:
    """As ``from_positions`` while tracing: shapes must not depend on values, so there is one document per
    token, all but the real ones empty."""
    batch, tq = flags.shape
    total = batch * tq
    starts = flags | (torch.arange(tq, device=flags.device) == 0)
    token = torch.arange(total, device=flags.device)
    begin = torch.where(starts.reshape(-1), token, total).sort().values
    cu = _offsets(begin, total)
    return Packing(None, None, cu, cu, tq, tq)


def _offsets(begin: Tensor, total: int) -> Tensor:
    return torch.nn.functional.pad(begin, (0, 1), value=total).to(torch.int32)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _cannot_continue(tq: int, tk: int) -> ValueError:
    return ValueError(
        f"position_ids restart inside a call of {tq} new tokens that continues a cache ({tk} keys): packed "
        "documents cannot continue a cache; pass them in a call of their own, or one sequence per batch row"
    )


class PerForward(threading.local):
    """Remembers the last result of ``compute`` for the same tensors, so that the layers of one forward share
    it.

    Tensors are compared by identity and version counter; an in-place change or another tensor is another key.
    """

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._refs: tuple = ()
        self._value = None

    def get(self, tensors: tuple[Tensor | None, ...], numbers: tuple, compute):
        if torch.compiler.is_compiling() or any(t is not None and t.is_inference() for t in tensors):
            return compute()
        key = (*numbers, *(None if t is None else (id(t), t._version) for t in tensors))
        alive = all(ref is None or ref() is not None for ref in self._refs)
        if key != self._key or not alive:
            self._value = compute()
            self._key = key
            self._refs = tuple(None if t is None else weakref.ref(t) for t in tensors)
        return self._value
