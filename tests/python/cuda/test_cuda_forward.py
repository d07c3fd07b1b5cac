"""The forward on CUDA: errors against float64, regimes, packs, memory layouts, offsets beyond 2^31 elements.

Shapes, heads, lengths and settings are in test_cuda_backward.py, which checks outputs and gradients together.
"""

import math

import cuda_reference as reference
import op_helpers
import pytest
import torch
import torch.nn.functional as F
from cuda_helpers import (
    BF16,
    DEVICE,
    DTYPES,
    F16,
    F32,
    PLANNED,
    Way,
    assert_lse,
    assert_twice_dense,
    bounds,
    builds,
    check_attention,
    every_way,
    kept_mask,
    make_qkv,
    poison_free_memory,
    served,
    ways,
)
from op_helpers import ORDER_KINDS, assert_same
from oracle import Settings

import topk_attn

HEAD_DIMS = (8, 64, 72, 80, 96, 128, 192, 256)


def forward(q, k, v, s: Settings, **kw):
    check_attention(q, k, v, s, gradients=False, **kw)


@every_way(dims=HEAD_DIMS)
def test_head_dims(dtype, d, way):
    q, k, v = make_qkv(2, 150, 200, 4, 2, d, dtype=dtype, seed=d)
    with way.used():
        forward(q, k, v, Settings(topk=20))
        forward(q, k, v, Settings(ratio=0.3, causal=False))


@every_way()
@pytest.mark.parametrize("kind", [*ORDER_KINDS, "clustered", "half clustered"])
def test_hard_orders(dtype, d, way, kind):
    q, k, v = make_qkv(1, 320, 400, 4, 2, d, dtype=dtype, seed=11, kind=kind)
    scale = 1e-4 if kind == "mixed" else None
    with way.used():
        forward(q, k, v, Settings(topk=9, softmax_scale=scale))
        forward(q, k, v, Settings(ratio=0.5, select="kv_group", causal=False, softmax_scale=scale))


@pytest.mark.parametrize("dtype", (BF16, F16))
@pytest.mark.parametrize("d", (64, 128))
def test_regimes_mixed_in_one_sequence(gpu, dtype, d):
    """Tiles of small and of large unions side by side, with the border between the regimes amid them."""
    if "sm90" not in builds(dtype, d):
        pytest.skip("one regime only")
    q, k, v = make_qkv(1, 1024, 1024, 2, 1, d, dtype=dtype, seed=3, kind="half clustered")
    s = Settings(topk=12, causal=False)
    kept = kept_mask(q, k, s)
    shares = kept.unflatten(2, (16, 64)).any(3).float().mean(-1)
    border = float(shares.flatten().median())
    assert shares[..., 0::2].max() < border + 0.05 < shares[..., 1::2].min() + 0.1, shares
    for share in (border, border / 2, 0.9, None):
        with Way("sm90", share).used():
            check_attention(q, k, v, s)
            check_attention(q, k, v, s, deterministic=True)


# ------------------------------------------------------------------------------------------------------------
# Packs
# ------------------------------------------------------------------------------------------------------------


@every_way()
@pytest.mark.parametrize("causal", [True, False])
def test_packs(dtype, d, way, causal):
    for lq, lk in (
        ([0, 5], [0, 5]),
        ([0, 0, 3, 0], [0, 0, 3, 0]),
        ([1, 1, 1], [10, 0, 133]),
        ([3, 70, 0, 2], [90, 40, 5, 0]),
        ([64, 1, 128, 63, 257], [64, 1, 128, 63, 257]),
        ([200, 4], [3, 150]),
    ):
        for select in ("head", "kv_group"):
            with way.used():
                check_pack(lq, lk, Settings(topk=5, causal=causal, select=select), dtype, d)


@every_way()
def test_pack_of_one_document(dtype, d, way):
    """One document has unused query tiles beside it: no head may be dropped with them."""
    for n in (1, 64, 65, 200):
        for heads, kv_heads in ((3, 3), (4, 2), (8, 1)):
            q, k, v = make_qkv(1, n, n, heads, kv_heads, d, dtype=dtype, seed=n)
            with way.used():
                alone = topk_attn.topk_attn_func(q, k, v, topk=9, return_lse=True)
                packed = topk_attn.topk_attn_varlen_func(
                    q[0], k[0], v[0], bounds([n]), bounds([n]), n, n, topk=9, return_lse=True
                )
            torch.testing.assert_close(packed[0], alone[0][0], rtol=2e-2, atol=2e-3)
            torch.testing.assert_close(packed[1], alone[1][0], rtol=1e-5, atol=1e-5)


