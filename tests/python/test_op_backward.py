"""Gradients against the oracle's explicit formulas, gradcheck, and what the contract promises about them."""

import math

import oracle
import pytest
import torch
from op_helpers import (
    DTYPES,
    FLAT_SCALE,
    GRADIENT_TOLERANCE,
    ORDER_KINDS,
    assert_close,
    assert_same,
    check_gradients,
    kernel_scores,
    make_qkv,
    normal,
)
from oracle import Settings

import topk_attn


@pytest.mark.parametrize("n", [*range(1, 20), 31, 32, 33, 63, 64, 65, 70])
def test_every_length(n):
    check_gradients(*make_qkv(1, n, n, 2, 1, 8, seed=n), Settings(ratio=0.2, min_keys=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h,hkv", [(1, 1), (2, 2), (4, 2), (8, 1), (9, 3)])
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_heads(dtype, h, hkv, select):
    check_gradients(*make_qkv(2, 18, 18, h, hkv, 16, dtype=dtype, seed=h), Settings(topk=5, select=select))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d,dv", [(8, 8), (24, 40), (72, 8), (8, 104), (128, 128), (200, 256), (256, 200)])
def test_dims(dtype, d, dv):
    check_gradients(*make_qkv(1, 15, 22, 2, 1, d, dv, dtype=dtype, seed=d), Settings(topk=6))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tq,tk", [(1, 1), (1, 30), (30, 1), (7, 50), (50, 7)])
def test_unequal_lengths(tq, tk, causal):
    q, k, v = make_qkv(2, tq, tk, 4, 2, 16, seed=tq)
    # lse of rows without keys is -inf, so only its finite rows may carry a gradient through a mask.
    check_gradients(q, k, v, Settings(topk=4, causal=causal))


@pytest.mark.parametrize("kind", ORDER_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_orders(kind, dtype):
    """The backward uses the very set of the forward, also where last bits decide."""
    scale = {"mixed": 1e-3}.get(kind)
    q, k, v = make_qkv(1, 24, 40, 4, 2, 32, 16, dtype=dtype, seed=5, kind=kind)
    for select in ("head", "kv_group"):
        check_gradients(q, k, v, Settings(topk=7, select=select, softmax_scale=scale))


@pytest.mark.parametrize(
    "s",
    [
        Settings(ratio=1.0),
        Settings(ratio=1.0, causal=False),
        Settings(topk=1),
        Settings(topk=6, sink=2, recent=2),
        Settings(topk=3, sink=9),
        Settings(topk=5, recent=50),
        Settings(ratio=0.3, sink=1, recent=3, select="kv_group"),
        Settings(topk=4, softmax_scale=0.5),
        Settings(ratio=0.01, min_keys=4, max_keys=9),
    ],
    ids=lambda s: str(s.kwargs()),
)
@pytest.mark.parametrize("with_lse", [True, False])
def test_settings(s, with_lse):
    check_gradients(*make_qkv(2, 21, 21, 4, 2, 8, seed=3), s, with_lse=with_lse)


def test_longer_rows():
    check_gradients(*make_qkv(1, 5, 900, 2, 1, 16, seed=1), Settings(topk=130))
    check_gradients(*make_qkv(1, 300, 300, 2, 1, 8, seed=1), Settings(ratio=0.1))


def test_single_gradients():
    """Each of q, k, v alone may require a gradient; the value equals the one of the joint backward."""
    q, k, v = make_qkv(1, 12, 12, 2, 1, 8)
    dout = normal(1, 12, 2, 8, seed=9)
    joint = torch.autograd.grad(
        topk_attn.topk_attn_func(*(x.requires_grad_() for x in (q, k, v)), topk=4), (q, k, v), dout
    )
    for i in range(3):
        args = [x.detach().requires_grad_(j == i) for j, x in enumerate((q, k, v))]
        (alone,) = torch.autograd.grad(topk_attn.topk_attn_func(*args, topk=4), args[i], dout)
        assert_same(alone, joint[i], "qkv"[i])


def test_lse_alone():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 14, 14, 2, 1, 8))
    _, lse = topk_attn.topk_attn_func(q, k, v, topk=4, return_lse=True)
    dlse = normal(*lse.shape, seed=2)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), dlse, allow_unused=True)
    want = oracle.attention(q, k, v, Settings(topk=4), dout=torch.zeros(1, 14, 2, 8), dlse=dlse)
    assert_close(dq, want.dq, 2e-5, "dq")
    assert_close(dk, want.dk, 2e-5, "dk")
    assert dv is None or bool((dv == 0).all())


