"""topk_attn_func forward and topk_select against the oracle: shapes, dtypes, heads, strides, budgets."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from op_helpers import (
    DTYPES,
    FORWARD_TOLERANCE,
    ORDER_KINDS,
    assert_close,
    assert_same,
    check_forward,
    default_scale,
    make_qkv,
)
from oracle import Settings

import topk_attn

HEADS = [(1, 1), (2, 2), (4, 2), (6, 2), (8, 1), (9, 3)]


@pytest.mark.parametrize("n", range(1, 71))
def test_every_length(n):
    s = Settings(ratio=0.13, min_keys=2) if n % 2 else Settings(topk=1 + n // 5)
    check_forward(*make_qkv(1, n, n, 2, 1, 8, seed=n), s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h,hkv", HEADS)
@pytest.mark.parametrize("causal", [True, False])
def test_heads(dtype, h, hkv, causal):
    check_forward(*make_qkv(2, 19, 19, h, hkv, 16, dtype=dtype, seed=h), Settings(topk=5, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 16, 24, 40, 64, 72, 104, 128, 200, 248, 256])
def test_head_dims(dtype, d):
    check_forward(*make_qkv(1, 21, 33, 2, 1, d, dtype=dtype, seed=d), Settings(topk=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d,dv", [(8, 256), (256, 8), (64, 24), (40, 72), (128, 64), (16, 104)])
def test_value_dim_differs(dtype, d, dv):
    check_forward(*make_qkv(1, 17, 25, 4, 2, d, dv, dtype=dtype, seed=d), Settings(topk=7))


def test_every_head_dim_once():
    for d in range(8, 257, 8):
        check_forward(*make_qkv(1, 3, 9, 1, 1, d, 264 - d, seed=d), Settings(topk=3))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "tq,tk", [(1, 1), (1, 40), (40, 1), (5, 64), (64, 5), (33, 70), (70, 33), (17, 16), (16, 17)]
)
def test_unequal_lengths(tq, tk, causal):
    check_forward(*make_qkv(2, tq, tk, 4, 2, 16, seed=tq), Settings(topk=4, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ORDER_KINDS)
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_hard_orders(dtype, kind, select):
    """Where ties and last bits decide, the kept set is still the contract's, key for key."""
    q, k, v = make_qkv(1, 30, 47, 4, 2, 64, 16, dtype=dtype, seed=11, kind=kind)
    check_forward(q, k, v, Settings(topk=9, select=select))
    check_forward(q, k, v, Settings(ratio=0.5, select=select, causal=False))


@pytest.mark.parametrize("kind", ["permuted", "two_values", "equal", "normal"])
def test_longer_rows(kind):
    """Rows longer than any block of keys."""
    for tk, w in ((300, 7), (700, 64), (1111, 300), (1111, 1)):
        q, k, v = make_qkv(1, 3, tk, 2, 1, 16, 8, seed=tk, kind=kind)
        check_forward(q, k, v, Settings(topk=w))


def test_many_rows_and_keys():
    q, k, v = make_qkv(1, 260, 390, 2, 1, 16, seed=2)
    check_forward(q, k, v, Settings(ratio=0.06))


BUDGETS = [
    Settings(topk=1),
    Settings(topk=7),
    Settings(topk=10**9),
    Settings(topk=2**62),
    Settings(ratio=1.0),
    Settings(ratio=0.07),
    Settings(ratio=1e-9),
    Settings(ratio=0.5, max_keys=4),
    Settings(ratio=0.01, min_keys=5),
    Settings(ratio=0.3, min_keys=4, max_keys=4),
    Settings(topk=3, min_keys=9),
    Settings(topk=20, max_keys=6),
    Settings(topk=5, min_keys=2**62),
    Settings(topk=5, max_keys=2**62),
]


@pytest.mark.parametrize("s", BUDGETS, ids=lambda s: str(s.kwargs()))
@pytest.mark.parametrize("causal", [True, False])
def test_budgets(s, causal):
    check_forward(*make_qkv(1, 40, 40, 2, 1, 8, seed=4), s.but(causal=causal))