def check_pack(lq, lk, s: Settings, dtype, d):
    """Each document's output against float64, whatever memory held before."""
    q, k, v = make_qkv(1, sum(lq), sum(lk), 4, 2, d, dtype=dtype, seed=len(lq))
    args = (bounds(lq), bounds(lk), max(lq), max(lk))
    poison_free_memory()
    with served(s.select):
        out, lse = topk_attn.topk_attn_varlen_func(q[0], k[0], v[0], *args, **s.kwargs(), return_lse=True)
    row = key = 0
    for tq, tk in zip(lq, lk, strict=True):
        rows, keys = slice(row, row + tq), slice(key, key + tk)
        row, key = row + tq, key + tk
        if not tq:
            continue
        if not tk:
            assert bool((out[rows] == 0).all()) and bool((lse[:, rows] == -math.inf).all())
            continue
        document = q[:, rows], k[:, keys], v[:, keys]
        inputs = (*document, kept_mask(*document[:2], s), s.scale(d))
        exact, near = reference.exact(*inputs), reference.dense(*inputs)
        assert_twice_dense(out[None, rows], near.out, exact.out, dtype, f"document of {tq} and {tk}")
        assert_lse(lse[None, :, rows], exact.lse)


# ------------------------------------------------------------------------------------------------------------
# Layouts
# ------------------------------------------------------------------------------------------------------------


def strided_forms(x):
    """The same values in memory laid out in other ways; the last dimension stays contiguous."""
    b, t, h, d = x.shape

    def empty(*shape):
        return torch.full(shape, math.nan, dtype=x.dtype, device=x.device)

    wide, odd_wide = empty(b, t, h, d + 8), empty(b, t, h, d + 3)
    wide[..., :d], odd_wide[..., :d] = x, x
    gaps = empty(b, 2 * t, h, d)
    gaps[:, ::2] = x
    fused = empty(b, t, 3, h, d)
    fused[:, :, 1] = x
    offset = empty(x.numel() + 3)
    offset[3:] = x.flatten()
    return {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced head_dim": wide[..., :d],
        "odd row stride": odd_wide[..., :d],
        "every other row": gaps[:, ::2],
        "fused qkv": fused[:, :, 1],
        "odd offset": offset[3:].view(b, t, h, d),
    }


@every_way()
def test_strided_inputs_give_the_same_bits(dtype, d, way):
    q, k, v = make_qkv(2, 140, 180, 4, 2, d, dtype=dtype, seed=6)
    s = dict(topk=15, return_lse=True)
    with way.used():
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_projection(dtype):
    """q, k and v as slices of one (B, T, (H + 2 Hkv) * D) projection, dense and packed."""
    h, hkv, d = 6, 2, 64
    fused = op_helpers.normal(2, 150, (h + 2 * hkv) * d, dtype=dtype).to(DEVICE)
    q, k, v = (
        x.unflatten(-1, (n, d))
        for x, n in zip(fused.split([h * d, hkv * d, hkv * d], -1), (h, hkv, hkv), strict=True)
    )
    assert not q.is_contiguous()
    cu = bounds([150])
    for way in ways(dtype, d):
        with way.used():
            want = topk_attn.topk_attn_func(*(x.contiguous() for x in (q, k, v)), topk=9)
            assert_same(topk_attn.topk_attn_func(q, k, v, topk=9), want, "dense")
            packed = topk_attn.topk_attn_varlen_func(q[1], k[1], v[1], cu, cu, 150, 150, topk=9)
            assert_same(packed, want[1], "packed")


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_inputs(dtype):
    q, k, v = make_qkv(3, 90, 120, 4, 2, 64, dtype=dtype, seed=8)
    for name, args in {
        "batch": [x[:1].expand(3, *x.shape[1:]) for x in (q, k, v)],
        "heads": [x[:, :, :1].expand_as(x) for x in (q, k, v)],
        "keys": [q, k[:, :1].expand_as(k), v],
        "rows": [q[:, :1].expand_as(q), k, v],
    }.items():
        want = topk_attn.topk_attn_func(*(x.contiguous() for x in args), topk=13)
        assert_same(topk_attn.topk_attn_func(*args, topk=13), want, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_ratio_is_dense_attention(dtype):
    q, k, v = make_qkv(2, 200, 200, 6, 2, 64, dtype=dtype, seed=3)
    for way in ways(dtype, 64):
        for causal in (True, False):
            with way.used():
                out = topk_attn.topk_attn_func(q, k, v, causal=causal, ratio=1.0)
            wide = [x.double().transpose(1, 2) for x in (q, k, v)]
            exact = F.scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=True).transpose(1, 2)
            op_helpers.assert_close(out.cpu(), exact.cpu(), op_helpers.FORWARD_TOLERANCE[dtype], "out")


