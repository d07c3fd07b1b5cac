"""NaN, infinities, signed zeros and subnormal numbers: in the order, in the outputs, and whom they reach."""

import math

import cuda_reference as reference
import pytest
import torch
from cuda_helpers import (
    BF16,
    DEVICE,
    DTYPES,
    F32,
    assert_encoding,
    bounds,
    check_selection,
    every_way,
    make_qkv,
    own_scores,
    served,
    ways,
)
from oracle import Settings

import topk_attn

INF, NAN = math.inf, math.nan


def unit_scores(rows, dtype, d=64):
    """q, k, v with score(i, j) = rows[i][j]: q_i picks channel i. At most d query rows."""
    scores = torch.tensor(rows, dtype=dtype, device=DEVICE)
    tq, tk = scores.shape
    q = torch.zeros(1, tq, 1, d, dtype=dtype, device=DEVICE)
    k = torch.zeros(1, tk, 1, d, dtype=dtype, device=DEVICE)
    for i in range(tq):
        q[0, i, 0, i] = 1
        k[0, :, 0, i] = scores[i]
    v = make_qkv(1, 1, tk, 1, 1, d, dtype=dtype)[2]
    return q, k, v


def kept_of(q, k, **kw):
    indices = topk_attn.topk_select(q, k, return_indices=True, **kw)[2]
    return [[int(j) for j in row if j >= 0] for row in indices[0, 0].tolist()]


@every_way(dims=(64,))
def test_zeros_of_both_signs_are_equal(dtype, d, way):
    q, k, _ = unit_scores([[-0.0, 0.0, -0.0, 0.0, -1.0, 1.0]], dtype)
    k[0, :, 0, 1:] = 0
    with way.used():
        for w, kept in ((1, [5]), (2, [0, 5]), (3, [0, 1, 5]), (4, [0, 1, 2, 5]), (6, [0, 1, 2, 3, 4, 5])):
            assert kept_of(q, k, topk=w, causal=False) == [kept]
        threshold, tie_index = topk_attn.topk_select(q, k, topk=2, causal=False)
        assert threshold.item() == 0 and not threshold.signbit().item() and tie_index.item() == 0
        # Sums of negative zeros.
        q = torch.full((1, 70, 1, d), -0.0, dtype=dtype, device=DEVICE)
        k = torch.ones(1, 70, 1, d, dtype=dtype, device=DEVICE)
        threshold, tie_index = topk_attn.topk_select(q, k, topk=4)
        assert not bool(threshold.signbit().any()) and bool((tie_index[0, 0, 3:] == 3).all())


@every_way(dims=(64,))
def test_nan_keys_come_first(dtype, d, way):
    q, k, v = unit_scores([[1.0, NAN, 3.0, NAN, INF, -INF, 0.0]], dtype)
    with way.used():
        assert kept_of(q, k, topk=1, causal=False) == [[1]]
        assert kept_of(q, k, topk=2, causal=False) == [[1, 3]]
        assert kept_of(q, k, topk=3, causal=False)[0][:2] == [1, 3]
        threshold, tie_index = topk_attn.topk_select(q, k, topk=2, causal=False)
        assert threshold.view(torch.int32).item() == 0x7FC00000 and tie_index.item() == 3
        out, lse = topk_attn.topk_attn_func(q, k, v, topk=2, causal=False, return_lse=True)
        assert bool(out.isnan().all()) and bool(lse.isnan().all())


@every_way(dims=(64,))
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_nan_query_keeps_its_first_keys(dtype, d, way, select):
    q, k, v = make_qkv(1, 100, 100, 2, 1, d, dtype=dtype, seed=2)
    clean_q = q.clone()
    q[0, 50, 1, 3] = NAN
    with way.used(), served(select):
        indices = topk_attn.topk_select(q, k, topk=3, select=select, return_indices=True)[2]
        clean = topk_attn.topk_select(clean_q, k, topk=3, select=select, return_indices=True)[2]
        out, lse = topk_attn.topk_attn_func(q, k, v, topk=3, select=select, return_lse=True)
    assert indices[0, 1, 50].tolist() == [0, 1, 2]
    if select == "kv_group":
        assert indices[0, 0, 50].tolist() == [0, 1, 2]
    others = torch.arange(100, device=DEVICE) != 50
    assert torch.equal(indices[:, :, others], clean[:, :, others])
    bad = torch.zeros_like(lse, dtype=torch.bool)
    bad[0, 1, 50] = True
    assert torch.equal(lse.isnan(), bad)
    rows = bad.transpose(1, 2)
    assert torch.equal(out.isnan().all(-1), rows) and torch.equal(out.isnan().any(-1), rows)


