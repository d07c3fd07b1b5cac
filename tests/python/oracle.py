"""Independent float64 oracle of the selection contract, in plain numpy.

Written from the contract's words alone; it shares no code with the library. Everything is dense and row by
row: slow, obvious, and only meant for small cases.

The kept set depends on the last bit of a score, so the oracle does not compute scores in float64.
`chain_scores` reproduces the library's scores bit for bit: one chain of fused multiply-adds in ascending
channel order, rounded to float32 (float64 for float64 inputs) after every step. With these the kept sets can
be compared key for key on any input, also where rounding alone decides. A caller may pass other scores.

Tensors come in as torch tensors of any dtype and go out as float64 (bool, int64 where it is natural).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------------------
# Settings and budget
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The contract's arguments, with its defaults."""

    causal: bool = True
    topk: int | None = None
    ratio: float | None = None
    min_keys: int = 1
    max_keys: int | None = None
    select: str = "head"
    sink: int = 0
    recent: int = 0
    softmax_scale: float | None = None

    def scale(self, head_dim: int) -> float:
        return 1.0 / math.sqrt(head_dim) if self.softmax_scale is None else self.softmax_scale

    def but(self, **changes) -> Settings:
        return replace(self, **changes)

    def kwargs(self) -> dict:
        """The arguments that differ from the defaults, as keyword arguments of the library."""
        default = Settings()
        return {k: v for k, v in self.__dict__.items() if v != getattr(default, k)}


def _rounded(x: Fraction) -> Fraction:
    """x rounded once to float64 (Fraction -> float is correctly rounded)."""
    return Fraction(float(x))


def budget(n: int, s: Settings) -> int:
    """W(n), in exact arithmetic with the two float64 roundings that the contract prescribes."""
    if n == 0:
        return 0
    if s.topk is not None:
        want = s.topk
    else:
        product = _rounded(Fraction(s.ratio) * n)
        want = math.ceil(_rounded(product - Fraction(1e-6)))
    want = max(want, s.min_keys)
    if s.max_keys is not None:
        want = min(want, s.max_keys)
    return max(1, min(want, n))


# ------------------------------------------------------------------------------------------------------------
# Scores, bit for bit
# ------------------------------------------------------------------------------------------------------------