def test_sum_backward_and_expanded_dout():
    """sum().backward() hands in a dO of stride 0."""
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 13, 13, 4, 2, 16))
    topk_attn.topk_attn_func(q, k, v, topk=4).sum().backward()
    a = [x.grad.clone() for x in (q, k, v)]
    out = topk_attn.topk_attn_func(q, k, v, topk=4)
    b = torch.autograd.grad(out, (q, k, v), torch.ones(2, 13, 4, 16))
    for x, y, name in zip(a, b, ("dq", "dk", "dv"), strict=True):
        assert_same(x, y, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_dout_and_inputs(dtype):
    q, k, v = make_qkv(2, 11, 15, 4, 2, 24, 16, dtype=dtype)
    dout = normal(2, 11, 4, 16, dtype=dtype, seed=4)

    def gradients(q, k, v, dout):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(topk_attn.topk_attn_func(q, k, v, topk=5), (q, k, v), dout)

    want = gradients(q, k, v, dout)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    channels_first = dout.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # last stride is not 1
    for args in (swapped, (q, k, v, swapped[3]), (q, k, v, channels_first)):
        for name, a, b in zip(("dq", "dk", "dv"), gradients(*args), want, strict=True):
            assert_same(a.contiguous(), b.contiguous(), name)
    for shape in ((1, 11, 4, 16), (2, 1, 4, 16), (2, 11, 1, 16), (2, 11, 4, 1), (1, 1, 1, 1)):
        part = normal(*shape, dtype=dtype, seed=6).expand(2, 11, 4, 16)
        for a, b in zip(gradients(q, k, v, part), gradients(q, k, v, part.contiguous()), strict=True):
            assert_same(a, b, f"dout expanded from {shape}")


def selection_gap(q, k, s):
    """Distance between the last kept and the first dropped score, over all rows."""
    scores = kernel_scores(q.detach(), k.detach())
    kept = oracle.attention(q, k, k, s).kept
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if s.causal:
        seen = torch.arange(k.shape[1]) <= torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    last = scores.masked_fill(~kept, math.inf).amin(-1)
    first = scores.masked_fill(kept | ~seen, -math.inf).amax(-1)
    return float((last - first).min())


@pytest.mark.parametrize(
    "s",
    [
        Settings(topk=3),
        Settings(topk=3, sink=1, recent=1),
        Settings(ratio=1.0),
        Settings(topk=2, causal=False),
    ],
    ids=lambda s: str(s.kwargs()),
)
@pytest.mark.parametrize("h,hkv", [(2, 2), (4, 2)])
def test_gradcheck(s, h, hkv):
    for seed in range(100):
        q, k, v = make_qkv(1, 5, 7, h, hkv, 8, 16, dtype=torch.float64, seed=seed)
        if s.sink or selection_gap(q, k, s) > 1e-3:
            break
    args = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: topk_attn.topk_attn_func(q, k, v, **s.kwargs(), return_lse=True),
        args,
        eps=1e-7,
        atol=1e-6,
    )


def test_gradcheck_varlen():
    q, k, v = (x[0].requires_grad_() for x in make_qkv(1, 9, 9, 2, 1, 8, dtype=torch.float64, seed=1))
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda q, k, v: topk_attn.topk_attn_varlen_func(q, k, v, cu, cu, 5, 5, ratio=1.0, return_lse=True),
        (q, k, v),
        eps=1e-7,
        atol=1e-6,
    )


def test_double_backward_raises():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 6, 6, 2, 1, 8, dtype=torch.float64))
    out = topk_attn.topk_attn_func(q, k, v, topk=3)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)twice|double backward|not differentiable|derivative"):
        dq.sum().backward()


