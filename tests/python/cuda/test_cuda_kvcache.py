"""topk_attn_with_kvcache: against the reference, and key for key the sets of training."""

import math

import cuda_reference as reference
import oracle
import pytest
import torch
from cuda_helpers import (
    BF16,
    DEVICE,
    DTYPES,
    F16,
    F32,
    assert_encoding,
    assert_lse,
    assert_twice_dense,
    int32,
    make_qkv,
    name_of,
    normal,
    own_scores,
    poison_free_memory,
    refuses,
)
from op_helpers import assert_close, assert_same, selection_kwargs
from oracle import Settings

import topk_attn

NAN, INF = math.nan, math.inf
PAGES = [None, 1, 3, 16, 64]
RETURNS = dict(return_lse=True, return_indices=True, return_slots=True, return_encoding=True)


class Caches:
    """A contiguous cache, or the same rows in scattered pages; everything outside the valid rows is NaN."""

    def __init__(
        self, lengths, new, capacity, hkv, d, dv, dtype, page=None, leftpad=None, seed=0, kind="normal"
    ):
        b = len(lengths)
        q, keys, values = make_qkv(b, 1, capacity, hkv, hkv, d, dv, dtype=dtype, seed=seed, kind=kind)
        self.lengths, self.new, self.page = list(lengths), new, page
        self.pads = [0] * b if leftpad is None else list(leftpad)
        self.constant_query = bool((q == q.flatten()[0]).all())
        # Logical rows of every sequence, the new ones included.
        self.keys = [keys[i, : n + new].clone() for i, n in enumerate(lengths)]
        self.values = [values[i, : n + new].clone() for i, n in enumerate(lengths)]
        self.seqlens = int32(*lengths)
        self.new_k = self.new_v = None
        if new:
            self.new_k = torch.stack([keys[i, n : n + new] for i, n in enumerate(lengths)])
            self.new_v = torch.stack([values[i, n : n + new] for i, n in enumerate(lengths)])
        for i, n in enumerate(lengths):
            for rows in (keys, values):
                rows[i, n:] = NAN
                rows[i, : self.pads[i]] = NAN
        self.leftpad = None if leftpad is None else int32(*leftpad)
        self.capacity, self.block_table = capacity, None
        self.k, self.v = keys, values
        if page is not None:
            self._scatter(b, page, seed)

    def _scatter(self, b, page, seed):
        per_row = -(-self.capacity // page)
        total = b * per_row + 3
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: b * per_row].to(DEVICE)
        self.block_table = order.to(torch.int32).reshape(b, per_row)
        pages = []
        for rows in (self.k, self.v):
            filled = torch.full((total, page, *rows.shape[2:]), NAN, dtype=rows.dtype, device=DEVICE)
            padded = torch.full((b, per_row * page, *rows.shape[2:]), NAN, dtype=rows.dtype, device=DEVICE)
            padded[:, : self.capacity] = rows
            filled[order] = padded.reshape(b * per_row, page, *rows.shape[2:])
            pages.append(filled)
        self.k, self.v = pages
        self.capacity = per_row * page

    def kwargs(self):
        extra = {"cache_seqlens": self.seqlens}
        if self.new_k is not None:
            extra.update(k=self.new_k, v=self.new_v)
        if self.leftpad is not None:
            extra["cache_leftpad"] = self.leftpad
        if self.block_table is not None:
            extra["block_table"] = self.block_table
        return extra

    def slots(self, indices):
        """Physical slots of logical positions (B,H,Tq,W)."""
        out = torch.full_like(indices, -1)
        for b in range(indices.shape[0]):
            t = indices[b].long()
            if self.block_table is None:
                slot = b * self.capacity + t
            else:
                slot = self.block_table[b].long()[t.clamp(min=0) // self.page] * self.page + t % self.page
            out[b] = torch.where(t >= 0, slot, -1).to(torch.int32)
        return out

    def written(self):
        """The caches as they must be after the call."""
        after = []
        for rows, new in ((self.k, self.new_k), (self.v, self.new_v)):
            rows = rows.clone()
            for b, n in enumerate(self.lengths if new is not None else []):
                at = torch.arange(n, n + self.new, device=DEVICE)
                if self.block_table is None:
                    rows[b, at] = new[b]
                else:
                    rows[self.block_table[b].long()[at // self.page], at % self.page] = new[b]
            after.append(rows)
        return after


def queries(c: Caches, tq, h, seed=5):
    shape = (len(c.lengths), tq, h, c.k.shape[3])
    if c.constant_query:
        return torch.full(shape, 171 / 128, dtype=c.k.dtype, device=DEVICE)
    return normal(*shape, dtype=c.k.dtype, seed=seed)


def selected(q, keys, s: Settings, pad, capacity, select_from=own_scores):
    """The reference's selection of one sequence's rows q (1,Tq,H,D): kept (1,H,Tq,n) in logical positions,
    threshold, tie_index."""
    n = keys.shape[0]
    hkv = keys.shape[1]
    seen = keys[None, pad:]
    scores = select_from(q, seen) if n > pad else q.new_zeros((1, q.shape[2], q.shape[1], 0), dtype=F32)
    want = reference.select(scores, hkv, s)
    kept = torch.nn.functional.pad(want.kept, (pad, 0))
    tie = torch.where(want.tie_index >= 0, want.tie_index + pad, -1).to(torch.int32)
    return reference.Selected(kept, want.threshold, tie)


def check_cache(c: Caches, s: Settings, tq=1, h=4, seed=5, q=None):
    """One call against the reference: sets, encoding and slots exactly, outputs nearly, the caches too."""
    dtype, b = c.k.dtype, len(c.lengths)
    q = queries(c, tq, h, seed) if q is None else q
    after_k, after_v = c.written()
    before = c.seqlens.clone()
    poison_free_memory()
    call = topk_attn.topk_attn_with_kvcache
    out, lse, indices, slots, encoding = call(q, c.k, c.v, **c.kwargs(), **s.kwargs(), **RETURNS)
    assert_same(c.seqlens, before, "cache_seqlens")
    assert_same(c.k, after_k, "k_cache")
    assert_same(c.v, after_v, "v_cache")
    assert out.dtype == dtype and lse.dtype == F32 and indices.dtype == slots.dtype == torch.int32
    width = reference.budget(c.capacity, s)
    assert tuple(indices.shape) == tuple(slots.shape) == (b, h, tq, width)
    # Without lists other kernels may serve the call.
    bare = call(q, c.k, c.v, **c.kwargs(), **s.kwargs(), return_lse=True, return_encoding=True)
    for got, want in zip(bare[2], encoding, strict=True):
        assert_same(got, want, "encoding without lists")
    for i in range(b):
        keys, values, pad, row = c.keys[i], c.values[i], c.pads[i], q[i : i + 1]
        want = selected(row, keys, s, pad, c.capacity)
        what = f"sequence {i}"
        assert_encoding(encoding[0][i : i + 1], encoding[1][i : i + 1], want, what)
        lists = reference.index_lists(want.kept, width)
        assert_same(indices[i : i + 1], lists, f"{what}: indices")
        # Padding holds NaN, which no row keeps: out of the way of the dense products.
        keys, values = (x[None].clone() for x in (keys, values))
        keys[:, :pad], values[:, :pad] = 0, 0
        inputs = (row, keys, values, want.kept, s.scale(q.shape[-1]))
        exact, dense = reference.exact(*inputs), reference.dense(*inputs)
        for some_out, some_lse in ((out, lse), bare[:2]):
            assert_lse(some_lse[i : i + 1], exact.lse, f"{what}: lse")
            assert_twice_dense(some_out[i : i + 1], dense.out, exact.out, dtype, f"{what}: out")
    assert_same(slots, c.slots(indices), "slots")
    return out, lse, indices, encoding


# ------------------------------------------------------------------------------------------------------------
# Against the reference
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("new", [0, 1])
def test_decode(page, dtype, new):
    check_cache(Caches([13, 129, 1, 240], new, 248, 2, 64, 64, dtype, page), Settings(topk=16))


@pytest.mark.parametrize("page", [None, 1, 16])
@pytest.mark.parametrize("new,tq", [(5, 5), (3, 1), (1, 4), (0, 7), (17, 17), (40, 40), (2, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_chunks(page, new, tq, causal):
    """Speculative decoding and chunked prefill: from a few query rows of a KV head to several tiles of 64."""
    c = Caches([0, 111, 3], new, 152, 2, 64, 64, BF16, page, seed=new)
    check_cache(c, Settings(ratio=0.3, min_keys=2, causal=causal), tq=tq)


@pytest.mark.parametrize("page", [None, 3])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=name_of)
def test_empty_and_full_caches(page, dtype):
    check_cache(Caches([0, 0], 0, 12, 2, 64, 64, dtype, page), Settings(topk=3))
    check_cache(Caches([0, 0], 1, 12, 2, 64, 64, dtype, page), Settings(topk=3))
    check_cache(Caches([0, 5], 0, 12, 2, 64, 64, dtype, page), Settings(topk=3), tq=3)
    check_cache(Caches([32, 31], 0, 32, 2, 64, 64, dtype, page), Settings(topk=5))
    check_cache(Caches([0, 2], 30, 32, 2, 64, 64, dtype, page), Settings(ratio=0.2), tq=30)


@pytest.mark.parametrize("page", [None, 3, 16])
@pytest.mark.parametrize("new,tq", [(0, 1), (1, 1), (4, 4), (4, 30)])
def test_left_padding(page, new, tq):
    for s in (Settings(topk=4), Settings(ratio=0.4, sink=2, recent=2)):
        c = Caches([70, 39, 7, 60], new, 76, 2, 64, 64, BF16, page, leftpad=[33, 0, 7, 59])
        check_cache(c, s, tq=tq)


@pytest.mark.parametrize("h,hkv", [(1, 1), (2, 2), (8, 1), (6, 2), (40, 2), (24, 8)])
@pytest.mark.parametrize("select", ["head", "kv_group"])
@pytest.mark.parametrize("page", [None, 3])
def test_heads(h, hkv, select, page):
    for dtype, tq in ((BF16, 1), (BF16, 3), (F32, 2)):
        c = Caches([13, 90], 1, 96, hkv, 64, 64, dtype, page)
        check_cache(c, Settings(topk=6, select=select), h=h, tq=tq)


@pytest.mark.parametrize("d,dv", [(8, 8), (40, 104), (72, 24), (64, 128), (128, 128), (200, 8), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tq", [1, 20])
def test_dims(d, dv, dtype, tq):
    for page in (None, 5):
        c = Caches([13, 89], 1, 96, 2, d, dv, dtype, page)
        check_cache(c, Settings(topk=6), h=4, tq=tq)


@pytest.mark.parametrize("kind", ["permuted", "two_values", "equal", "duplicated", "mixed", "integers"])
@pytest.mark.parametrize("page", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_hard_orders(kind, page, dtype):
    s = Settings(topk=37, softmax_scale=1e-7 if kind == "mixed" else None)
    for tq in (2, 12):
        check_cache(Caches([40, 300], 1, 310, 2, 64, 16, dtype, page, kind=kind), s, tq=tq)


EVERY_BUDGET = [
    Settings(topk=1),
    Settings(topk=10**6),
    Settings(ratio=1.0),
    Settings(ratio=0.01),
    Settings(ratio=0.01, min_keys=8, max_keys=9),
    Settings(ratio=0.5, max_keys=300),
    Settings(topk=5, sink=2, recent=2),
    Settings(topk=5, sink=9),
    Settings(topk=5, recent=9),
    Settings(topk=50, sink=20, recent=20),
    Settings(topk=70, sink=33, recent=31),
    Settings(topk=5, sink=3, recent=1, select="kv_group", softmax_scale=0.3),
]


@pytest.mark.parametrize("s", EVERY_BUDGET, ids=lambda s: str(s.kwargs()))
@pytest.mark.parametrize("page", [None, 3])
def test_settings(s, page):
    for dtype in (BF16, F32):
        check_cache(Caches([3, 129, 517], 1, 520, 2, 64, 64, dtype, page), s)
    check_cache(Caches([3, 129, 517], 5, 522, 2, 64, 64, BF16, page), s, tq=5)


def check_against_training(c: Caches, q, s: Settings) -> None:
    """Sets, key for key, of topk_select on each sequence's visible keys; outputs over them."""
    dtype = c.k.dtype
    out, lse, indices, slots, encoding = topk_attn.topk_attn_with_kvcache(
        q, c.k, c.v, **c.kwargs(), **s.kwargs(), **RETURNS
    )
    for i, keys in enumerate(c.keys):
        row, pad, what = q[i : i + 1], c.pads[i], f"sequence {i}"
        seen, values = keys[None, pad:], c.values[i][None, pad:]
        threshold, tie_index, lists = topk_attn.topk_select(
            row, seen, **selection_kwargs(s), return_indices=True
        )
        assert_same(encoding[0][i : i + 1], threshold, f"{what}: threshold")
        at = torch.where(tie_index >= 0, tie_index + pad, -1).to(torch.int32)
        assert_same(encoding[1][i : i + 1], at, f"{what}: tie_index")
        width = lists.shape[-1]
        at = torch.where(lists >= 0, lists + pad, -1).to(torch.int32)
        assert_same(indices[i : i + 1, ..., :width], at, f"{what}: indices")
        assert bool((indices[i : i + 1, ..., width:] == -1).all()), f"{what}: padding of the indices"
        kept = reference.mask_of(lists, seen.shape[1])
        inputs = (row, seen, values, kept, s.scale(q.shape[-1]))
        exact, dense = reference.exact(*inputs), reference.dense(*inputs)
        assert_lse(lse[i : i + 1], exact.lse, f"{what}: lse")
        assert_twice_dense(out[i : i + 1], dense.out, exact.out, dtype, f"{what}: out")
    assert_same(slots, c.slots(indices), "slots")


@pytest.mark.parametrize("w", [1, 40, 700, 5000])
@pytest.mark.parametrize("page", [None, 16])
def test_long_caches(w, page):
    """More keys than one block of any kernel holds; few and many kept keys."""
    c = Caches([9001, 4097, 2], 1, 9002, 1, 64, 64, BF16, page)
    check_against_training(c, queries(c, 1, 4), Settings(topk=w))


LONG = [
    Settings(ratio=0.01),
    Settings(topk=2500),
    Settings(topk=700, sink=40, recent=33),
    Settings(ratio=0.02, recent=500),
    Settings(topk=300, select="kv_group"),
    Settings(topk=700, causal=False),
]


@pytest.mark.parametrize("kind", ["normal", "two_values", "equal", "integers", "growing", "permuted"])
@pytest.mark.parametrize("s", LONG, ids=lambda s: str(s.kwargs()))
def test_caches_whose_scans_drop_scores(kind, s):
    """So long that decode drops scores below a sampled bound: also where it does not serve, because too
    many scores are equal or because keys grow along the sequence."""
    lengths = [12000, 100, 8300] if DEVICE.type == "cuda" else [9000, 100]
    pads = [2500, 3, 0][: len(lengths)]
    for tq, h, d, dtype in ((1, 4, 64, BF16), (3, 8, 128, F16)):
        made = "normal" if kind == "growing" else kind
        c = Caches(lengths, 4, max(lengths) + 5, 2, d, 64, dtype, 16, leftpad=pads, seed=tq, kind=made)
        if kind == "growing":
            for i, keys in enumerate(c.keys):
                scale = torch.linspace(0.1, 4, keys.shape[0], device=DEVICE, dtype=dtype)[:, None, None]
                keys *= scale
                at = torch.arange(c.pads[i], c.lengths[i], device=DEVICE)
                c.k[c.block_table[i].long()[at // 16], at % 16] = keys[at]
                c.new_k[i] = keys[c.lengths[i] :]
        check_against_training(c, queries(c, tq, h), s)


# ------------------------------------------------------------------------------------------------------------
# Special values, stale rows, odd pages and strides
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tq", [1, 20])
def test_not_finite(dtype, tq):
    """NaN and infinite keys, values and queries, against the oracle fed with the kernels' own scores."""
    c = Caches([60, 33, 40, 50], 0, 64, 2, 64, 64, dtype, 16)
    q = queries(c, tq, 4)
    places = c.block_table

    def put(rows, logical, b, t, head, channel, value):
        rows[int(places[b, t // 16]), t % 16, head, channel] = value
        logical[b][t, head, channel] = value

    put(c.k, c.keys, 0, 7, 0, 3, NAN)
    put(c.k, c.keys, 0, 9, 1, 3, NAN)
    put(c.k, c.keys, 1, 5, 0, 1, INF)
    put(c.k, c.keys, 1, 6, 0, 1, -INF)
    put(c.v, c.values, 2, 11, 0, 2, NAN)
    put(c.v, c.values, 2, 12, 1, 2, INF)
    q[3, 0, 1] = NAN
    q[3, 0, 2, 5] = INF
    s = Settings(topk=6)
    out, lse, indices, _, encoding = topk_attn.topk_attn_with_kvcache(
        q, c.k, c.v, **c.kwargs(), **s.kwargs(), **RETURNS
    )
    for i in range(4):
        row = q[i : i + 1]
        scores = own_scores(row, c.keys[i][None]).cpu()
        want = oracle.attention(row, c.keys[i][None], c.values[i][None], s, scores=scores)
        assert_same(indices[i : i + 1].cpu(), oracle.index_lists(want.kept, 6), f"indices of {i}")
        nan = torch.where(want.threshold.isnan(), NAN, want.threshold)
        for got, expected in ((encoding[0], nan.float()), (encoding[1], want.tie_index.int())):
            assert_same(got[i : i + 1].cpu(), expected, f"encoding of {i}")
        assert_close(
            out[i : i + 1].cpu(), want.out, {BF16: 9e-3, F16: 1.2e-3, F32: 5e-6}[dtype], f"out of {i}"
        )
        assert_close(lse[i : i + 1].cpu(), want.lse, 2e-5, f"lse of {i}")


def test_scores_of_minus_infinity():
    """Rows whose kept scores are all -inf give zeros and -inf."""
    c = Caches([40, 40], 0, 48, 1, 64, 64, BF16)
    q = torch.ones(2, 1, 2, 64, dtype=BF16, device=DEVICE)
    c.k[0, :40, :, 0] = -INF
    c.k[1, :39, :, 0] = -INF
    out, lse = topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=5, return_lse=True)
    assert bool((out[0] == 0).all()) and bool((lse[0] == -INF).all())
    assert bool(lse[1].isfinite().all())
    assert_close(out[1, 0, 0].cpu(), c.v[1, 39, 0].double().cpu(), 1e-2, "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tq", [2, 12])
def test_stale_rows_never_matter(dtype, tq):
    """The same call over NaN, infinite and zero stale rows gives the same bits."""
    results = []
    for stale in (NAN, INF, 0.0, 1e4):
        c = Caches([13, 29], 1, 40, 2, 16, 16, dtype, 3, leftpad=[2, 5])
        c.k[c.k.isnan()], c.v[c.v.isnan()] = stale, stale
        q = normal(2, tq, 4, 16, dtype=dtype)
        results.append(topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=5, return_lse=True))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same(a, b, "stale rows")


@pytest.mark.parametrize("page", [1, 3, 16, 100, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pages_give_the_bits_of_the_contiguous_cache(page, dtype):
    for tq in (1, 4, 20):
        q = normal(3, tq, 4, 64, dtype=dtype)
        outs = []
        for p in (None, page):
            c = Caches([313, 429, 4], 4, 440, 2, 64, 64, dtype, p)
            outs.append(topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=35, return_lse=True))
        for a, b in zip(*outs, strict=True):
            assert_same(a, b, f"page size {page}, {tq} queries")


@pytest.mark.parametrize("dtype", [BF16, F32], ids=name_of)
def test_shared_and_repeated_pages(dtype):
    """Sequences share a prefix, and list the same page more than once."""
    page, s = 4, Settings(topk=6)
    k, v = normal(9, page, 2, 64, dtype=dtype, seed=1), normal(9, page, 2, 64, dtype=dtype, seed=2)
    table = torch.tensor([[3, 3, 7], [3, 3, 1], [3, 8, 3]], dtype=torch.int32, device=DEVICE)
    lengths = [11, 9, 12]
    q = normal(3, 1, 4, 64, dtype=dtype, seed=3)
    out, indices, slots = topk_attn.topk_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=int32(*lengths),
        block_table=table,
        topk=6,
        return_indices=True,
        return_slots=True,
    )
    for i, n in enumerate(lengths):
        at = torch.arange(n, device=DEVICE)
        place = table[i].long()[at // page], at % page
        keys, values, row = k[place][None], v[place][None], q[i : i + 1]
        want = reference.select(own_scores(row, keys), 2, s)
        lists = reference.index_lists(want.kept, 6)
        assert_same(indices[i : i + 1], lists, "indices")
        t = lists.long()
        assert_same(slots[i : i + 1], (table[i].long()[t // page] * page + t % page).int(), "slots")
        inputs = (row, keys, values, want.kept, s.scale(64))
        assert_twice_dense(
            out[i : i + 1], reference.dense(*inputs).out, reference.exact(*inputs).out, dtype, "out"
        )


@pytest.mark.parametrize("filler", [-1, 10**6, -(2**31), 2**31 - 1])
def test_unused_table_entries_are_ignored(filler):
    c = Caches([5, 17, 0], 1, 24, 2, 64, 64, BF16, 4)
    for b, n in enumerate(c.lengths):
        c.block_table[b, -(-(n + 1) // 4) :] = filler
    check_cache(c, Settings(topk=3))


@pytest.mark.parametrize("page", [None, 3])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=name_of)
def test_strided_caches(page, dtype):
    """Slices of larger tensors, (B,Hkv,S,D) storage, K and V side by side, rows that are not aligned."""
    base = Caches([13, 29], 2, 33, 2, 16, 16, dtype, page)
    q = normal(2, 2, 4, 16, dtype=dtype)
    forms = []

    def unaligned(x):
        """Rows that start at odd elements."""
        wide = torch.full((*x.shape[:-1], 19), NAN, dtype=dtype, device=DEVICE)
        wide[..., 1:17] = x
        return wide[..., 1:17]

    for make in (
        lambda x: x.clone(),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, torch.full_like(x, NAN)], dim=-1)[..., :16],
        lambda x: torch.cat([x, torch.full_like(x, NAN)], dim=0)[: x.shape[0]],
        unaligned,
    ):
        k, v = make(base.k), make(base.v)
        result = topk_attn.topk_attn_with_kvcache(q, k, v, **base.kwargs(), topk=5, return_lse=True)
        forms.append([*result, k.contiguous(), v.contiguous()])
    for form in forms[1:]:
        for a, b in zip(form, forms[0], strict=True):
            assert_same(a, b, "strided cache")
    both = torch.stack([base.k, base.v], dim=3)  # (.., Hkv, 2, D): interleaved K and V
    result = topk_attn.topk_attn_with_kvcache(
        q, both[:, :, :, 0], both[:, :, :, 1], **base.kwargs(), topk=5, return_lse=True
    )
    for a, b in zip([*result, both[:, :, :, 0].contiguous()], forms[0], strict=False):
        assert_same(a, b, "interleaved cache")


def test_strided_new_rows_and_queries():
    c = Caches([13, 29], 3, 40, 2, 16, 16, BF16, 3)
    q = normal(2, 3, 4, 16, dtype=BF16)
    want = topk_attn.topk_attn_with_kvcache(q, c.k.clone(), c.v.clone(), **c.kwargs(), topk=5)
    extra = c.kwargs()

    def strided(x):
        wide = torch.full((*x.shape[:-1], 19), NAN, dtype=x.dtype, device=DEVICE)
        wide[..., 3:19] = x
        return wide[..., 3:19]

    extra.update({n: strided(extra[n]) for n in ("k", "v")})
    got = topk_attn.topk_attn_with_kvcache(strided(q), c.k, c.v, **extra, topk=5)
    assert_same(got, want, "strided new rows")


# ------------------------------------------------------------------------------------------------------------
# Parity with training, steps, batches
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "permuted", "integers", "two_values", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("d", [64, 128])
def test_sets_of_training(kind, dtype, d):
    """Token t of a document keeps the same keys in training, in a chunked prefill and in decode with t keys
    in the cache, contiguous or in pages, alone or among 64 sequences."""
    n, h, hkv = (300, 4, 2) if DEVICE.type == "cuda" else (90, 4, 2)
    q, k, v = make_qkv(1, n, n, h, hkv, d, dtype=dtype, seed=11, kind=kind)
    kw = dict(ratio=0.1, min_keys=3)
    threshold, tie_index, lists = topk_attn.topk_select(q, k, **kw, return_indices=True)
    call = topk_attn.topk_attn_with_kvcache
    compared = 0

    def same(got, rows, what):
        nonlocal compared
        out, indices, (t, i) = got
        assert_same(t, threshold[:, :, rows], f"{what}: threshold")
        assert_same(i, tie_index[:, :, rows], f"{what}: tie_index")
        width = min(indices.shape[-1], lists.shape[-1])
        assert_same(indices[..., :width], lists[:, :, rows, :width], f"{what}: indices")
        compared += t.numel()

    extra = dict(**kw, return_indices=True, return_encoding=True)
    for size in (n, 64, 37, 5):  # chunks
        cache = [torch.full((1, n + 3, hkv, d), NAN, dtype=dtype, device=DEVICE) for _ in "kv"]
        for t in range(0, n, size):
            rows = slice(t, min(n, t + size))
            got = call(q[:, rows], *cache, k[:, rows], v[:, rows], cache_seqlens=int32(t), **extra)
            same(got, rows, f"chunks of {size}")
    # Decode of many lengths at once: sequence b holds the first `length` keys of the document.
    lengths = torch.linspace(1, n, 64).long().tolist()
    page = 16
    pages = -(-n // page)
    paged = [torch.full((pages, page, hkv, d), NAN, dtype=dtype, device=DEVICE) for _ in "kv"]
    for to, rows in zip(paged, (k, v), strict=True):
        to.view(-1, hkv, d)[:n] = rows[0]
    table = torch.arange(pages, dtype=torch.int32, device=DEVICE).repeat(64, 1)
    rows = q[0, [x - 1 for x in lengths]][:, None]
    many = call(rows, *paged, cache_seqlens=int32(*lengths), block_table=table, **extra)
    contiguous = [torch.full((64, n, hkv, d), NAN, dtype=dtype, device=DEVICE) for _ in "kv"]
    for b, length in enumerate(lengths):
        contiguous[0][b, :length], contiguous[1][b, :length] = k[0, :length], v[0, :length]
    plain = call(rows, *contiguous, cache_seqlens=int32(*lengths), **extra)
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        for got, what in ((many, "pages"), (plain, "contiguous")):
            part = got[0][one], got[1][one], tuple(x[one] for x in got[2])
            same(part, slice(length - 1, length), f"{what}, length {length}")
        if b % 8 == 0:
            alone = call(rows[one], *(x[one] for x in contiguous), cache_seqlens=int32(length), **extra)
            same(alone, slice(length - 1, length), f"alone, length {length}")
    print(f"{compared} rows compared")


def test_steps_of_appending():
    """Token by token, in pages that are handed out as they are needed, against the reference each time."""
    steps = 200 if DEVICE.type == "cuda" else 30
    page, hkv, h, d, b = 8, 2, 4, 64, 2
    pages = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    k, v = (torch.full((64, page, hkv, d), NAN, dtype=BF16, device=DEVICE) for _ in "kv")
    table = torch.full((b, 32), -1, dtype=torch.int32, device=DEVICE)
    _, keys, values = make_qkv(b, 1, steps, h, hkv, d, dtype=BF16, seed=4, kind="integers")
    lengths = torch.zeros(b, dtype=torch.int32, device=DEVICE)
    used = 0
    for t in range(steps):
        if t % page == 0:
            for i in range(b):
                table[i, t // page] = int(pages[used])
                used += 1
        q = normal(b, 1, h, d, dtype=BF16, seed=t)
        at = slice(t, t + 1)
        out, indices, (threshold, tie_index) = topk_attn.topk_attn_with_kvcache(
            q, k, v, keys[:, at], values[:, at], cache_seqlens=lengths, block_table=table, ratio=0.1,
            min_keys=4, return_indices=True, return_encoding=True,
        )  # fmt: skip
        lengths += 1
        want = topk_attn.topk_select(q, keys[:, : t + 1], ratio=0.1, min_keys=4, return_indices=True)
        assert_same(threshold, want[0], f"step {t}: threshold")
        assert_same(tie_index, want[1], f"step {t}: tie_index")
        assert_same(indices[..., : want[2].shape[-1]], want[2], f"step {t}: indices")
        kept = reference.mask_of(want[2], t + 1)
        inputs = (q, keys[:, : t + 1], values[:, : t + 1], kept, d**-0.5)
        dense, exact = reference.dense(*inputs), reference.exact(*inputs)
        assert_twice_dense(out, dense.out, exact.out, BF16, f"step {t}")


def test_large_batches():
    """More sequences than one launch takes together."""
    b = 300
    lengths = [(7 * i) % 41 for i in range(b)]
    check = Caches(lengths, 1, 48, 2, 64, 64, BF16, 16)
    q = queries(check, 1, 4)
    got = topk_attn.topk_attn_with_kvcache(q, check.k, check.v, **check.kwargs(), topk=5, **RETURNS)
    for i in range(0, b, 37):
        want = selected(q[i : i + 1], check.keys[i], Settings(topk=5), 0, check.capacity)
        assert_encoding(got[4][0][i : i + 1], got[4][1][i : i + 1], want)
        assert_same(got[2][i : i + 1], reference.index_lists(want.kept, 5), "indices")


# ------------------------------------------------------------------------------------------------------------
# Errors and metadata that cannot be read
# ------------------------------------------------------------------------------------------------------------


def test_errors():
    c = Caches([13, 29], 1, 32, 2, 64, 64, BF16)
    q = queries(c, 1, 4)

    def call(q=q, k_cache=c.k, v_cache=c.v, **changes):
        kw = {**c.kwargs(), "topk": 5, **changes}
        return topk_attn.topk_attn_with_kvcache(q, k_cache, v_cache, **kw)

    refuses(lambda: call(topk=0), "topk", "1")
    refuses(lambda: call(q=q[0]), "q", "4")
    refuses(lambda: call(q=q.float()), "k_cache|dtype")
    refuses(lambda: call(v_cache=c.v[:, :31]), "v_cache", "31")
    refuses(lambda: call(k=None), "together")
    refuses(lambda: call(cache_seqlens=c.seqlens.long()), "cache_seqlens", "int32")
    refuses(lambda: call(cache_seqlens=c.seqlens[:1]), "cache_seqlens")
    refuses(lambda: call(v_cache=c.k), "share memory")
    refuses(lambda: call(k_cache=c.k[:, :1].expand_as(c.k)), "k_cache", "expanded")
    with pytest.raises(RuntimeError, match="(?i)differentiable"):
        call(q=q.clone().requires_grad_())


@pytest.mark.parametrize("tq", [1, 9])
def test_bad_lengths(gpu, tq):
    """Out of range lengths and paddings: zeros, -inf, and nothing is written; the others are right."""
    c = Caches([13, 29, 20, 25, 18], 1, 32, 2, 64, 64, BF16, leftpad=[0, 0, 0, 2, 0])
    q = queries(c, tq, 4)
    good = topk_attn.topk_attn_with_kvcache(q, c.k.clone(), c.v.clone(), **c.kwargs(), topk=5, **RETURNS)
    c.seqlens[1], c.seqlens[2] = 32, -7
    c.leftpad[0], c.leftpad[4] = -1, 20
    before = c.k.clone(), c.v.clone()
    out, lse, indices, slots, encoding = topk_attn.topk_attn_with_kvcache(
        q, c.k, c.v, **c.kwargs(), topk=5, **RETURNS
    )
    for i in (0, 1, 2, 4):
        assert bool((out[i] == 0).all()) and bool((lse[i] == -INF).all())
        assert bool((indices[i] == -1).all()) and bool((slots[i] == -1).all())
        assert bool(encoding[0][i].isnan().all()) and bool((encoding[1][i] == -1).all())
        assert_same(c.k[i], before[0][i], "k_cache")
        assert_same(c.v[i], before[1][i], "v_cache")
    for a, b in zip((out, lse, indices, slots), good, strict=False):
        assert_same(a[3], b[3], "the good sequence")


@pytest.mark.parametrize("bad", [-1, 10**6, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=name_of)
def test_bad_pages(gpu, bad, dtype):
    """A sequence with a bad page among those it uses counts as empty, and nothing of it is written."""
    c = Caches([13, 29, 20], 2, 40, 2, 64, 64, dtype, 4)
    q = queries(c, 2, 4)
    good = topk_attn.topk_attn_with_kvcache(q, c.k.clone(), c.v.clone(), **c.kwargs(), topk=5, **RETURNS)
    c.block_table[0, 0] = bad  # an old page
    c.block_table[1, 7] = bad  # the page of the new rows
    before = c.k.clone(), c.v.clone()
    out, lse, indices, slots, encoding = topk_attn.topk_attn_with_kvcache(
        q, c.k, c.v, **c.kwargs(), topk=5, **RETURNS
    )
    for i in (0, 1):
        assert bool((out[i] == 0).all()) and bool((lse[i] == -INF).all())
        assert bool((indices[i] == -1).all()) and bool((slots[i] == -1).all())
    for a, b in zip((out, lse, indices, slots), good, strict=False):
        assert_same(a[2], b[2], "the good sequence")
    for rows, old, new in ((c.k, before[0], c.new_k), (c.v, before[1], c.new_v)):
        want = old.clone()
        at = torch.arange(20, 22, device=DEVICE)
        want[c.block_table[2].long()[at // 4], at % 4] = new[2]
        assert_same(rows, want, "the cache")


# ------------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_host_synchronisation(gpu, page, dtype):
    c = Caches([100, 120], 1, 128, 2, 64, 64, dtype, page)
    calls = [(queries(c, tq, 4), s) for tq in (1, 9) for s in ("head", "kv_group")]
    for synchronised in (True, False):  # the first round loads the kernels
        if not synchronised:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for q, select in calls:
                kw = dict(ratio=0.1, select=select, sink=1, **RETURNS)
                topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), **kw)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("tq", [1, 6])
def test_graph_replays_while_lengths_grow(gpu, page, tq):
    """Captured once at length 0; every replay appends and decodes at the lengths that the device holds."""
    b, h, hkv, d, capacity = 3, 8, 2, 128, 640
    kw = dict(ratio=0.05, min_keys=4, **RETURNS)
    shape = (b, capacity, hkv, d) if page is None else (b * capacity // page, page, hkv, d)
    caches = [torch.full(shape, NAN, dtype=BF16, device=DEVICE) for _ in range(4)]
    extra = {}
    if page is not None:
        extra["block_table"] = torch.randperm(b * capacity // page, device=DEVICE).int().reshape(b, -1)
    q = normal(b, tq, h, d, dtype=BF16)
    k, v = (normal(b, tq, hkv, d, dtype=BF16, seed=x) for x in (1, 2))
    lengths = int32(0, 0, 0)

    def step(caches):
        return topk_attn.topk_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **extra, **kw)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(caches[:2])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(caches[:2])
    for turn in range(12):
        for x, seed in ((q, 1), (k, 2), (v, 3)):
            x.copy_(normal(*x.shape, dtype=BF16, seed=10 * turn + seed))
        graph.replay()
        want = step(caches[2:])
        torch.cuda.synchronize()
        for got, expected in zip(captured[:4], want[:4], strict=True):
            assert_same(got, expected, f"turn {turn}")
        lengths += torch.tensor([tq, 4 * tq, 7 * tq], dtype=torch.int32, device=DEVICE)
        for x, y in zip(caches[:2], caches[2:], strict=True):  # rows between the appended ones
            x.nan_to_num_(0.5)
            y.nan_to_num_(0.5)


def test_repeats_and_streams(gpu):
    """The same bits from run to run, also with other work beside it."""
    c = Caches([3000, 4096, 77], 0, 4096, 2, 128, 128, BF16, 16)
    q = queries(c, 1, 8)

    def call():
        return topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=900, **RETURNS)

    want = call()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    for got in results:
        for a, b in zip(got[:4], want[:4], strict=True):
            assert_same(a, b, "repeat")


def test_selection_settings_reach_the_kernels():
    c = Caches([100], 0, 128, 2, 64, 64, BF16)
    q = queries(c, 1, 4)
    for s in EVERY_BUDGET:
        got = topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), **s.kwargs(), return_encoding=True)
        want = topk_attn.topk_select(q, c.keys[0][None], **selection_kwargs(s))
        for a, b in zip(got[1], want, strict=True):
            assert_same(a, b, str(s))
