"""NaN, infinities and signed zeros: in the order, in the outputs, and which rows they reach."""

import math

import oracle
import pytest
import torch
from op_helpers import (
    DTYPES,
    FORWARD_TOLERANCE,
    assert_close,
    assert_encoding,
    check_forward,
    make_qkv,
    selection_kwargs,
)
from oracle import Settings

import topk_attn

INF, NAN = math.inf, math.nan


def unit_scores(rows, dtype=torch.float32):
    """q, k, v with score(i, j) = rows[i][j]: D = 8, q_i picks channel i. At most 8 query rows."""
    scores = torch.tensor(rows, dtype=dtype)
    tq, tk = scores.shape
    q = torch.zeros(1, tq, 1, 8, dtype=dtype)
    k = torch.zeros(1, tk, 1, 8, dtype=dtype)
    for i in range(tq):
        q[0, i, 0, i] = 1
        k[0, :, 0, i] = scores[i]
    v = torch.randn(1, tk, 1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return q, k, v


def kept_of(q, k, **kw):
    indices = topk_attn.topk_select(q, k, return_indices=True, **kw)[2]
    return [[int(j) for j in row if j >= 0] for row in indices[0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_are_equal(dtype):
    q, k, _ = unit_scores([[-0.0, 0.0, -0.0, 0.0, -1.0, 1.0]], dtype)
    k[0, :, 0, 1:] = 0
    for w, kept in ((1, [5]), (2, [0, 5]), (3, [0, 1, 5]), (4, [0, 1, 2, 5]), (6, [0, 1, 2, 3, 4, 5])):
        assert kept_of(q, k, topk=w, causal=False) == [kept]
    threshold, tie_index = topk_attn.topk_select(q, k, topk=2, causal=False)
    assert threshold.item() == 0 and not torch.signbit(threshold).item() and tie_index.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_products(dtype):
    q = torch.zeros(1, 2, 1, 8, dtype=dtype)
    q[0, 1] = -0.0
    k = -torch.ones(1, 9, 1, 8, dtype=dtype)
    k[0, ::2] = 1
    check_forward(q, k, k, Settings(topk=4))
    threshold, _ = topk_attn.topk_select(q, k, topk=4)
    assert not bool(torch.signbit(threshold).any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_keys_come_first(dtype):
    q, k, v = unit_scores([[1.0, NAN, 3.0, NAN, INF, -INF, 0.0]], dtype)
    assert kept_of(q, k, topk=1, causal=False) == [[1]]
    assert kept_of(q, k, topk=2, causal=False) == [[1, 3]]
    threshold, tie_index = topk_attn.topk_select(q, k, topk=2, causal=False)
    assert threshold.isnan().item() and tie_index.item() == 3
    out, lse = topk_attn.topk_attn_func(q, k, v, topk=2, causal=False, return_lse=True)
    assert bool(out.isnan().all()) and bool(lse.isnan().all())


def test_nan_payload_and_sign_do_not_matter():
    bits = torch.tensor([0x7FC00000, -0x400000, 0x7FFFFFFF, 0x7F800001, 0x3F800000], dtype=torch.int32)
    q, k, _ = unit_scores([[0.0] * 5])
    k[0, :, 0, 0] = bits.view(torch.float32)
    assert kept_of(q, k, topk=3, causal=False) == [[0, 1, 2]]
    threshold, tie_index = topk_attn.topk_select(q, k, topk=3, causal=False)
    assert threshold.view(torch.int32).item() == 0x7FC00000 and tie_index.item() == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_nan_query_keeps_its_first_keys(dtype, select):
    q, k, v = make_qkv(1, 12, 12, 2, 1, 8, dtype=dtype, seed=2)
    q[0, 5, 1, 3] = NAN
    indices = topk_attn.topk_select(q, k, topk=3, select=select, return_indices=True)[2]
    assert indices[0, 1, 5].tolist() == [0, 1, 2]
    out, lse = topk_attn.topk_attn_func(q, k, v, topk=3, select=select, return_lse=True)
    bad = torch.zeros_like(lse, dtype=torch.bool)
    bad[0, 1, 5] = True
    assert torch.equal(lse.isnan(), bad)
    assert torch.equal(out.isnan().all(-1), bad.transpose(1, 2)) and torch.equal(
        out.isnan().any(-1), bad.transpose(1, 2)
    )
    if select == "kv_group":
        assert indices[0, 0, 5].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_infinity_gives_nan(dtype):
    q, k, v = unit_scores([[1.0, INF, 3.0, -INF, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]], dtype)
    # Channel 0 of key 1 is infinite; row 1 multiplies it with zero, which is NaN as well.
    out, lse = topk_attn.topk_attn_func(q[:, :1], k, v, topk=2, causal=False, return_lse=True)
    assert bool(out.isnan().all())
    assert not bool(lse.isfinite().any()) and not bool((lse == -INF).any())
    assert kept_of(q[:, :1], k, topk=2, causal=False) == [[1, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_minus_infinity(dtype):
    q = torch.ones(1, 3, 1, 8, dtype=dtype)
    k = torch.full((1, 6, 1, 8), -INF, dtype=dtype)
    v = torch.ones(1, 6, 1, 8, dtype=dtype)
    out, lse = topk_attn.topk_attn_func(q, k, v, topk=2, causal=False, return_lse=True)
    assert bool((out == 0).all()) and bool((lse == -INF).all())
    assert kept_of(q, k, topk=2, causal=False) == [[0, 1]] * 3
    threshold, tie_index = topk_attn.topk_select(q, k, topk=2, causal=False)
    assert bool((threshold == -INF).all()) and bool((tie_index == 1).all())
    # One finite key among them: the rest gets no weight.
    k[0, 4] = 0.5
    v[0, 4] = 3
    out, lse = topk_attn.topk_attn_func(q, k, v, topk=2, causal=False, return_lse=True)
    assert bool((out == 3).all()) and bool(lse.isfinite().all())


def test_gradient_of_minus_infinity_rows_is_zero():
    q = torch.ones(1, 3, 1, 8, requires_grad=True)
    k = torch.full((1, 6, 1, 8), -INF, requires_grad=True)
    v = torch.ones(1, 6, 1, 8, requires_grad=True)
    out, lse = topk_attn.topk_attn_func(q, k, v, topk=2, return_lse=True)
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])
    for x in (q, k, v):
        assert bool((x.grad == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_rows_without_keys_is_zero(dtype):
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 9, 4, 2, 1, 8, dtype=dtype))
    out, lse = topk_attn.topk_attn_func(q, k, v, topk=2, return_lse=True)
    assert bool((out[:, :5] == 0).all()) and bool((lse[:, :, :5] == -INF).all())
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    torch.autograd.backward([out, lse], [dout, dlse])
    assert bool((q.grad[:, :5] == 0).all()) and bool(q.grad[:, 6:].abs().sum() > 0)
    for x in (q, k, v):
        assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_non_finite_values_reach_only_rows_that_keep_the_key(dtype, bad, select):
    q, k, v = make_qkv(1, 40, 40, 4, 2, 16, dtype=dtype, seed=4)
    s = dict(topk=4, select=select)
    indices = topk_attn.topk_select(q, k, return_indices=True, **s)[2]
    clean = topk_attn.topk_attn_func(q, k, v, **s)
    poisoned = v.clone()
    poisoned[0, 3, 1] = bad
    out = topk_attn.topk_attn_func(q, k, poisoned, **s)
    keeps = torch.zeros(1, 40, 4, dtype=torch.bool)
    keeps[0, :, 2:] = (indices[0, 2:] == 3).any(-1).T
    assert keeps.any() and not keeps.all()
    assert torch.equal(out[~keeps], clean[~keeps])
    assert not bool(out[keeps].isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_dout_reaches_only_kept_keys(dtype):
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 40, 40, 4, 2, 16, dtype=dtype, seed=4))
    s = dict(topk=4)
    indices = topk_attn.topk_select(q, k, return_indices=True, **s)[2]
    dout = torch.ones(1, 40, 4, 16, dtype=dtype)
    clean = torch.autograd.grad(topk_attn.topk_attn_func(q, k, v, **s), (q, k, v), dout)
    dout[0, 30, 1] = NAN
    dq, dk, dv = torch.autograd.grad(topk_attn.topk_attn_func(q, k, v, **s), (q, k, v), dout)
    row = torch.zeros(1, 40, 4, dtype=torch.bool)
    row[0, 30, 1] = True
    assert torch.equal(dq[~row], clean[0][~row]) and bool(dq[row].isnan().all())
    kept = torch.zeros(1, 40, 2, dtype=torch.bool)
    kept[0, indices[0, 1, 30].long(), 0] = True
    for got, want in ((dk, clean[1]), (dv, clean[2])):
        assert torch.equal(got[~kept], want[~kept]) and bool(got[kept].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_random_special_values_against_the_oracle(dtype, select):
    g = torch.Generator().manual_seed(12)
    table = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, INF, -INF, NAN], dtype=dtype)
    weights = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, 0.15, 0.15, 0.1])
    for trial in range(30):
        q, k, v = make_qkv(1, 7, 13, 2, 1, 8, dtype=dtype, seed=trial)
        q = table[torch.multinomial(weights, q.numel(), True, generator=g)].view_as(q)
        k = table[torch.multinomial(weights, k.numel(), True, generator=g)].view_as(k)
        s = Settings(
            topk=1 + trial % 6, select=select, causal=trial % 2 == 0, sink=trial % 3, recent=trial % 4
        )
        check_selection_and_rows(q, k, v, s)


def check_selection_and_rows(q, k, v, s):
    expected = oracle.attention(q, k, v, s)
    threshold, tie_index, indices = topk_attn.topk_select(q, k, **selection_kwargs(s), return_indices=True)
    assert_encoding(threshold, tie_index, expected, q.dtype)
    assert torch.equal(indices, oracle.index_lists(expected.kept, oracle.budget(k.shape[1], s)))
    out = topk_attn.topk_attn_func(q, k, v, **s.kwargs())
    assert_close(out, expected.out, FORWARD_TOLERANCE[q.dtype], "out")


def test_float16_scores_beyond_its_range():
    """Scores of fp16 inputs are float32: sums beyond 65504 still have an order."""
    q, k, v = make_qkv(1, 10, 20, 1, 1, 64, dtype=torch.float16, seed=3)
    check_forward(q * 64, k * 64, v, Settings(topk=4, softmax_scale=1e-3))


def test_subnormal_scores_have_an_order():
    q, k, v = unit_scores([[1e-40, 3e-40, -1e-40, 2e-40, 0.0]])
    assert kept_of(q, k, topk=3, causal=False) == [[0, 1, 3]]
    assert kept_of(q, k, topk=4, causal=False) == [[0, 1, 3, 4]]