def test_backward_twice_needs_retain_graph():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 6, 6, 2, 1, 8))
    out = topk_attn.topk_attn_func(q, k, v, topk=3)
    out.sum().backward(retain_graph=True)
    first = q.grad.clone()
    out.sum().backward()
    assert torch.equal(q.grad, 2 * first)
    with pytest.raises(RuntimeError):
        out.sum().backward()


def test_in_place_change_of_a_saved_tensor_is_caught():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 6, 6, 2, 1, 8))
    out = topk_attn.topk_attn_func(q, k, v, topk=3)
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_graph_without_requires_grad():
    q, k, v = make_qkv(1, 6, 6, 2, 1, 8)
    assert topk_attn.topk_attn_func(q, k, v, topk=3).grad_fn is None
    with torch.no_grad():
        assert topk_attn.topk_attn_func(q.requires_grad_(), k, v, topk=3).grad_fn is None


def test_selection_is_not_differentiable():
    q, k, _ = (x.requires_grad_() for x in make_qkv(1, 6, 6, 2, 1, 8))
    threshold, tie_index, indices = topk_attn.topk_select(q, k, topk=3, return_indices=True)
    assert not any(x.requires_grad for x in (threshold, tie_index, indices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_key_nobody_kept_is_exactly_zero(dtype):
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 64, 64, 4, 2, 16, dtype=dtype, seed=8))
    with torch.no_grad():
        k[0, 20:30] = 0
        k[0, 20:30, :, 0] = -100 * q[0, :, :, 0].sign().mean()
    expected = check_gradients(q, k, v, Settings(topk=2))
    assert not bool(expected.kept.any(dim=2).all())


def test_backward_uses_the_forwards_set():
    """dV of one-hot dO are the probabilities: their support is the kept set, key for key."""
    q, k, v = make_qkv(1, 64, 96, 1, 1, 64, 64, seed=3, kind="permuted")
    s = Settings(topk=10, softmax_scale=FLAT_SCALE)
    v.requires_grad_()
    out = topk_attn.topk_attn_func(q.requires_grad_(), k.requires_grad_(), v, **s.kwargs())
    dout = torch.eye(64).reshape(1, 64, 1, 64)
    (dv,) = torch.autograd.grad(out, v, dout)
    kept = oracle.attention(q, k, v, s).kept[0, 0]
    assert torch.equal(dv[0, :, 0].T != 0, kept)


def test_optimisation_step_reduces_the_loss():
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 24, 24, 4, 2, 16, seed=5))
    target = normal(2, 24, 4, 16, seed=6)
    optimizer = torch.optim.Adam([q, k, v], lr=0.05)
    losses = []
    for _ in range(40):
        loss = (topk_attn.topk_attn_func(q, k, v, topk=6) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_gradients_of_the_op_with_recomputed_set():
    """bwd gives the same gradients from the encoding alone as from the kept lists that fwd saved."""
    q, k, v = make_qkv(2, 20, 26, 4, 2, 16, seed=4, kind="duplicated")
    for extra in ({}, {"select": "kv_group"}, {"sink": 2, "recent": 1}):
        lists = torch.ops.topk_attn.fwd(q, k, v, topk=6, kept="lists", **extra)
        plain = torch.ops.topk_attn.fwd(q, k, v, topk=6, kept="none", **extra)
        for a, b in zip(lists[:4], plain[:4], strict=True):
            assert_same(a, b, "fwd outputs")
        dout = normal(*lists[0].shape, seed=1)
        dlse = normal(*lists[1].shape, seed=2)
        a = torch.ops.topk_attn.bwd(dout, dlse, q, k, v, *lists, topk=6, **extra)
        b = torch.ops.topk_attn.bwd(dout, dlse, q, k, v, *plain, topk=6, **extra)
        for x, y, name in zip(a, b, ("dq", "dk", "dv"), strict=True):
            assert_close(x, y.double(), GRADIENT_TOLERANCE[q.dtype], name)