@pytest.mark.parametrize("ratio", [0.01, 0.07, 0.1, 0.3, 1 / 3, 0.7, 0.999999, 1.0])
def test_budget_function(ratio):
    for n in [*range(0, 1200), 10**6, 10**9, 2**31, 2**40]:
        assert topk_attn.budget(n, ratio=ratio) == oracle.budget(n, Settings(ratio=ratio)), n
        assert topk_attn.budget(n, ratio=ratio, min_keys=5, max_keys=50) == oracle.budget(
            n, Settings(ratio=ratio, min_keys=5, max_keys=50)
        )


def test_budget_function_topk():
    for n in (0, 1, 5, 6, 7, 100):
        for s in (Settings(topk=6), Settings(topk=6, min_keys=9), Settings(topk=6, max_keys=2)):
            assert topk_attn.budget(n, **s.kwargs()) == oracle.budget(n, s)
    assert topk_attn.budget(100, ratio=0.07) == 7


ALWAYS = [
    dict(sink=1),
    dict(recent=1),
    dict(sink=2, recent=3),
    dict(sink=100),
    dict(recent=100),
    dict(sink=4, recent=100),
    dict(sink=5, recent=1),
    dict(sink=2**40, recent=2**40),
    dict(sink=6),
    dict(recent=6),
]


@pytest.mark.parametrize("always", ALWAYS, ids=str)
@pytest.mark.parametrize("select", ["head", "kv_group"])
@pytest.mark.parametrize("kind", ["normal", "two_values"])
def test_sink_and_recent(always, select, kind):
    q, k, v = make_qkv(2, 23, 29, 4, 2, 8, seed=9, kind=kind)
    for budget in (dict(topk=6), dict(ratio=0.4), dict(ratio=1.0), dict(topk=1)):
        check_forward(q, k, v, Settings(**budget, **always, select=select))
    check_forward(q, k, v, Settings(topk=6, **always, select=select, causal=False))


