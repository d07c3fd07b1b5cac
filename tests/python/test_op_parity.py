"""One contract on every path: training, prefill, decode, any batch, any number of threads."""

import oracle
import pytest
import torch
from op_helpers import (
    DTYPES,
    FLAT_SCALE,
    FORWARD_TOLERANCE,
    assert_close,
    assert_same,
    first_difference,
    kernel_scores,
    make_qkv,
    normal,
    used_sets,
)
from oracle import Settings

import topk_attn

KINDS = ["normal", "permuted", "mixed", "two_values", "integers"]
SETTINGS = [
    Settings(topk=7),
    Settings(ratio=0.2, min_keys=3),
    Settings(topk=7, select="kv_group"),
    Settings(ratio=0.3, sink=2, recent=3),
]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def in_pages(x, page):
    """x (B,S,Hkv,.) as pages in reversed order, with its block table."""
    b, s = x.shape[:2]
    per_row = -(-s // page)
    padded = torch.zeros(b, per_row * page, *x.shape[2:], dtype=x.dtype)
    padded[:, :s] = x
    pages = padded.reshape(b * per_row, page, *x.shape[2:])
    table = torch.arange(b * per_row - 1, -1, -1, dtype=torch.int32).reshape(b, per_row)
    return pages.flip(0).contiguous(), table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: str(s.kwargs()))