@every_way(dims=(64,))
def test_kept_infinity_gives_nan(dtype, d, way):
    q = torch.ones(1, 70, 1, d, dtype=dtype, device=DEVICE)
    k = make_qkv(1, 70, 70, 1, 1, d, dtype=dtype)[1].clone()
    v = torch.ones_like(k)
    k[0, 20] = INF
    with way.used():
        threshold, tie_index = topk_attn.topk_select(q, k, topk=1)
        out, lse = topk_attn.topk_attn_func(q, k, v, topk=4, return_lse=True)
    assert bool((threshold[0, 0, 20:] == INF).all()) and bool((tie_index[0, 0, 20:] == 20).all())
    assert bool(out[0, 20:].isnan().all()) and bool(out[0, :20].isfinite().all())
    assert not bool(lse[0, 0, 20:].isfinite().any()) and not bool((lse[0, 0, 20:] == -INF).any())


@every_way(dims=(64,))
@pytest.mark.parametrize("by_overflow", [True, False])
def test_rows_of_minus_infinity(dtype, d, way, by_overflow):
    """Kept scores that are all -inf: zeros, lse = -inf, zero gradients."""
    if by_overflow and dtype == torch.float16:
        pytest.skip("products of float16 do not overflow float32")
    value = (-1e30, 1e30) if by_overflow else (-INF, 1.0)
    q = torch.full((1, 70, 2, d), value[1], dtype=dtype, device=DEVICE).requires_grad_()
    k = torch.full((1, 90, 1, d), value[0], dtype=dtype, device=DEVICE).requires_grad_()
    v = torch.ones(1, 90, 1, d, dtype=dtype, device=DEVICE).requires_grad_()
    with way.used():
        threshold, tie_index = topk_attn.topk_select(q, k, topk=2, causal=False)
        out, lse = topk_attn.topk_attn_func(q, k, v, topk=2, causal=False, return_lse=True)
        grads = torch.autograd.grad([out, lse], (q, k, v), [torch.ones_like(out), torch.ones_like(lse)])
    assert bool((threshold == -INF).all()) and bool((tie_index == 1).all())
    assert bool((out == 0).all()) and bool((lse == -INF).all())
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert bool((grad == 0).all()), name
    # One finite key among them takes all the weight.
    k, v = k.detach().clone(), v.detach().clone()
    k[0, 40] = -1e-30 if by_overflow else 0.5
    v[0, 40] = 3
    with way.used():
        out, lse = topk_attn.topk_attn_func(q.detach(), k, v, topk=2, causal=False, return_lse=True)
    assert bool((out == 3).all()) and bool(lse.isfinite().all())


@every_way(dims=(64,))
@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_see_nothing(dtype, d, way, causal):
    """With more queries than keys the first rows see nothing; without keys no row does."""
    for tq, tk in ((40, 0), (170, 40)) if causal else ((40, 0), (40, 30)):
        q, k, v = (x.requires_grad_() for x in make_qkv(2, tq, tk, 4, 2, d, dtype=dtype))
        with way.used(check=tk > 0):
            threshold, tie_index = topk_attn.topk_select(q, k, topk=2, causal=causal)
            out, lse = topk_attn.topk_attn_func(q, k, v, topk=2, causal=causal, return_lse=True)
            grads = torch.autograd.grad([out, lse], (q, k, v), [torch.ones_like(out), torch.ones_like(lse)])
        blind = tq - tk if causal or tk == 0 else 0
        assert bool((out[:, :blind] == 0).all()) and bool((lse[..., :blind] == -INF).all())
        assert bool(lse[..., blind:].isfinite().all())
        assert bool(threshold[..., :blind].isnan().all()) and bool((tie_index[..., :blind] == -1).all())
        assert bool((grads[0][:, :blind] == 0).all())
        assert all(bool(x.isfinite().all()) for x in grads)


@every_way(dims=(64,))
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_values_reach_every_row_that_keeps_the_key(dtype, d, way, bad):
    """They may also reach rows of the same tile, but no other KV head, sequence or document, and no lse."""
    q, k, v = make_qkv(2, 200, 200, 4, 2, d, dtype=dtype, seed=4)
    with way.used():
        s = dict(topk=4)
        indices = topk_attn.topk_select(q, k, return_indices=True, **s)[2]
        clean, clean_lse = topk_attn.topk_attn_func(q, k, v, return_lse=True, **s)
        v = v.clone()
        v[0, 3, 1] = bad
        out, lse = topk_attn.topk_attn_func(q, k, v, return_lse=True, **s)
    keeps = torch.zeros(2, 200, 4, dtype=torch.bool, device=DEVICE)
    keeps[0, :, 2:] = (indices[0, 2:] == 3).any(-1).T
    assert keeps.any() and not out[keeps].isfinite().any()
    assert torch.equal(out[1], clean[1]) and torch.equal(out[0, :, :2], clean[0, :, :2])
    assert torch.equal(lse, clean_lse)


@every_way(dims=(64,))
def test_nothing_crosses_documents(dtype, d, way):
    """NaN in one document leaves the bits of the others alone, forward and backward."""
    lengths = [100, 140, 60]
    cu = bounds(lengths)
    q, k, v = (x[0] for x in make_qkv(1, 300, 300, 4, 2, d, dtype=dtype))

    def run(q, k, v):
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        out = topk_attn.topk_attn_varlen_func(q, k, v, cu, cu, 140, 140, topk=3, deterministic=True)
        return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]

    with way.used():
        clean = run(q, k, v)
        for which in range(3):
            bad = [q.clone(), k.clone(), v.clone()]
            bad[which][100:240] = NAN
            for got, want in zip(run(*bad), clean, strict=True):
                assert torch.equal(got[:100], want[:100]) and torch.equal(got[240:], want[240:])


