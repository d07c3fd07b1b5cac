"""Caches with key codes, hard keys, and comparisons of the certified scan with the exact one and training."""

import contextlib
import math

import pytest
import torch
from cuda_helpers import BF16, DEVICE, F16, capability, int32, permuted_keys
from op_helpers import assert_same

import topk_attn

NAN = math.nan
HALVES = (BF16, F16)
RETURNS = dict(return_lse=True, return_indices=True, return_slots=True, return_encoding=True)
RESULTS = ("out", "lse", "indices", "slots", "threshold", "tie_index")
KINDS = (
    "normal",
    "outliers",
    "offset",
    "duplicates",
    "integers",
    "equal",
    "norms",
    "denormal",
    "huge",
    "drift",
    "permuted",
    "not finite",
)
BF16_ALONE = ("norms", "denormal", "huge")

# Without any GPU conftest.py decides.
CERTIFIED_CARD = pytest.mark.skipif(
    DEVICE.type != "cuda" or (torch.cuda.is_available() and capability() != (9, 0)),
    reason="the certified scan needs a GPU of compute capability 9.0",
)


class Compared:
    rows = 0


COMPARED = Compared()

# ------------------------------------------------------------------------------------------------------------
# Inputs
# ------------------------------------------------------------------------------------------------------------


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def make_keys(kind, b, n, heads, d, dtype, seed=0):
    """(b, n, heads, d), hard in one way each."""
    k = random(b, n, heads, d, seed=seed)
    at = torch.arange(n, device=DEVICE)[None, :, None, None]
    channel = torch.arange(d, device=DEVICE)
    if kind == "outliers":
        k *= torch.where(channel % 8 == 3, 8.0, 1.0)
        k += 6 * torch.sin(channel * 7.0)
    elif kind == "offset":
        k += 40 * torch.sin(channel * 3.0)
    elif kind == "duplicates":
        k = k[:, torch.arange(n, device=DEVICE) // 3 * 3]
    elif kind == "integers":
        k = k.round()
    elif kind == "equal":
        k = k[:, :1].expand(b, n, heads, d)
    elif kind == "norms":
        k = torch.ldexp(k, (random(b, n, heads, 1, seed=seed + 1) * 8).round().clamp(-20, 20).int())
    elif kind == "denormal":
        k = torch.ldexp(k.double(), torch.tensor(-128, device=DEVICE))
    elif kind == "huge":
        k = torch.where(random(b, n, heads, 1, seed=seed + 1) > 2, k * 1e18, k)
    elif kind == "drift":
        k += at * 4e-4 * torch.where(channel % 3 == 0, 1.0, -0.3)
    elif kind == "permuted":
        k = permuted_keys(torch.empty(b, n, heads, d, dtype=dtype), seed).to(DEVICE)
    elif kind == "not finite":
        which = random(b, n, heads, 1, seed=seed + 1)
        k = torch.where(which > 3.2, NAN, torch.where(which < -3.2, -math.inf, k))
        k[:, n // 2, :, 0] = math.inf
    return k.to(dtype)


def make_queries(kind, b, tq, heads, d, dtype, seed=5):
    q = random(b, tq, heads, d, seed=seed)
    if kind == "permuted":
        return torch.full((b, tq, heads, d), 171 / 128, dtype=dtype, device=DEVICE)
    if kind == "integers":
        q = q.round()
    if kind == "huge":
        q *= 1e20
    if kind == "not finite":
        q[-1, :, 1, 3] = NAN
        q[-1, :, 2] = 0
    return q.to(dtype)


class Cache:
    """Keys and values with codes beside them, contiguous or in scattered pages. What is not a valid row is
    NaN, and its codes claim, wrongly, that they are exact."""

    def __init__(self, keys, lengths, page=None, pads=None, seed=0, encoded=True):
        b, n, heads, d = keys.shape
        self.keys, self.lengths, self.page = keys, list(lengths), page
        self.pads = pads or [0] * b
        self.values = random(b, n, heads, d, seed=seed + 77).to(keys.dtype)
        self.seqlens = int32(*lengths)
        self.extra = {}
        if pads:
            self.extra["cache_leftpad"] = int32(*pads)
        rows = [torch.full_like(x, NAN) for x in (self.keys, self.values)]
        for to, of in zip(rows, (self.keys, self.values), strict=True):
            for i, length in enumerate(lengths):
                to[i, self.pads[i] : length] = of[i, self.pads[i] : length]
        if page is not None:
            per_row = -(-n // page)
            order = torch.randperm(b * per_row + 3, generator=torch.Generator().manual_seed(seed))
            table = order[: b * per_row].to(DEVICE)
            self.extra["block_table"] = table.int().reshape(b, per_row)
            pages = []
            for x in rows:
                padded = torch.full((b, per_row * page, heads, d), NAN, dtype=x.dtype, device=DEVICE)
                padded[:, :n] = x
                filled = torch.full((len(order), page, heads, d), NAN, dtype=x.dtype, device=DEVICE)
                filled[table] = padded.view(-1, page, heads, d)
                pages.append(filled)
            rows = pages
        self.k, self.v = rows
        self.codes = topk_attn.cuda.new_key_codes(self.k)
        if encoded:
            self.rebuild()
            self.lie_about_the_rest()

    def rebuild(self, **kw):
        topk_attn.cuda.rebuild_key_codes(self.codes, self.k, self.seqlens, **self.extra, **kw)

    def lie_about_the_rest(self):
        """Codes of random keys with a bound of nearly nothing, wherever nothing was encoded."""
        views = topk_attn.cuda.key_codes_views(self.codes, self.k)
        unknown = views.words == 0
        wrong = torch.randint_like(views.codes, -127, 128)
        views.codes.copy_(torch.where(unknown[..., None], wrong, views.codes))
        views.words.copy_(torch.where(unknown, 0x3F800001, views.words))

    def call(self, q, scan, new=None, **kw):
        """With the codes in any case: whichever scan serves must keep them up."""
        override = topk_attn.cuda.override(scan=scan) if scan else contextlib.nullcontext()
        k, v = new or (None, None)
        with override:
            out, lse, indices, slots, (threshold, tie) = topk_attn.topk_attn_with_kvcache(
                q, self.k, self.v, k, v, cache_seqlens=self.seqlens, key_codes=self.codes, **self.extra,
                **kw, **RETURNS,
            )  # fmt: skip
        return out, lse, indices, slots, threshold, tie

    def stats(self):
        found = topk_attn.cuda.certified_stats(self.codes)
        topk_attn.cuda.reset_certified_stats(self.codes)
        return found


def same_sets(cache: Cache, q, what="", new=None, **kw):
    """Certified against exact, all results to the bit, and the statistics of the certified call."""
    want = cache.call(q, "exact", new=new, **kw)
    cache.stats()
    got = cache.call(q, "certified", new=new, **kw)
    for name, a, b in zip(RESULTS, got, want, strict=True):
        assert_same(a, b, f"{what}: {name}")
    COMPARED.rows += want[4].numel()
    return got, cache.stats()


def same_as_training(cache: Cache, q, got, what="", **kw):
    """The sets of topk_select over each sequence's visible keys."""
    indices, threshold, tie = got[2], got[4], got[5]
    for i, (length, pad) in enumerate(zip(cache.lengths, cache.pads, strict=True)):
        if length == pad:
            assert bool((indices[i] == -1).all()), what
            continue
        seen = cache.keys[i : i + 1, pad:length]
        want = topk_attn.topk_select(q[i : i + 1], seen, **kw, return_indices=True)
        assert_same(threshold[i : i + 1], want[0], f"{what}: threshold of {i}")
        assert_same(tie[i : i + 1], torch.where(want[1] >= 0, want[1] + pad, -1).int(), f"{what}: tie of {i}")
        lists = torch.where(want[2] >= 0, want[2] + pad, -1).int()
        width = lists.shape[-1]
        assert_same(indices[i : i + 1, ..., :width], lists, f"{what}: indices of {i}")
        assert bool((indices[i, ..., width:] == -1).all()), what
        COMPARED.rows += want[0].numel()


def assert_served(stats, rows=None, what=""):
    print(f"{what} {stats}, survivors / W {stats.survivors / max(1, stats.kept):.3f}")
    assert stats.rows > 0 and (rows is None or stats.rows == rows), stats
    assert stats.certified >= 0.99 * stats.rows, stats
    assert stats.kept <= stats.survivors <= stats.listed, stats