@pytest.mark.parametrize("tq,tk,b", [(0, 5, 2), (5, 0, 2), (0, 0, 1), (4, 4, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_inputs(tq, tk, b, dtype):
    q = torch.zeros(b, tq, 4, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    k = torch.zeros(b, tk, 2, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    out, lse = topk_attn.topk_attn_func(q, k, k, topk=3, return_lse=True)
    assert tuple(out.shape) == (b, tq, 4, 64) and tuple(lse.shape) == (b, 4, tq)
    assert bool((out == 0).all()) and (bool((lse == -math.inf).all()) or tk > 0)
    out.sum().backward()
    assert bool((q.grad == 0).all()) and bool((k.grad == 0).all())


@every_way(dtypes=(BF16, F16, F32), dims=(64,))
def test_unwritten_memory_never_shows(dtype, d, way):
    """Results do not depend on what the memory of outputs and workspaces held before."""
    q, k, v = make_qkv(2, 170, 330, 4, 2, d, dtype=dtype, seed=5)
    with way.used():
        kw = dict(ratio=0.1, deterministic=True, return_lse=True)
        runs = []
        for _ in range(2):
            poison_free_memory()
            args = [x.detach().requires_grad_() for x in (q, k, v)]
            out, lse = topk_attn.topk_attn_func(*args, **kw)
            poison_free_memory()
            runs.append([out.detach(), lse.detach(), *torch.autograd.grad(out.sum(), args)])
    for a, b in zip(*runs, strict=True):
        assert_same(a, b, "repeat")
        assert bool(a.isfinite().all())


def test_large_scores_do_not_overflow_the_softmax():
    for dtype in (BF16, F32):
        q, k, v = make_qkv(1, 100, 120, 2, 1, 64, dtype=dtype, seed=5)
        for way in (PLANNED, *ways(dtype, 64)):
            with way.used():
                q_big, k_big = q * 256, k * 256
                forward(q_big, k_big, v, Settings(topk=1, softmax_scale=1.0))
                out, lse = topk_attn.topk_attn_func(
                    q_big, k_big, v, topk=5, softmax_scale=1.0, return_lse=True
                )
                assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


# ------------------------------------------------------------------------------------------------------------
# Offsets beyond 2^31 elements
# ------------------------------------------------------------------------------------------------------------


def need_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of device memory, {free:.0f} are free")


def spread(storage, x, dim):
    """A copy of x in `storage` whose steps along `dim` span the whole of it, beyond 2^31 elements."""
    strides = list(x.contiguous().stride())
    strides[dim] = (storage.numel() - x.numel()) // max(1, x.shape[dim] - 1) // 8 * 8
    assert strides[dim] * (x.shape[dim] - 1) > 2**31
    view = storage.as_strided(x.shape, strides)
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_far_rows_of_inputs(gpu, dtype):
    need_memory(16)
    storage = torch.empty(5 * 2**29, dtype=dtype, device=DEVICE)
    args = make_qkv(2, 130, 140, 4, 2, 64, dtype=dtype, seed=1)
    dout = make_qkv(2, 130, 140, 4, 2, 64, dtype=dtype, seed=2)[0]

    def run(q, k, v, dout):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out, lse = topk_attn.topk_attn_func(q, k, v, topk=9, deterministic=True, return_lse=True)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    for way in ways(dtype, 64):
        with way.used():
            want = run(*args, dout)
            for which in range(4):
                for dim in (0, 1, 2):
                    changed = [*args, dout]
                    changed[which] = spread(storage, changed[which], dim)
                    for a, b in zip(run(*changed), want, strict=True):
                        assert_same(a.contiguous(), b, f"tensor {which}, dim {dim}")


@pytest.mark.parametrize("tall", ["queries", "keys"])
def test_far_rows_of_outputs(gpu, tall):
    """Outputs and gradients of more than 2^31 elements, periodic along the sequence."""
    need_memory(44)
    heads, d, period, repeats = 128, 128, 64, 2056  # x 64 rows x 128 heads x 128 channels > 2^31
    if tall == "queries":
        q, k, v = make_qkv(1, period, 8, heads, 2, d, dtype=BF16, seed=1)
        q = q.repeat(1, repeats, 1, 1).requires_grad_()
        assert q.numel() > 2**31
        out = topk_attn.topk_attn_func(q, k, v, causal=False, topk=2)
        first = topk_attn.topk_attn_func(q[:, :period].detach(), k, v, causal=False, topk=2)
        assert torch.equal(out[:, -period:], first) and torch.equal(out[:, :period], first)
        (dq,) = torch.autograd.grad(out, q, q.detach()[:, :1].expand_as(out))
        assert torch.equal(dq[:, -period:], dq[:, :period]) and bool((dq[:, -period:] != 0).any())
    else:
        # One row that keeps the last key of all; every other gradient is zero.
        n = period * repeats
        q = torch.ones(1, 1, heads, d, dtype=BF16, device=DEVICE)
        k = torch.zeros(1, n, heads, d, dtype=BF16, device=DEVICE).requires_grad_()
        with torch.no_grad():
            k[:, -1] = 1
        out = topk_attn.topk_attn_func(q, k, k, topk=1)
        assert bool((out == 1).all())
        (dk,) = torch.autograd.grad(out.sum(), k)
        assert bool((dk[:, -1] == 1).all()) and not bool(dk[:, :-1:4097].any())