def test_training_prefill_and_decode_use_the_same_sets(dtype, kind, s):
    """The sets that the outputs were really made of, key for key, over every cache layout."""
    n, h, hkv, d = 61, 4, 2, 64
    q, k, _ = make_qkv(1, n, n, h, hkv, d, dtype=dtype, seed=17, kind=kind)
    kw = s.but(softmax_scale=FLAT_SCALE).kwargs()
    if kind == "mixed":
        kw["softmax_scale"] = 1e-7

    train = used_sets(lambda v: topk_attn.topk_attn_func(q, k, v, **kw), 1, n, hkv, dtype)
    width = oracle.budget(n, s)
    encoded = topk_attn.topk_select(
        q, k, **{x: y for x, y in kw.items() if x != "softmax_scale"}, return_indices=True
    )
    assert torch.equal(train, oracle.mask_of(encoded[2], n)), "topk_select"

    def prefill(v, chunk):
        caches = torch.zeros_like(k), torch.zeros(1, n, hkv, v.shape[-1], dtype=dtype)
        outs = []
        for t in range(0, n, chunk):
            at = slice(t, min(n, t + chunk))
            outs.append(
                topk_attn.topk_attn_with_kvcache(
                    q[:, at], *caches, k[:, at], v[:, at], cache_seqlens=int32(t), **kw
                )
            )
        return torch.cat(outs, dim=1)

    for chunk in (n, 16, 1):
        got = used_sets(lambda v, chunk=chunk: prefill(v, chunk), 1, n, hkv, dtype)
        assert torch.equal(got, train), f"chunk {chunk}: {first_difference(got, train)}"

    for page in (1, 3, 16):
        pages, table = in_pages(k, page)

        def decode(v, page=page, pages=pages, table=table):
            values, _ = in_pages(v, page)
            outs = [
                topk_attn.topk_attn_with_kvcache(
                    q[:, t : t + 1], pages, values, cache_seqlens=int32(t + 1), block_table=table, **kw
                )
                for t in range(n)
            ]
            return torch.cat(outs, dim=1)

        got = used_sets(decode, 1, n, hkv, dtype)
        assert torch.equal(got, train), f"page {page}: {first_difference(got, train)}"
    assert int(train.sum(-1).max()) == width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_encodings_agree_bit_for_bit(dtype, kind):
    n = 50
    q, k, v = make_qkv(2, n, n, 4, 2, 64, dtype=dtype, seed=2, kind=kind)
    threshold, tie_index = topk_attn.topk_select(q, k, topk=6)
    fwd = torch.ops.topk_attn.fwd(q, k, v, topk=6)
    assert_same(fwd[2], threshold, "fwd threshold")
    assert_same(fwd[3], tie_index, "fwd tie_index")
    for t in range(n):
        _, got = topk_attn.topk_attn_with_kvcache(
            q[:, t : t + 1], k, v, cache_seqlens=int32(t + 1, t + 1), topk=6, return_encoding=True
        )
        assert_same(got[0][..., 0], threshold[..., t].contiguous(), f"decode threshold {t}")
        assert_same(got[1][..., 0], tie_index[..., t].contiguous(), f"decode tie_index {t}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 24, 64, 72, 128, 200, 256])
def test_scores_are_one_chain_of_fused_multiply_adds(dtype, d):
    """Bit for bit, on data where any other order of additions shows."""
    for kind in ("mixed", "permuted", "normal"):
        q, k, _ = make_qkv(1, 5, 37, 2, 1, d, dtype=dtype, seed=d, kind=kind)
        want = oracle.chain_scores(q[0].double().numpy(), k[0].double().numpy(), dtype)
        got = kernel_scores(q, k)[0].double()
        assert torch.equal(got, torch.from_numpy(want)), (
            f"{kind}: {first_difference(got, torch.from_numpy(want))}"
        )


def test_permuted_keys_really_are_hard():
    """The adversarial inputs do what they are for: scores that differ, but in the last bits only."""
    q, k, _ = make_qkv(1, 1, 200, 1, 1, 64, seed=1, kind="permuted")
    scores = kernel_scores(q, k).flatten()
    assert len(scores.unique()) > 5 and float(scores.max() - scores.min()) < 1e-4
    reversed_sum = (q.flip(-1) * k.flip(-1)).sum(-1).flatten()
    assert not torch.equal(scores, reversed_sum)


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_rows_in_a_call_changes_no_bit(dtype):
    """Every query row alone, in any company and at any batch position: the same encoding and output."""
    q, k, v = make_qkv(1, 37, 90, 4, 2, 40, dtype=dtype, seed=3, kind="mixed")
    kw = dict(topk=9, causal=False, softmax_scale=1e-4)
    out, lse = topk_attn.topk_attn_func(q, k, v, **kw, return_lse=True)
    select = dict(topk=9, causal=False)
    threshold, tie_index = topk_attn.topk_select(q, k, **select)
    for size in (1, 2, 3, 5, 8, 16, 31):
        for first in range(0, 37, size):
            at = slice(first, min(37, first + size))
            t, i = topk_attn.topk_select(q[:, at], k, **select)
            assert_same(t, threshold[:, :, at].contiguous(), f"threshold {at}")
            assert_same(i, tie_index[:, :, at].contiguous(), f"tie_index {at}")
            o, e = topk_attn.topk_attn_func(q[:, at], k, v, **kw, return_lse=True)
            assert_close(o, out[:, at].double(), FORWARD_TOLERANCE[dtype], f"out {at}")
            assert_close(e, lse[:, :, at].double(), FORWARD_TOLERANCE[torch.float32], f"lse {at}")
    batch = [torch.cat([normal(*x.shape, dtype=dtype, seed=9), x]) for x in (q, k, v)]
    t, i = topk_attn.topk_select(batch[0], batch[1], **select)
    assert_same(t[1:], threshold, "threshold in a batch")
    assert_same(i[1:], tie_index, "tie_index in a batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_length_of_the_row_changes_no_score(dtype):
    """A token's set does not depend on how many keys lie behind the ones it sees."""
    q, k, _ = make_qkv(1, 1, 300, 2, 1, 64, dtype=dtype, seed=3, kind="mixed")
    whole = kernel_scores(q, k)
    for n in (1, 2, 7, 16, 17, 63, 64, 65, 128, 200, 299):
        threshold, tie_index = topk_attn.topk_select(q, k[:, :n], topk=n)
        assert_same(threshold[0, :, 0], whole[0, :, 0, :n].amin(-1), f"n {n}")


def everything(seed, dtype):
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 70, 70, 6, 2, 24, dtype=dtype, seed=seed))
    results = []
    for extra in ({}, {"select": "kv_group", "sink": 1, "recent": 2}):
        out, lse = topk_attn.topk_attn_func(q, k, v, ratio=0.15, return_lse=True, **extra)
        dout = normal(*out.shape, dtype=dtype, seed=seed)
        results += [out, lse, *torch.autograd.grad([out, lse], (q, k, v), [dout, torch.ones_like(lse)])]
        results += topk_attn.topk_select(q, k, ratio=0.15, return_indices=True, **extra)
    cu = int32(0, 30, 31, 70)
    packed = [x[0] for x in (q, k, v)]
    out = topk_attn.topk_attn_varlen_func(*packed, cu, cu, 39, 39, topk=6)
    results += [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]
    with torch.no_grad():
        results += topk_attn.topk_attn_with_kvcache(
            q[:, :2], k, v, cache_seqlens=int32(40, 70), topk=9, return_lse=True, return_indices=True
        )
        results += topk_attn.topk_attn_with_kvcache(
            q[:1, :1], k[:1], v[:1], cache_seqlens=int32(70), topk=9, return_lse=True
        )
        results += topk_attn.topk_select_scores(normal(50, 90, seed=seed), 9)
    return [x.detach() for x in results]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything(4, dtype)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for i, (a, b) in enumerate(zip(everything(4, dtype), want, strict=True)):
                assert_same(a, b, f"result {i} with {threads} threads")
    finally:
        torch.set_num_threads(before)


def test_repeats_change_no_bit():
    want = everything(5, torch.float32)
    for _ in range(3):
        for i, (a, b) in enumerate(zip(everything(5, torch.float32), want, strict=True)):
            assert_same(a, b, f"result {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_decode_with_threads(dtype):
    """A single long row may be split over threads; its set and output bits may not depend on that."""
    q, k, v = make_qkv(1, 1, 5000, 4, 1, 64, dtype=dtype, seed=1, kind="permuted")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                topk_attn.topk_attn_with_kvcache(
                    q, k, v, cache_seqlens=int32(5000), topk=50, return_lse=True, return_indices=True
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same(a, b, "threads")
    want = oracle.attention(q, k, v, Settings(topk=50))
    assert_same(results[0][2], oracle.index_lists(want.kept, 50), "indices")


def test_deterministic_flag_changes_nothing():
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 40, 40, 4, 2, 16))
    results = []
    for flag in (False, True):
        out = topk_attn.topk_attn_func(q, k, v, topk=6, deterministic=flag)
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        assert_same(a.detach(), b.detach(), "deterministic")
