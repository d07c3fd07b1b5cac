"""Outputs and gradients on CUDA: errors against float64, exact zeros, dO and lse in every form, autograd."""

import math

import cuda_reference as reference
import pytest
import torch
from cuda_helpers import (
    BF16,
    DEVICE,
    DTYPES,
    F32,
    PLANNED,
    assert_twice_dense,
    bounds,
    check_attention,
    every_way,
    kept_mask,
    make_qkv,
    normal,
    poison_free_memory,
    ways,
)
from op_helpers import ORDER_KINDS, assert_never_kept_is_zero, assert_same
from oracle import Settings

import topk_attn

HEAD_DIMS = (8, 64, 72, 80, 96, 128, 192, 256)
NAMES = ("dq", "dk", "dv")


@every_way(dims=HEAD_DIMS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_head_dims(dtype, d, way, deterministic):
    q, k, v = make_qkv(2, 150, 200, 4, 2, d, dtype=dtype, seed=d)
    with way.used():
        check_attention(q, k, v, Settings(topk=20), deterministic=deterministic)
        check_attention(q, k, v, Settings(ratio=0.3, causal=False), deterministic=deterministic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d,dv", [(8, 256), (256, 8), (64, 128), (128, 64), (64, 24), (40, 72), (192, 128)])
def test_value_dim_differs(dtype, d, dv):
    q, k, v = make_qkv(1, 130, 170, 4, 2, d, dv, dtype=dtype, seed=d)
    for deterministic in (False, True):
        check_attention(q, k, v, Settings(topk=17), deterministic=deterministic)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim_once(dtype):
    for d in range(8, 257, 8):
        for dv in (d, 264 - d):
            check_attention(*make_qkv(1, 66, 70, 2, 1, d, dv, dtype=dtype, seed=d), Settings(topk=9))


@every_way()
@pytest.mark.parametrize("h,hkv", [(1, 1), (4, 4), (8, 1), (6, 2), (9, 3), (32, 8)])
def test_heads(dtype, d, way, h, hkv):
    q, k, v = make_qkv(2, 90, 90, h, hkv, d, dtype=dtype, seed=h)
    with way.used():
        for select in ("head", "kv_group"):
            check_attention(q, k, v, Settings(topk=9, select=select))


@every_way(dims=(64,))
def test_every_length(dtype, d, way):
    """S = 1 to 257 one by one."""
    q, k, v = make_qkv(1, 257, 257, 2, 1, d, dtype=dtype, seed=1)
    with way.used():
        for n in range(1, 258):
            s = Settings(ratio=0.13, min_keys=2) if n % 2 else Settings(topk=1 + n // 5)
            check_attention(q[:, :n], k[:, :n], v[:, :n], s, deterministic=n % 3 == 0)


@every_way()
@pytest.mark.parametrize("tq,tk", [(1, 1), (1, 700), (300, 1), (70, 333), (333, 70), (129, 128), (128, 129)])
def test_unequal_lengths(dtype, d, way, tq, tk):
    q, k, v = make_qkv(2, tq, tk, 4, 2, d, dtype=dtype, seed=tq)
    with way.used():
        for causal in (True, False):
            check_attention(q, k, v, Settings(ratio=0.2, causal=causal))


@every_way()
@pytest.mark.parametrize("kind", [*ORDER_KINDS, "clustered", "half clustered"])
def test_hard_orders(dtype, d, way, kind):
    """The backward uses the very set of the forward, also where last bits decide."""
    q, k, v = make_qkv(1, 320, 400, 4, 2, d, dtype=dtype, seed=11, kind=kind)
    scale = 1e-4 if kind == "mixed" else None
    with way.used():
        check_attention(q, k, v, Settings(topk=9, softmax_scale=scale))
        check_attention(q, k, v, Settings(ratio=0.5, select="kv_group", causal=False, softmax_scale=scale))


@every_way()
@pytest.mark.parametrize(
    "s",
    [
        Settings(topk=1),
        Settings(ratio=1.0),
        Settings(ratio=1.0, causal=False),
        Settings(topk=10**9),
        Settings(topk=6, sink=2, recent=2),
        Settings(topk=3, sink=9),
        Settings(topk=5, recent=5000),
        Settings(ratio=0.3, sink=1, recent=70, select="kv_group"),
        Settings(topk=4, softmax_scale=0.5),
        Settings(ratio=0.01, min_keys=4, max_keys=9),
    ],
    ids=lambda s: str(s.kwargs()),
)
def test_settings(dtype, d, way, s):
    q, k, v = make_qkv(2, 210, 210, 4, 2, d, dtype=dtype, seed=3)
    with way.used():
        for with_lse in (True, False):
            check_attention(q, k, v, s, with_lse=with_lse)


@every_way(dtypes=(BF16, F32))
@pytest.mark.parametrize("kind", ["normal", "clustered", "half clustered"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_longer_sequences(dtype, d, way, kind, deterministic):
    q, k, v = make_qkv(1, 1700, 2111, 2, 1, d, dtype=dtype, seed=3, kind=kind)
    with way.used():
        for s in (Settings(ratio=0.01), Settings(topk=300), Settings(ratio=0.02, causal=False)):
            check_attention(q, k, v, s, deterministic=deterministic)


@every_way()
def test_gradient_of_a_key_nobody_kept_is_exactly_zero(dtype, d, way):
    """Whole tiles of keys, single keys amid kept ones, and stale memory underneath."""
    q, k, v = make_qkv(1, 300, 700, 4, 2, d, dtype=dtype, seed=8)
    for s in (Settings(topk=1), Settings(topk=2, causal=False), Settings(topk=9, sink=1, recent=4)):
        with way.used():
            kept = kept_mask(q, k, s)
            used = kept.unflatten(1, (2, 2)).any(2).any(2)
            assert bool((~used).any())
            args = [x.detach().requires_grad_() for x in (q, k, v)]
            out = topk_attn.topk_attn_func(*args, **s.kwargs())
            poison_free_memory()
            _, dk, dv = torch.autograd.grad(out, args, normal(*out.shape, dtype=dtype, seed=1))
        assert_never_kept_is_zero(dk, dv, kept)
        assert bool((dv.transpose(1, 2)[used] != 0).any(-1).all())


@every_way()
@pytest.mark.parametrize("causal", [True, False])
def test_packs(dtype, d, way, causal):
    for lq, lk in (
        ([0, 5], [0, 5]),
        ([1, 1, 1], [10, 0, 133]),
        ([3, 70, 0, 2], [90, 40, 5, 0]),
        ([64, 1, 128, 63, 257], [64, 1, 128, 63, 257]),
        ([200, 4], [3, 150]),
    ):
        for deterministic in (False, True):
            with way.used():
                check_pack(lq, lk, Settings(topk=5, causal=causal), dtype, d, deterministic)


def check_pack(lq, lk, s, dtype, d, deterministic):
    q, k, v = make_qkv(1, sum(lq), sum(lk), 4, 2, d, dtype=dtype, seed=len(lq))
    packed = [x[0].detach().requires_grad_() for x in (q, k, v)]
    bound = (bounds(lq), bounds(lk), max(lq), max(lk))
    out, lse = topk_attn.topk_attn_varlen_func(
        *packed, *bound, **s.kwargs(), deterministic=deterministic, return_lse=True
    )
    dout, dlse = normal(*out.shape, dtype=dtype, seed=1), normal(*lse.shape, seed=2)
    poison_free_memory()
    dq, dk, dv = torch.autograd.grad([out, lse], packed, [dout, dlse])
    row = key = 0
    for tq, tk in zip(lq, lk, strict=True):
        rows, keys = slice(row, row + tq), slice(key, key + tk)
        row, key = row + tq, key + tk
        if not tq or not tk:
            assert not bool(dq[rows].any()) and not bool(dk[keys].any()) and not bool(dv[keys].any())
            continue
        document = q[:, rows], k[:, keys], v[:, keys]
        kept = kept_mask(*document[:2], s)
        inputs = (*document, kept, s.scale(d), dout[None, rows], dlse[None, :, rows])
        exact, near = reference.exact(*inputs), reference.dense(*inputs)
        got = dict(dq=dq[None, rows], dk=dk[None, keys], dv=dv[None, keys])
        for name, grad in got.items():
            assert_twice_dense(
                grad, getattr(near, name), getattr(exact, name), dtype, f"{name} of {tq} and {tk}"
            )
        assert_never_kept_is_zero(got["dk"], got["dv"], kept)


# ------------------------------------------------------------------------------------------------------------
# What arrives as a gradient
# ------------------------------------------------------------------------------------------------------------


def gradients(q, k, v, dout, **kw):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = topk_attn.topk_attn_func(q, k, v, deterministic=True, **kw)
    return torch.autograd.grad(out, (q, k, v), dout)


def test_many_heads_are_walked_in_parts(gpu):
    """Beyond 1 GiB of float32 sums a few KV heads go at a time, with the results of all at once."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of device memory")
    heads, kv_heads, n, d = 160, 40, 12000, 128
    x = [normal(1, n, h, d, dtype=BF16, seed=h) for h in (heads, kv_heads, kv_heads, heads)]
    for way in (PLANNED, *ways(BF16, d)):
        with way.used():
            whole = gradients(*x, topk=40)
            for first, last in ((0, 1), (kv_heads - 1, kv_heads)):
                part = [t[:, :, first * r : last * r] for t, r in zip(x, (4, 1, 1, 4), strict=True)]
                alone = gradients(*part, topk=40)
                parts = [
                    x[:, :, first * r : last * r].contiguous() for x, r in zip(whole, (4, 1, 1), strict=True)
                ]
                # dQ adds its key blocks in an order that depends on the number of heads.
                error = (parts[0].float() - alone[0].float()).abs().max()
                assert error <= 2**-8 * alone[0].abs().max()
                assert_same(parts[1], alone[1], "dk")
                assert_same(parts[2], alone[2], "dv")


@every_way()
def test_expanded_and_strided_dout(dtype, d, way):
    """dO of stride 0 (sum().backward()), and dO and inputs in other layouts, give the same bits."""
    b, tq, h = 2, 110, 4
    q, k, v = make_qkv(b, tq, 150, h, 2, d, dtype=dtype)
    with way.used():
        for shape in ((1, 1, 1, 1), (1, tq, h, d), (b, 1, h, d), (b, tq, 1, d), (b, tq, h, 1)):
            part = normal(*shape, dtype=dtype, seed=6).expand(b, tq, h, d)
            a, c = gradients(q, k, v, part, topk=9), gradients(q, k, v, part.contiguous(), topk=9)
            for name, x, y in zip(NAMES, a, c, strict=True):
                assert_same(x, y, f"{name}, dout expanded from {shape}")
        dout = normal(b, tq, h, d, dtype=dtype, seed=4)
        want = gradients(q, k, v, dout, topk=9)
        swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
        channels_first = dout.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        offset = torch.empty(dout.numel() + 3, dtype=dtype, device=DEVICE)[3:].view_as(dout).copy_(dout)
        for args in (swapped, (q, k, v, swapped[3]), (q, k, v, channels_first), (q, k, v, offset)):
            for name, x, y in zip(NAMES, gradients(*args, topk=9), want, strict=True):
                assert_same(x.contiguous(), y, name)


@every_way()
def test_lse_alone(dtype, d, way):
    s = Settings(topk=9)
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 140, 140, 2, 1, d, dtype=dtype))
    with way.used():
        kept = kept_mask(q.detach(), k.detach(), s)
        _, lse = topk_attn.topk_attn_func(q, k, v, topk=9, return_lse=True)
        dlse = normal(*lse.shape, seed=2)
        dq, dk, dv = torch.autograd.grad(lse, (q, k, v), dlse, allow_unused=True)
    inputs = (*(x.detach() for x in (q, k, v)), kept, s.scale(d), torch.zeros_like(q.detach()), dlse)
    exact, near = reference.exact(*inputs), reference.dense(*inputs)
    assert_twice_dense(dq, near.dq, exact.dq, dtype, "dq")
    assert_twice_dense(dk, near.dk, exact.dk, dtype, "dk")
    assert dv is None or not bool(dv.any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_gradients(dtype):
    """Each of q, k, v alone may require a gradient; the value equals the one of the joint backward."""
    q, k, v = make_qkv(1, 120, 120, 2, 1, 64, dtype=dtype)
    dout = normal(1, 120, 2, 64, dtype=dtype, seed=9)
    for way in ways(dtype, 64):
        with way.used():
            joint = gradients(q, k, v, dout, topk=14)
            for i in range(3):
                args = [x.detach().requires_grad_(j == i) for j, x in enumerate((q, k, v))]
                out = topk_attn.topk_attn_func(*args, topk=14, deterministic=True)
                (alone,) = torch.autograd.grad(out, args[i], dout)
                assert_same(alone, joint[i], "qkv"[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_dout_stays_in_its_document(dtype):
    lengths = [100, 140, 60]
    cu = bounds(lengths)
    q, k, v = (x[0] for x in make_qkv(1, 300, 300, 4, 2, 64, dtype=dtype))

    def run(dout):
        args = [x.detach().requires_grad_() for x in (q, k, v)]
        out = topk_attn.topk_attn_varlen_func(*args, cu, cu, 140, 140, topk=3, deterministic=True)
        return torch.autograd.grad(out, args, dout)

    for way in ways(dtype, 64):
        with way.used():
            dout = normal(300, 4, 64, dtype=dtype, seed=3)
            clean = run(dout)
            dout[130, 1] = math.nan
            dirty = run(dout)
        assert bool(dirty[0][130, 1].isnan().all())
        for got, want in zip(dirty, clean, strict=True):
            assert torch.equal(got[:100], want[:100]) and torch.equal(got[240:], want[240:])


# ------------------------------------------------------------------------------------------------------------
# Autograd
# ------------------------------------------------------------------------------------------------------------


def test_double_backward_raises():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 70, 70, 2, 1, 64))
    out = topk_attn.topk_attn_func(q, k, v, topk=3)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dq.sum().backward()


def test_in_place_change_of_a_saved_tensor_is_caught():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 70, 70, 2, 1, 64))
    out = topk_attn.topk_attn_func(q, k, v, topk=3)
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    args = [x.requires_grad_() for x in make_qkv(1, 150, 150, 4, 2, 64, dtype=BF16)]

    def attend(q, k, v):
        return topk_attn.topk_attn_func(q, k, v, topk=14, deterministic=True)

    want = torch.autograd.grad(attend(*args).sum(), args)
    got = torch.autograd.grad(checkpoint(attend, *args, use_reentrant=False).sum(), args)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_same(a, b, name)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_optimisation_steps_reduce_the_loss(dtype):
    target = normal(2, 100, 4, 64, seed=6)
    for way in {PLANNED, *ways(dtype, 64)}:
        weights = [x.float().requires_grad_() for x in make_qkv(2, 100, 100, 4, 2, 64, seed=5)]
        optimizer = torch.optim.Adam(weights, lr=0.05)
        losses = []
        with way.used():
            for _ in range(30):
                out = topk_attn.topk_attn_func(*(x.to(dtype) for x in weights), topk=6)
                loss = (out.float() - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], f"{way}: {losses[0]} to {losses[-1]}"