@every_way(dims=(64,))
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_random_special_values(dtype, d, way, select):
    """Scores with infinities and NaNs among many ties, against the reference fed with the kernels' scores."""
    g = torch.Generator().manual_seed(12)
    table = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, INF, -INF, NAN], dtype=dtype)
    weights = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, 0.02, 0.02, 0.01])
    for trial in range(20):
        q, k, _ = make_qkv(1, 40, 75, 2, 1, d, dtype=dtype)
        q, k = (
            table[torch.multinomial(weights, x.numel(), True, generator=g)].view(x.shape).to(DEVICE)
            for x in (q, k)
        )
        s = Settings(
            topk=1 + 5 * (trial % 6), select=select, causal=trial % 2 == 0, sink=trial % 3, recent=trial % 4
        )
        with way.used():
            want = check_selection(q, k, s)
        assert bool(want.threshold.isnan().any()) or s.topk > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_and_large_scores_have_an_order(dtype):
    for way in ways(dtype, 64):
        with way.used():
            if dtype != torch.float16:
                q, k, _ = unit_scores([[1e-40, 3e-40, -1e-40, 2e-40, 0.0]], dtype)
                assert kept_of(q, k, topk=3, causal=False) == [[0, 1, 3]]
                assert kept_of(q, k, topk=4, causal=False) == [[0, 1, 3, 4]]
            # Sums beyond float16's range still have an order: scores are float32.
            q, k, _ = make_qkv(1, 70, 90, 1, 1, 64, dtype=dtype, seed=3)
            check_selection(q * 64, k * 64, Settings(topk=4))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_nan_payload_and_sign_do_not_matter(dtype):
    if dtype == F32:
        bits = torch.tensor([0x7FC00000, -0x400000, 0x7FFFFFFF, 0x7F800001, 0x3F800000], dtype=torch.int32)
    else:
        bits = torch.tensor([0x7FC0, -0x40, 0x7FFF, 0x7F81, 0x3F80], dtype=torch.int16)
    q, k, _ = unit_scores([[0.0] * 5], dtype)
    k[0, :, 0, 0] = bits.view(dtype).to(DEVICE)
    for way in ways(dtype, 64):
        with way.used():
            assert kept_of(q, k, topk=3, causal=False) == [[0, 1, 2]]
            threshold, tie_index = topk_attn.topk_select(q, k, topk=3, causal=False)
        assert threshold.view(torch.int32).item() == 0x7FC00000 and tie_index.item() == 2


# ------------------------------------------------------------------------------------------------------------
# topk_select_scores
# ------------------------------------------------------------------------------------------------------------


def check_scores(scores, topk, lengths=None):
    got = topk_attn.topk_select_scores(scores, topk, lengths)
    rows, n = scores.shape
    valid = [n] * rows if lengths is None else lengths.tolist()
    for length in set(valid):
        at = torch.tensor([x == length for x in valid], device=DEVICE)
        part = scores[at, :length].float()[:, None, None, :]
        want = reference.select(part, 1, Settings(topk=topk, causal=False))
        assert_encoding(got[0][at][:, None, None], got[1][at][:, None, None], want)
        assert torch.equal(got[2][at], reference.index_lists(want.kept, topk)[:, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_scores(dtype):
    for n in (1, 2, 31, 64, 65, 1000, 5000):
        scores = make_qkv(1, 6, 1, 1, 1, n, dtype=dtype)[0][0, :, 0]
        for topk in sorted({1, 2, min(8, n), n, n + 5}):
            check_scores(scores, topk)
    lengths = torch.tensor([0, 1, 2, 5, 10, 49, 50, 3, 0], dtype=torch.int32, device=DEVICE)
    scores = make_qkv(1, 9, 1, 1, 1, 50, dtype=dtype)[0][0, :, 0]
    for topk in (1, 5, 50, 70):
        check_scores(scores, topk, lengths)
        check_scores(torch.cat([scores, scores], dim=1)[:, 7:57], topk, lengths)
    table = torch.tensor([0.0, -0.0, 1.0, -1.0, NAN, INF, -INF], dtype=dtype)
    special = table[torch.randint(0, 7, (200, 12))].to(DEVICE)
    for topk in (1, 3, 6, 12):
        check_scores(special, topk)


def test_select_scores_agrees_with_select():
    q, k, _ = make_qkv(1, 66, 190, 3, 3, 64, dtype=BF16, seed=3, kind="permuted")
    a = topk_attn.topk_select(q, k, topk=9, causal=False, return_indices=True)
    b = topk_attn.topk_select_scores(own_scores(q, k).reshape(-1, 190).contiguous(), 9)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.reshape(y.shape), y)
