"""Vectorised references for the operator tests that run on a device.

`select` is the oracle's selection (tests/python/oracle.py) written with torch's stable sort, so that
thousands of rows take milliseconds on the device under test; test_cuda_reference.py holds it against the
oracle. `exact` is attention over a given mask in float64, and `dense` the same with the roundings of a dense
kernel of the inputs' dtype: products in float32, probabilities, their gradients and results rounded to the
dtype. The error of `dense` against `exact` is the yardstick for the error of the operators.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import oracle
import torch
from oracle import Settings
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------
# Selection
# ------------------------------------------------------------------------------------------------------------


class Selected(NamedTuple):
    """kept (..., H, Tq, Tk) bool; threshold float32 and tie_index int32 (..., H, Tq)."""

    kept: Tensor
    threshold: Tensor
    tie_index: Tensor


@functools.lru_cache(maxsize=200_000)
def budget(n: int, s: Settings) -> int:
    return oracle.budget(n, s)


def seen_counts(tq: int, tk: int, causal: bool) -> list[int]:
    """Keys that each row sees: always the first n of the sequence."""
    return [min(tk, max(0, i + 1 + tk - tq)) if causal else tk for i in range(tq)]


def visible(tq: int, tk: int, causal: bool, device) -> Tensor:
    """(Tq, Tk) bool."""
    n = torch.tensor(seen_counts(tq, tk, causal), device=device)
    return torch.arange(tk, device=device) < n[:, None]


def ordered_keys(scores: Tensor) -> Tensor:
    """int64, greater for a score that comes earlier: NaN first, then higher scores, -0 equal to +0."""
    bits = torch.where(scores == 0, torch.zeros_like(scores), scores).contiguous().view(torch.int32).long()
    ascending = torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    return torch.where(scores.isnan(), 2**32, ascending)


def group_largest(scores: Tensor, kv_heads: int) -> Tensor:
    """The group's largest score on each of its heads, NaN if any is NaN. scores (..., H, Tq, Tk)."""
    heads = scores.shape[-3]
    grouped = scores.unflatten(-3, (kv_heads, heads // kv_heads))
    return grouped.amax(-3).repeat_interleave(heads // kv_heads, dim=-3)


def select(scores: Tensor, kv_heads: int, s: Settings) -> Selected:
    """The contract's selection of float32 scores (..., H, Tq, Tk)."""
    scores = scores.float()
    tq, tk = scores.shape[-2:]
    device = scores.device
    if s.select == "kv_group":
        scores = group_largest(scores, kv_heads)
    counts = seen_counts(tq, tk, s.causal)
    n = torch.tensor(counts, device=device)[:, None]
    w = torch.tensor([budget(x, s) for x in counts], device=device)[:, None]
    j = torch.arange(tk, device=device)
    seen = j < n
    # Levels above every score: sinks by ascending index, then recent keys newest first.
    rank = ordered_keys(scores)
    newest_first = n - 1 - j
    rank = torch.where(newest_first < min(s.recent, tk), 2**40 - newest_first, rank)
    rank = torch.where(j < min(s.sink, tk), 2**41 - j, rank)
    rank = torch.where(seen, rank, -(2**40))
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(-1, order, j.expand_as(order))
    kept = (place < w) & seen

    if tk == 0:
        nothing = scores.new_full(scores.shape[:-1], math.nan)
        return Selected(kept, nothing, torch.full_like(nothing, -1, dtype=torch.int32))
    last = order.gather(-1, (w - 1).clamp(min=0).expand(*order.shape[:-1], 1))
    contested = (w > 0) & (rank.gather(-1, last) < 2**39)
    threshold = torch.where(contested, scores.gather(-1, last), math.nan)[..., 0]
    threshold = torch.where(threshold == 0, 0.0, threshold)
    tie_index = torch.where(contested, last, -1)[..., 0].to(torch.int32)
    return Selected(kept, threshold, tie_index)


def index_lists(kept: Tensor, width: int) -> Tensor:
    """(..., width) int32, ascending, -1 padded."""
    tk = kept.shape[-1]
    js = torch.where(kept, torch.arange(tk, device=kept.device), tk).sort(dim=-1).values
    js = torch.where(js == tk, -1, js)[..., :width].to(torch.int32)
    return torch.nn.functional.pad(js, (0, width - js.shape[-1]), value=-1)


def mask_of(indices: Tensor, tk: int) -> Tensor:
    """Index lists (..., Wmax) -> (..., tk) bool."""
    at = torch.where(indices >= 0, indices, tk).long()
    mask = torch.zeros(*indices.shape[:-1], tk + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, at, True)[..., :tk]


def float64_scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B,Tq,H,D), k (B,Tk,Hkv,D) -> (B,H,Tq,Tk)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bihd,bjhd->bhij", q.double(), k.double())


def rounding_bound(q: Tensor, k: Tensor) -> Tensor:
    """What a float32 score may differ from the float64 one, (B,H,Tq,Tk)."""
    return float64_scores(q.abs(), k.abs()) * (q.shape[-1] * 2.0**-23)


def wrongly_sorted(q: Tensor, k: Tensor, kept: Tensor, s: Settings) -> Tensor:
    """Rows (B,H,Tq) that keep a key whose float64 score lies below that of a dropped one by more than
    rounding. For select="head" without always-kept keys."""
    scores, bound = float64_scores(q, k), rounding_bound(q, k)
    seen = visible(q.shape[1], k.shape[1], s.causal, q.device)
    least_kept = (scores + bound).masked_fill(~kept, math.inf).amin(-1)
    best_dropped = (scores - bound).masked_fill(kept | ~seen, -math.inf).amax(-1)
    return best_dropped > least_kept


# ------------------------------------------------------------------------------------------------------------
# Attention over a mask
# ------------------------------------------------------------------------------------------------------------


class Attended(NamedTuple):
    """out (B,Tq,H,Dv), lse (B,H,Tq) and, where a dout was given, the gradients."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


def _attend(q, k, v, kept, scale, dout, dlse, work: torch.dtype, rounded) -> Attended:
    heads, kv_heads = q.shape[2], k.shape[2]
    group = heads // kv_heads
    q, k, v = (x.transpose(1, 2).to(work) for x in (q, k, v))  # (B, heads, T, .)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    z = (q @ k.mT * scale).masked_fill(~kept, -math.inf)
    top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -math.inf)
    top = torch.where(top == -math.inf, 0.0, top)
    p = (z - top).exp()
    total = p.sum(-1, keepdim=True)
    lse = (total.log() + top)[..., 0]
    p = torch.where(total > 0, p / total, 0.0)
    out = rounded(rounded(p) @ v)
    if dout is None:
        return Attended(out.transpose(1, 2), lse)
    dout = dout.transpose(1, 2).to(work)
    delta = (out * dout).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(work)[..., None]
    ds = rounded(p * (dout @ v.mT - delta))
    dq = ds @ k * scale
    dk, dv = ((x.mT @ y).unflatten(1, (kv_heads, group)).sum(2) for x, y in ((ds, q), (rounded(p), dout)))
    return Attended(out.transpose(1, 2), lse, *(rounded(x).transpose(1, 2) for x in (dq, dk * scale, dv)))


def exact(q, k, v, kept, scale, dout=None, dlse=None) -> Attended:
    """In float64. kept (B,H,Tq,Tk)."""
    return _attend(q, k, v, kept, scale, dout, dlse, torch.float64, lambda x: x)


def dense(q, k, v, kept, scale, dout=None, dlse=None) -> Attended:
    """In float32, rounded to the inputs' dtype where a dense kernel rounds."""
    return _attend(q, k, v, kept, scale, dout, dlse, torch.float32, lambda x: x.to(q.dtype).float())
