"""topk_attn_with_kvcache against the oracle: contiguous and paged, appending, padding, chunks."""

import math

import oracle
import pytest
import torch
from op_helpers import (
    DTYPES,
    FORWARD_TOLERANCE,
    accumulate_dtype,
    assert_close,
    assert_encoding,
    assert_same,
    make_qkv,
    normal,
)
from oracle import Settings

import topk_attn

NAN = math.nan


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Caches:
    """A contiguous cache or the same rows in scattered pages; everything outside the valid rows is NaN."""

    def __init__(
        self, lengths, new, capacity, hkv, d, dv, dtype, page=None, leftpad=None, seed=0, kind="normal"
    ):
        b = len(lengths)
        _, keys, values = make_qkv(b, 1, capacity, hkv, hkv, d, dv, dtype=dtype, seed=seed, kind=kind)
        self.seqlens = int32(*lengths)
        self.new_k = keys[:, :new].clone() if new else None
        self.new_v = values[:, :new].clone() if new else None
        if new:
            for i, n in enumerate(lengths):
                self.new_k[i], self.new_v[i] = keys[i, n : n + new], values[i, n : n + new]
        for i, n in enumerate(lengths):
            keys[i, n:], values[i, n:] = NAN, NAN
            if leftpad is not None:
                keys[i, : leftpad[i]], values[i, : leftpad[i]] = NAN, NAN
        self.leftpad = None if leftpad is None else int32(*leftpad)
        self.capacity, self.page, self.block_table = capacity, page, None
        self.k, self.v = keys, values
        if page is not None:
            self.scatter(b, page, seed)

    def scatter(self, b, page, seed):
        per_row = -(-self.capacity // page)
        total = b * per_row + 3
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: b * per_row]
        self.block_table = order.to(torch.int32).reshape(b, per_row)
        pages = []
        for rows in (self.k, self.v):
            filled = torch.full((total, page, *rows.shape[2:]), NAN, dtype=rows.dtype)
            padded = torch.full((b, per_row * page, *rows.shape[2:]), NAN, dtype=rows.dtype)
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
            out[b] = torch.where(t >= 0, slot, torch.tensor(-1)).to(torch.int32)
        return out

    def place(self, b, t):
        """Where logical row t of sequence b lies in the cache tensors."""
        if self.block_table is None:
            return b, t
        return int(self.block_table[b, t // self.page]), t % self.page


def check_cache(c: Caches, s: Settings, tq=1, h=4, seed=5):
    dtype, hkv, d = c.k.dtype, c.k.shape[2], c.k.shape[3]
    b = len(c.seqlens)
    q = normal(b, tq, h, d, dtype=dtype, seed=seed)
    want = oracle.kvcache(
        q, c.k, c.v, c.seqlens, s, k=c.new_k, v=c.new_v, leftpad=c.leftpad, block_table=c.block_table
    )
    after_k, after_v = c.k.clone(), c.v.clone()
    if c.new_k is not None:
        for i, n in enumerate(c.seqlens.tolist()):
            for t in range(c.new_k.shape[1]):
                after_k[c.place(i, n + t)] = c.new_k[i, t]
                after_v[c.place(i, n + t)] = c.new_v[i, t]
    before = c.seqlens.clone()
    out, lse, indices, slots, encoding = topk_attn.topk_attn_with_kvcache(
        q,
        c.k,
        c.v,
        **c.kwargs(),
        **s.kwargs(),
        return_lse=True,
        return_indices=True,
        return_slots=True,
        return_encoding=True,
    )
    assert_same(c.seqlens, before, "cache_seqlens")
    assert_same(c.k, after_k, "k_cache")
    assert_same(c.v, after_v, "v_cache")
    assert out.dtype == dtype and lse.dtype == accumulate_dtype(dtype)
    assert_encoding(*encoding, want, dtype)
    width = oracle.budget(c.capacity, s)
    lists = torch.stack([oracle.index_lists(kept, width) for kept in want.kept])
    assert_same(indices, lists, "indices")
    assert_same(slots, c.slots(lists), "slots")
    assert_close(out, want.out, FORWARD_TOLERANCE[dtype], "out")
    assert_close(lse, want.lse, FORWARD_TOLERANCE[accumulate_dtype(dtype)], "lse")
    assert hkv in (1, h) or h % hkv == 0
    return want


PAGES = [None, 1, 3, 16, 64]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [0, 1])
def test_decode(page, dtype, new):
    c = Caches([13, 29, 1, 40], new, 48, 2, 16, 24, dtype, page)
    check_cache(c, Settings(topk=6))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("new,tq", [(5, 5), (3, 1), (1, 4), (0, 7), (17, 17)])
@pytest.mark.parametrize("causal", [True, False])
def test_chunks(page, new, tq, causal):
    c = Caches([0, 11, 3], new, 30, 2, 8, 8, torch.float32, page, seed=new)
    check_cache(c, Settings(ratio=0.3, min_keys=2, causal=causal), tq=tq)


@pytest.mark.parametrize("page", [None, 3])
def test_empty_cache(page):
    check_cache(Caches([0, 0], 0, 12, 2, 8, 8, torch.float32, page), Settings(topk=3))
    check_cache(Caches([0, 0], 1, 12, 2, 8, 8, torch.float32, page), Settings(topk=3))
    check_cache(Caches([0, 5], 0, 12, 2, 8, 8, torch.float32, page), Settings(topk=3), tq=3)


@pytest.mark.parametrize("page", [None, 1, 16])
def test_cache_filled_to_the_last_row(page):
    check_cache(Caches([32, 31], 0, 32, 2, 8, 8, torch.float32, page), Settings(topk=5))
    check_cache(Caches([31, 30], 1, 32, 2, 8, 8, torch.float32, page), Settings(ratio=0.2))
    check_cache(Caches([0, 2], 30, 32, 2, 8, 8, torch.float32, page), Settings(ratio=0.2), tq=30)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("new,tq", [(0, 1), (1, 1), (4, 4)])
def test_left_padding(page, new, tq):
    c = Caches([20, 9, 7, 30], new, 36, 2, 8, 8, torch.float32, page, leftpad=[3, 0, 7, 29])
    check_cache(c, Settings(topk=4), tq=tq)
    c = Caches([20, 9, 7, 30], new, 36, 2, 8, 8, torch.float32, page, leftpad=[3, 0, 7, 29])
    check_cache(c, Settings(ratio=0.4, sink=2, recent=2), tq=tq)


def test_left_padding_in_a_prefill():
    """Rows of the padding itself see nothing; the prompt's rows see the prompt only."""
    c = Caches([0, 0], 10, 16, 2, 8, 8, torch.float32)
    c.leftpad = int32(4, 0)
    want = check_cache(c, Settings(topk=3), tq=10)
    assert bool((want.lse[0, :, :4] == -math.inf).all())


@pytest.mark.parametrize("h,hkv", [(1, 1), (2, 2), (8, 1), (6, 2)])
@pytest.mark.parametrize("select", ["head", "kv_group"])
@pytest.mark.parametrize("page", [None, 3])
def test_heads(h, hkv, select, page):
    c = Caches([13, 29], 1, 32, hkv, 16, 16, torch.float32, page)
    check_cache(c, Settings(topk=6, select=select), h=h)


@pytest.mark.parametrize("d,dv", [(8, 8), (40, 104), (72, 24), (128, 128), (200, 8), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dims(d, dv, dtype):
    check_cache(Caches([13, 29], 1, 32, 2, d, dv, dtype, 16), Settings(topk=6), h=2)


@pytest.mark.parametrize("kind", ["permuted", "two_values", "equal", "duplicated", "mixed"])
@pytest.mark.parametrize("page", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_orders(kind, page, dtype):
    c = Caches([40, 100], 1, 110, 2, 64, 16, dtype, page, kind=kind)
    check_cache(c, Settings(topk=9, softmax_scale=1e-3 if kind == "mixed" else None), tq=2)


@pytest.mark.parametrize(
    "s",
    [
        Settings(topk=1),
        Settings(topk=10**6),
        Settings(ratio=1.0),
        Settings(ratio=0.01),
        Settings(ratio=0.01, min_keys=8, max_keys=9),
        Settings(topk=5, sink=2, recent=2),
        Settings(topk=5, sink=9),
        Settings(topk=5, recent=9),
        Settings(topk=50, sink=20, recent=20),
        Settings(topk=5, sink=3, recent=1, select="kv_group", softmax_scale=0.3),
    ],
    ids=lambda s: str(s.kwargs()),
)
@pytest.mark.parametrize("page", [None, 3])
def test_settings(s, page):
    check_cache(Caches([3, 29, 17], 1, 32, 2, 8, 8, torch.float32, page), s)


def test_long_cache():
    """Longer than any block of keys, more keys kept than fit in a register file."""
    for n, w in ((1500, 15), (1500, 700), (4001, 1)):
        check_cache(Caches([n, n - 7], 1, n + 1, 1, 16, 8, torch.float32, 16), Settings(topk=w), h=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stale_rows_never_matter(dtype):
    """The same call over NaN, infinite and zero stale rows gives the same bits."""
    results = []
    for stale in (NAN, math.inf, 0.0, 1e4):
        c = Caches([13, 29], 1, 40, 2, 16, 16, dtype, 3, leftpad=[2, 5])
        c.k[c.k.isnan()], c.v[c.v.isnan()] = stale, stale
        q = normal(2, 2, 4, 16, dtype=dtype)
        results.append(topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=5, return_lse=True))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same(a, b, "stale rows")


@pytest.mark.parametrize("page", [1, 3, 16])
def test_pages_give_the_bits_of_the_contiguous_cache(page):
    q = normal(3, 4, 4, 16)
    outs = []
    for p in (None, page):
        c = Caches([13, 29, 4], 4, 40, 2, 16, 16, torch.float32, p)
        outs.append(topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=5, return_lse=True))
    for a, b in zip(*outs, strict=True):
        assert_same(a, b, f"page size {page}")


def test_shared_and_repeated_pages():
    """Two sequences share a prefix, and one lists the same page twice."""
    page, s = 4, Settings(topk=6)
    k, v = normal(9, page, 2, 8, seed=1), normal(9, page, 2, 8, seed=2)
    table = torch.tensor([[3, 3, 7], [3, 3, 1], [3, 8, 3]], dtype=torch.int32)
    seqlens = int32(11, 9, 12)
    q = normal(3, 1, 4, 8, seed=3)
    want = oracle.kvcache(q, k, v, seqlens, s, block_table=table)
    out, indices, slots = topk_attn.topk_attn_with_kvcache(
        q, k, v, cache_seqlens=seqlens, block_table=table, topk=6, return_indices=True, return_slots=True
    )
    assert_close(out, want.out, FORWARD_TOLERANCE[torch.float32], "out")
    lists = torch.stack([oracle.index_lists(kept, 6) for kept in want.kept])
    assert_same(indices, lists, "indices")
    t = lists.long()
    want_slots = torch.stack([table[b].long()[t[b] // page] * page + t[b] % page for b in range(3)]).to(
        torch.int32
    )
    assert_same(slots, want_slots, "slots")


@pytest.mark.parametrize("filler", [-1, 10**6, -(2**31), 2**31 - 1])
def test_unused_table_entries_are_ignored(filler):
    c = Caches([5, 17, 0], 1, 24, 2, 8, 8, torch.float32, 4)
    for b, n in enumerate(c.seqlens.tolist()):
        c.block_table[b, -(-(n + 1) // 4) :] = filler
    check_cache(c, Settings(topk=3))


@pytest.mark.parametrize("page", [None, 3])
def test_strided_caches(page):
    """Caches as slices of larger tensors, (B,Hkv,S,D) storage, and K and V side by side in one tensor."""
    base = Caches([13, 29], 2, 33, 2, 8, 8, torch.float32, page)
    q = normal(2, 2, 4, 8)
    forms = []
    for make in (
        lambda x: x.clone(),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, torch.full_like(x, NAN)], dim=-1)[..., :8],
        lambda x: torch.cat([x, torch.full_like(x, NAN)], dim=0)[: x.shape[0]],
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
    c = Caches([13, 29], 3, 40, 2, 8, 8, torch.float32, 3)
    q = normal(2, 3, 4, 8)
    want = topk_attn.topk_attn_with_kvcache(q, c.k.clone(), c.v.clone(), **c.kwargs(), topk=5)
    extra = c.kwargs()
    extra.update({n: extra[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("k", "v")})
    got = topk_attn.topk_attn_with_kvcache(
        q.transpose(1, 2).contiguous().transpose(1, 2), c.k, c.v, **extra, topk=5
    )
    assert_same(got, want, "strided new rows")


def test_return_forms():
    c = Caches([13, 29], 0, 32, 2, 8, 8, torch.float32)
    q = normal(2, 1, 4, 8)

    def call(**returns):
        return topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=5, **returns)

    out = call()
    assert isinstance(out, torch.Tensor) and tuple(out.shape) == (2, 1, 4, 8)
    for name, shape in (
        ("return_lse", (2, 4, 1)),
        ("return_indices", (2, 4, 1, 5)),
        ("return_slots", (2, 4, 1, 5)),
    ):
        pair = call(**{name: True})
        assert isinstance(pair, tuple) and len(pair) == 2 and tuple(pair[1].shape) == shape, name
        assert_same(pair[0], out, name)
    out2, (threshold, tie_index) = call(return_encoding=True)
    assert_same(out2, out, "return_encoding")
    assert tuple(threshold.shape) == tuple(tie_index.shape) == (2, 4, 1)


def test_token_by_token_writes_what_a_prefill_writes():
    n, s = 23, dict(topk=5)
    q, k, v = make_qkv(2, n, n, 4, 2, 16)
    caches = [torch.full((2, 30, 2, 16), NAN) for _ in range(4)]
    topk_attn.topk_attn_with_kvcache(q, caches[0], caches[1], k, v, cache_seqlens=int32(0, 0), **s)
    for t in range(n):
        at = slice(t, t + 1)
        topk_attn.topk_attn_with_kvcache(
            q[:, at], caches[2], caches[3], k[:, at], v[:, at], cache_seqlens=int32(t, t), **s
        )
    assert_same(caches[2], caches[0], "k_cache")
    assert_same(caches[3], caches[1], "v_cache")


def test_gradients_are_refused():
    c = Caches([13, 29], 1, 32, 2, 8, 8, torch.float32)
    q = normal(2, 1, 4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="(?i)gradient|differentiable"):
        topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=5)
    with torch.no_grad():
        out = topk_attn.topk_attn_with_kvcache(q, c.k, c.v, **c.kwargs(), topk=5)
    assert not out.requires_grad
    extra = c.kwargs()
    extra["v"] = extra["v"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="(?i)gradient|differentiable"):
        topk_attn.topk_attn_with_kvcache(q.detach(), c.k, c.v, **extra, topk=5)


def test_version_counters_see_the_write():
    """The caches are declared mutable: autograd and functionalisation must know that they changed."""
    c = Caches([3, 4], 1, 8, 1, 8, 8, torch.float32)
    before = c.k._version, c.v._version
    topk_attn.topk_attn_with_kvcache(normal(2, 1, 1, 8), c.k, c.v, **c.kwargs(), topk=2)
    assert c.k._version > before[0] and c.v._version > before[1]