def _two_sum(a, b):
    """a + b = sum + error exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a, b):
    """a * b = product + error exactly (Dekker, Veltkamp split; no overflow or underflow)."""

    def split(x):
        big = x * 134217729.0
        high = big - (big - x)
        return high, x - high

    product = a * b
    ah, al = split(a)
    bh, bl = split(b)
    return product, al * bl - (((product - ah * bh) - al * bh) - ah * bl)


def _sum_to_odd(a, b):
    """a + b rounded to odd: where inexact, the neighbouring float64 whose last bit is set.

    Rounding such a value once more to a format at least two bits narrower gives the correctly rounded sum.
    """
    total, error = _two_sum(a, b)
    total = np.atleast_1d(total)
    even = (total.view(np.int64) & 1) == 0
    move = even & (error != 0) & np.isfinite(total) & np.isfinite(error)
    return np.where(move, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def _fma32(a, b, c):
    """fma(a, b, c) in float32; the arrays are float64 and hold float32 values, so a * b is exact."""
    return _sum_to_odd(c, a * b).astype(np.float32).astype(np.float64)


def _fma64(a, b, c):
    """fma(a, b, c) in float64 by error-free transformations (Boldo, Melquiond 2008)."""
    uh, ul = _two_product(a, b)
    th, tl = _two_sum(c, ul)
    vh, vl = _two_sum(uh, th)
    exact = vh + _sum_to_odd(tl, vl)
    plain = a * b + c  # infinities and NaNs, for which the transformations do not hold
    return np.where(np.isfinite(exact), exact, plain)


def chain_scores(q: np.ndarray, k: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Raw scores of q (Tq, H, D) and k (Tk, Hkv, D), float64 arrays of values of `dtype` -> (H, Tq, Tk)."""
    fma = _fma64 if dtype == torch.float64 else _fma32
    tq, heads, dim = q.shape
    tk, kv_heads, _ = k.shape
    k = np.repeat(k, heads // kv_heads, axis=1)
    acc = np.zeros((heads, tq, tk))
    with np.errstate(all="ignore"):
        for d in range(dim):
            qd = np.broadcast_to(q[:, :, d].T[:, :, None], acc.shape)
            kd = np.broadcast_to(k[:, :, d].T[:, None, :], acc.shape)
            acc = fma(qd, kd, acc)
    return acc


# ------------------------------------------------------------------------------------------------------------
# One row
# ------------------------------------------------------------------------------------------------------------


def visible_keys(i: int, tq: int, tk: int, causal: bool, leftpad: int = 0) -> list[int]:
    """Keys that query row i sees: bottom-right causal, not in the left padding."""
    return [j for j in range(leftpad, tk) if not causal or j <= i + (tk - tq)]


def ordered(scores: np.ndarray, keys: list[int]) -> list[int]:
    """`keys` in the contract's order: NaN first, higher score first (-0 == +0), then lower index first."""
    js = np.asarray(keys, dtype=np.int64)
    s = scores[js]
    nan = np.isnan(s)
    return js[np.lexsort((js, np.where(nan, 0.0, -s), ~nan))].tolist()


def select_row(scores: np.ndarray, seen: list[int], s: Settings) -> tuple[list[int], float, int]:
    """(kept keys ascending, threshold, tie_index) of one row with scores (Tk,)."""
    w = budget(len(seen), s)
    kept: list[int] = []
    for j in seen[: s.sink]:
        if len(kept) < w:
            kept.append(j)
    for j in reversed(seen[max(0, len(seen) - s.recent) :]):
        if len(kept) < w and j not in kept:
            kept.append(j)
    always = set(kept)
    contest = ordered(scores, [j for j in seen if j not in always])[: w - len(kept)]
    if not contest:
        return sorted(kept), math.nan, -1
    last = contest[-1]
    threshold = float(scores[last])
    return sorted(kept + contest), (0.0 if threshold == 0 else threshold), last


# ------------------------------------------------------------------------------------------------------------
# One sequence
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """out (.., Tq, H, Dv), lse, threshold, tie_index (.., H, Tq), kept (.., H, Tq, Tk), gradients."""

    out: torch.Tensor
    lse: torch.Tensor
    threshold: torch.Tensor
    tie_index: torch.Tensor
    kept: torch.Tensor | list[torch.Tensor]
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None


def _f64(x: torch.Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().to(torch.float64).cpu().numpy()


def select_sequence(scores: np.ndarray, kv_heads: int, s: Settings, leftpad: int = 0):
    """scores (H, Tq, Tk) -> kept (H, Tq, Tk) bool, threshold (H, Tq), tie_index (H, Tq)."""
    heads, tq, tk = scores.shape
    kept = np.zeros(scores.shape, dtype=bool)
    threshold = np.full((heads, tq), math.nan)
    tie_index = np.full((heads, tq), -1, dtype=np.int64)
    group = heads // kv_heads
    ranking = scores
    if s.select == "kv_group":
        # np.max hands a NaN on, as the contract asks.
        ranking = np.repeat(scores.reshape(kv_heads, group, tq, tk).max(axis=1), group, axis=0)
    for i in range(tq):
        seen = visible_keys(i, tq, tk, s.causal, leftpad)
        for h in range(heads):
            row, threshold[h, i], tie_index[h, i] = select_row(ranking[h, i], seen, s)
            kept[h, i, row] = True
    return kept, threshold, tie_index


def sequence(q, k, v, s: Settings, *, dtype, leftpad=0, scores=None, dout=None, dlse=None) -> dict:
    """Attention of one sequence: q (Tq, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), float64 arrays.

    `dtype` is the tensors' own. With `dout` (Tq, H, Dv) (and `dlse` (H, Tq)) also dq, dk, dv; the kept set is
    a constant.
    """
    tq, heads, dim = q.shape
    group = heads // k.shape[1]
    scale = s.scale(dim)
    raw = chain_scores(q, k, dtype) if scores is None else scores
    kept, threshold, tie_index = select_sequence(raw, k.shape[1], s, leftpad)
    out = np.zeros((tq, heads, v.shape[2]))
    lse = np.full((heads, tq), -math.inf)
    grads = {} if dout is None else {"dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    with np.errstate(all="ignore"):
        for h in range(heads):
            g = h // group
            for i in range(tq):
                js = np.flatnonzero(kept[h, i])
                if len(js) == 0:
                    continue
                z = raw[h, i, js] * scale
                top = z.max()  # NaN if any is NaN
                if top == -math.inf:
                    continue
                p = np.exp(z - top)
                total = p.sum()
                p = p / total
                lse[h, i] = top + math.log(total)
                out[i, h] = p @ v[js, g]
                if dout is None:
                    continue
                go = dout[i, h]
                dp = v[js, g] @ go
                gl = 0.0 if dlse is None else dlse[h, i]
                ds = p * (dp - p @ dp + gl) * scale
                grads["dq"][i, h] += ds @ k[js, g]
                grads["dk"][js, g] += ds[:, None] * q[i, h]
                grads["dv"][js, g] += p[:, None] * go
    return dict(out=out, lse=lse, threshold=threshold, tie_index=tie_index, kept=kept, **grads)


# ------------------------------------------------------------------------------------------------------------
# Batches, packed documents, caches
# ------------------------------------------------------------------------------------------------------------


def _stack(rows: list[dict]) -> Result:
    return Result(**{name: torch.from_numpy(np.stack([r[name] for r in rows])) for name in rows[0]})


def attention(q, k, v, s: Settings, *, scores=None, dout=None, dlse=None) -> Result:
    """q (B,Tq,H,D), k (B,Tk,Hkv,D), v (B,Tk,Hkv,Dv), scores (B,H,Tq,Tk), dout like out, dlse (B,H,Tq)."""
    dtype = q.dtype
    q, k, v, scores, dout, dlse = (_f64(x) for x in (q, k, v, scores, dout, dlse))

    def at(x, b):
        return None if x is None else x[b]

    rows = [
        sequence(q[b], k[b], v[b], s, dtype=dtype, scores=at(scores, b), dout=at(dout, b), dlse=at(dlse, b))
        for b in range(q.shape[0])
    ]
    return _stack(rows)


def varlen(q, k, v, cu_q, cu_k, s: Settings, *, dout=None, dlse=None) -> Result:
    """Packed: q (total_q,H,D), k, v (total_k,Hkv,.), cu_* the bounds; `kept` has one entry a document."""
    dtype = q.dtype
    q, k, v, dout, dlse = (_f64(x) for x in (q, k, v, dout, dlse))
    cu_q, cu_k = [int(x) for x in cu_q], [int(x) for x in cu_k]
    parts = []
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        parts.append(
            sequence(
                q[rows],
                k[keys],
                v[keys],
                s,
                dtype=dtype,
                dout=None if dout is None else dout[rows],
                dlse=None if dlse is None else dlse[:, rows],
            )
        )
    axis = {"out": 0, "lse": 1, "threshold": 1, "tie_index": 1, "dq": 0, "dk": 0, "dv": 0}
    joined = {
        n: torch.from_numpy(np.concatenate([p[n] for p in parts], axis=axis[n]))
        for n in parts[0]
        if n != "kept"
    }
    return Result(kept=[torch.from_numpy(p["kept"]) for p in parts], **joined)


def logical_cache(cache: torch.Tensor, seqlens, new: torch.Tensor | None, block_table: torch.Tensor | None):
    """The rows of each sequence, old ones then new ones, as a list of (n, Hkv, .) tensors."""
    rows = []
    for b, n in enumerate(int(x) for x in seqlens):
        if block_table is None:
            old = cache[b, :n]
        else:
            page = cache.shape[1]
            old = [cache[int(block_table[b, t // page]), t % page] for t in range(n)]
            old = torch.stack(old) if old else cache.new_zeros((0, *cache.shape[2:]))
        rows.append(old if new is None else torch.cat([old, new[b]]))
    return rows


def kvcache(
    q, k_cache, v_cache, seqlens, s: Settings, *, k=None, v=None, leftpad=None, block_table=None
) -> Result:
    """Decode or prefill against a cache; `kept` is a list of (H, Tq, n_b) in logical positions.

    With paged caches that share pages, `k` and `v` must not be written to shared pages for this to hold.
    """
    dtype = q.dtype
    keys = logical_cache(k_cache, seqlens, k, block_table)
    values = logical_cache(v_cache, seqlens, v, block_table)
    rows = []
    for b in range(q.shape[0]):
        pad = 0 if leftpad is None else int(leftpad[b])
        rows.append(sequence(_f64(q[b]), _f64(keys[b]), _f64(values[b]), s, dtype=dtype, leftpad=pad))
    kept = [torch.from_numpy(r.pop("kept")) for r in rows]
    return Result(kept=kept, **_stack_plain(rows))


def _stack_plain(rows: list[dict]) -> dict:
    return {name: torch.from_numpy(np.stack([r[name] for r in rows])) for name in rows[0]}


def select_scores(scores: torch.Tensor, topk: int, lengths=None):
    """scores (rows, n) -> threshold (rows), tie_index (rows), indices (rows, topk) int32, -1 padded."""
    s = Settings(topk=topk)
    values = _f64(scores)
    thresholds, ties, indices = [], [], []
    for r, row in enumerate(values):
        n = len(row) if lengths is None else int(lengths[r])
        kept, threshold, tie = select_row(row, list(range(n)), s)
        thresholds.append(threshold)
        ties.append(tie)
        indices.append(kept + [-1] * (topk - len(kept)))
    return (
        torch.tensor(thresholds, dtype=torch.float64),
        torch.tensor(ties, dtype=torch.int32),
        torch.tensor(indices, dtype=torch.int32).reshape(len(values), topk),
    )


# ------------------------------------------------------------------------------------------------------------
# Reading kept sets
# ------------------------------------------------------------------------------------------------------------


def index_lists(kept: torch.Tensor, width: int) -> torch.Tensor:
    """kept (..., Tk) bool -> (..., width) int32, ascending, -1 padded."""
    rows = math.prod(kept.shape[:-1])
    out = torch.full((rows, width), -1, dtype=torch.int32)
    for r, row in enumerate(kept.reshape(rows, kept.shape[-1])):
        js = row.nonzero().flatten().to(torch.int32)
        out[r, : len(js)] = js
    return out.reshape(*kept.shape[:-1], width)


def mask_of(indices: torch.Tensor, width: int) -> torch.Tensor:
    """(..., Wmax) index lists -> (..., width) bool."""
    mask = torch.zeros(*indices.shape[:-1], width + 1, dtype=torch.bool)
    mask.scatter_(-1, indices.long().clamp(min=-1).where(indices >= 0, torch.tensor(width)), True)
    return mask[..., :width]


def decode_encoding(scores, threshold, tie_index, s: Settings, leftpad=0) -> torch.Tensor:
    """The kept set that (threshold, tie_index) stands for, by the contract's words.

    scores (H, Tq, Tk) (with kv_group: the group's largest, on every head), threshold and tie_index (H, Tq).
    """
    heads, tq, tk = scores.shape
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for i in range(tq):
        seen = visible_keys(i, tq, tk, s.causal, leftpad)
        w = budget(len(seen), s)
        sinks = seen[: min(s.sink, w)]
        rest = w - len(sinks)
        recents = [j for j in reversed(seen) if j not in sinks][: min(s.recent, rest)]
        for h in range(heads):
            t, tie = float(threshold[h, i]), int(tie_index[h, i])
            for j in seen:
                x = float(scores[h, i, j])
                if j in sinks or j in recents:
                    kept[h, i, j] = True
                elif tie < 0:
                    continue
                elif math.isnan(t):
                    kept[h, i, j] = math.isnan(x) and j <= tie
                else:
                    kept[h, i, j] = math.isnan(x) or x > t or (x == t and j <= tie)
    return kept