@pytest.mark.parametrize("h,hkv", [(2, 2), (4, 2), (8, 1), (6, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_group(h, hkv, dtype):
    check_forward(*make_qkv(2, 25, 31, h, hkv, 16, dtype=dtype, seed=h), Settings(topk=5, select="kv_group"))


@pytest.mark.parametrize("scale", [1e-6, 0.125, 1.0, 17.0])
def test_softmax_scale_keeps_the_order(scale):
    q, k, v = make_qkv(1, 20, 20, 2, 2, 8, seed=1)
    a = check_forward(q, k, v, Settings(topk=4, softmax_scale=scale))
    b = check_forward(q, k, v, Settings(topk=4))
    assert torch.equal(a.kept, b.kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_full_ratio_is_dense_attention(dtype, causal):
    q, k, v = make_qkv(2, 37, 37, 6, 2, 32, dtype=dtype, seed=3)
    out = topk_attn.topk_attn_func(q, k, v, causal=causal, ratio=1.0)
    qd, kd, vd = (x.double().transpose(1, 2) for x in (q, k, v))
    dense = F.scaled_dot_product_attention(qd, kd, vd, is_causal=causal, enable_gqa=True).transpose(1, 2)
    assert_close(out, dense, FORWARD_TOLERANCE[dtype], "out")


def strided_forms(x):
    """The same values in memory laid out in other ways; the last dimension stays contiguous."""
    b, t, h, d = x.shape
    wide = torch.full((b, t, h, d + 8), math.nan, dtype=x.dtype)
    wide[..., :d] = x
    gaps = torch.full((b, 2 * t, h, d), math.nan, dtype=x.dtype)
    gaps[:, ::2] = x
    fused = torch.full((b, t, 3, h, d), math.nan, dtype=x.dtype)
    fused[:, :, 1] = x
    offset = torch.full((x.numel() + 3,), math.nan, dtype=x.dtype)
    offset[3:] = x.flatten()
    return {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced head_dim": wide[..., :d],
        "every other row": gaps[:, ::2],
        "fused qkv": fused[:, :, 1],
        "odd offset": offset[3:].view(b, t, h, d),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strided_inputs_give_the_same_bits(dtype):
    q, k, v = make_qkv(2, 14, 18, 4, 2, 24, 16, dtype=dtype, seed=6)
    s = dict(topk=5, return_lse=True)
    out, lse = topk_attn.topk_attn_func(q, k, v, **s)
    forms = [strided_forms(x) for x in (q, k, v)]
    for name in forms[0]:
        for which in range(4):
            args = [
                form[name] if which in (i, 3) else x
                for i, (form, x) in enumerate(zip(forms, (q, k, v), strict=True))
            ]
            out2, lse2 = topk_attn.topk_attn_func(*args, **s)
            assert_same(out2, out, f"out, {name} of {which}")
            assert_same(lse2, lse, f"lse, {name} of {which}")


def test_expanded_inputs():
    q, k, v = make_qkv(3, 9, 12, 4, 2, 8, seed=8)
    one = [x[:1].expand(3, *x.shape[1:]) for x in (q, k, v)]
    assert_same(
        topk_attn.topk_attn_func(*one, topk=3),
        topk_attn.topk_attn_func(*(x.contiguous() for x in one), topk=3),
        "batch",
    )
    heads = [q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)]
    assert_same(
        topk_attn.topk_attn_func(*heads, topk=3),
        topk_attn.topk_attn_func(*(x.contiguous() for x in heads), topk=3),
        "heads",
    )
    keys = [q, k[:, :1].expand_as(k), v]
    check_forward(*keys, Settings(topk=3))


@pytest.mark.parametrize("tq,tk,b", [(0, 5, 2), (5, 0, 2), (0, 0, 1), (4, 4, 0)])
def test_empty_inputs(tq, tk, b):
    q, k, v = (torch.zeros(b, t, h, 8) for t, h in ((tq, 4), (tk, 2), (tk, 2)))
    out, lse = topk_attn.topk_attn_func(q, k, v, topk=3, return_lse=True)
    assert tuple(out.shape) == (b, tq, 4, 8) and tuple(lse.shape) == (b, 4, tq)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    threshold, tie_index, indices = topk_attn.topk_select(q, k, topk=3, return_indices=True)
    assert tuple(threshold.shape) == tuple(tie_index.shape) == (b, 4, tq)
    assert tuple(indices.shape) == (b, 4, tq, min(3, tk))


def test_inputs_are_not_changed():
    args = make_qkv(1, 9, 9, 2, 1, 8)
    before = [x.clone() for x in args]
    topk_attn.topk_attn_func(*args, topk=3)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_large_scores_do_not_overflow_the_softmax():
    q, k, v = make_qkv(1, 12, 12, 2, 1, 16, seed=5)
    check_forward(q * 300, k * 300, v, Settings(topk=5, softmax_scale=1.0))


def test_default_scale():
    q, k, v = make_qkv(1, 6, 6, 1, 1, 40, seed=5)
    assert_same(
        topk_attn.topk_attn_func(q, k, v, topk=3),
        topk_attn.topk_attn_func(q, k, v, topk=3, softmax_scale=default_scale(40)),
        "out",
    )


def test_return_forms():
    q, k, v = make_qkv(1, 6, 6, 2, 1, 8)
    out = topk_attn.topk_attn_func(q, k, v, topk=3)
    assert isinstance(out, torch.Tensor) and out.is_contiguous()
    pair = topk_attn.topk_attn_func(q, k, v, topk=3, return_lse=True)
    assert isinstance(pair, tuple) and len(pair) == 2
    two = topk_attn.topk_select(q, k, topk=3)
    assert isinstance(two, tuple) and len(two) == 2
    assert_same(pair[0], out, "out")
