"""Inputs and comparisons shared by the operator tests."""

from __future__ import annotations

import math

import oracle
import torch
from oracle import Settings

import topk_attn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Largest difference allowed, relative to the largest finite magnitude of the expected tensor (at least 1).
FORWARD_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 4.5e-3, torch.float16: 6e-4}
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------
# Inputs
# ------------------------------------------------------------------------------------------------------------


def normal(*shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_qkv(b, tq, tk, h, hkv, d, dv=None, dtype=torch.float32, seed=0, kind="normal"):
    """q (b,tq,h,d), k (b,tk,hkv,d), v (b,tk,hkv,dv). Other kinds than normal stress the order."""
    dv = d if dv is None else dv
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = rand(b, tq, h, d), rand(b, tk, hkv, d), rand(b, tk, hkv, dv)
    if kind == "permuted":
        # A constant query against channel permutations of one vector: equal in exact arithmetic, so rounding
        # alone decides the order.
        q = torch.full_like(q, 1.0)
        one = rand(d)
        order = torch.argsort(torch.rand(b, tk, hkv, d, generator=g), dim=-1)
        k = one[order]
    elif kind == "mixed":
        q = q * torch.exp2(torch.randint(-6, 7, q.shape, generator=g).double())
        k = k * torch.exp2(torch.randint(-6, 7, k.shape, generator=g).double())
    elif kind == "two_values":
        q = torch.ones_like(q)
        k = (
            torch.where(torch.rand(b, tk, hkv, 1, generator=g) < 0.5, 1.0, -1.0)
            .expand(b, tk, hkv, d)
            .contiguous()
        )
    elif kind == "equal":
        k = k[:, :1].expand(b, tk, hkv, d).contiguous()
    elif kind == "duplicated":
        k = k[:, torch.arange(tk) // 2]
    elif kind == "integers":
        q = torch.randint(-1, 2, q.shape, generator=g).double()
        k = torch.randint(-1, 2, k.shape, generator=g).double()
    elif kind == "zeros":
        # Scores of both signs of zero.
        q = torch.zeros_like(q)
    elif kind != "normal":
        raise ValueError(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


ORDER_KINDS = ("normal", "permuted", "mixed", "two_values", "equal", "duplicated", "integers", "zeros")


# ------------------------------------------------------------------------------------------------------------
# Comparisons
# ------------------------------------------------------------------------------------------------------------


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Same shape, NaN and infinities in the same places, the rest within tolerance of the expected scale."""
    assert tuple(actual.shape) == tuple(expected.shape), f"{what}: shape {tuple(actual.shape)}"
    a, e = actual.detach().double(), expected.double()
    assert torch.equal(a.isnan(), e.isnan()), f"{what}: NaN at {first_difference(a.isnan(), e.isnan())}"
    infinite = e.isinf()
    assert torch.equal(a.isinf(), infinite), f"{what}: infinity at {first_difference(a.isinf(), infinite)}"
    assert torch.equal(a[infinite], e[infinite]), f"{what}: sign of an infinity"
    finite = e.isfinite()
    if not finite.any():
        return
    scale = max(1.0, float(e[finite].abs().max()))
    error = torch.where(finite, (a - e).abs(), torch.zeros_like(e))
    worst = float(error.max())
    assert worst <= tolerance * scale, (
        f"{what}: error {worst:.3e} > {tolerance:.1e} * {scale:.3g} at {unravel(error.argmax(), error.shape)}"
    )


def unravel(flat, shape) -> tuple[int, ...]:
    return tuple(int(x) for x in torch.unravel_index(torch.as_tensor(flat), shape))


def first_difference(a: torch.Tensor, b: torch.Tensor) -> str:
    bad = (a != b).nonzero()
    return f"{bad[0].tolist()} ({len(bad)} places)" if len(bad) else "none"


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bitwise equality of values and shape (NaN equals NaN)."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} != {expected.dtype}"
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    )
    if actual.is_floating_point():
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        actual, expected = actual.contiguous().view(kind), expected.contiguous().view(kind)
    assert torch.equal(actual, expected), f"{what}: differs at {first_difference(actual, expected)}"


def assert_encoding(threshold, tie_index, expected, dtype, what="encoding") -> None:
    """threshold and tie_index bit for bit against the oracle (+0 for zeros, NaN for NaN, -1 for nothing)."""
    assert threshold.dtype == accumulate_dtype(dtype) and tie_index.dtype == torch.int32
    want = expected.threshold.to(threshold.dtype)
    assert torch.equal(tie_index.long(), expected.tie_index.long()), (
        f"{what}: tie_index at {first_difference(tie_index.long(), expected.tie_index.long())}"
    )
    same = (threshold == want) | (threshold.isnan() & want.isnan())
    assert bool(same.all()), f"{what}: threshold at {first_difference(same, torch.ones_like(same))}"
    assert not bool((threshold == 0).logical_and(torch.signbit(threshold)).any()), f"{what}: threshold is -0"


def width_of(s: Settings, n: int) -> int:
    return oracle.budget(n, s)


def check_forward(q, k, v, s: Settings) -> oracle.Result:
    """topk_attn_func and topk_select against the oracle: sets and encoding exactly, outputs nearly."""
    dtype = q.dtype
    expected = oracle.attention(q, k, v, s)
    out, lse = topk_attn.topk_attn_func(q, k, v, **s.kwargs(), return_lse=True)
    assert out.dtype == dtype and lse.dtype == accumulate_dtype(dtype)
    threshold, tie_index, indices = topk_attn.topk_select(q, k, **selection_kwargs(s), return_indices=True)
    assert_encoding(threshold, tie_index, expected, dtype, "topk_select")
    assert indices.dtype == torch.int32
    want = oracle.index_lists(expected.kept, width_of(s, k.shape[1]))
    assert_same(indices, want, "indices")
    assert_close(out, expected.out, FORWARD_TOLERANCE[dtype], "out")
    assert_close(lse, expected.lse, FORWARD_TOLERANCE[accumulate_dtype(dtype)], "lse")
    return expected


def check_gradients(q, k, v, s: Settings, *, with_lse=True, seed=7) -> oracle.Result:
    """Gradients of a random linear function of out (and lse) against the oracle's formulas."""
    dtype = q.dtype
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = topk_attn.topk_attn_func(q, k, v, **s.kwargs(), return_lse=True)
    dout = normal(*out.shape, dtype=dtype, seed=seed)
    dlse = normal(*lse.shape, dtype=lse.dtype, seed=seed + 1) if with_lse else None
    outputs, weights = ([out, lse], [dout, dlse]) if with_lse else ([out], [dout])
    if with_lse:
        # A row without keys has lse = -inf, a constant: its gradient is zero whatever arrives.
        assert not lse.isnan().any()
    torch.autograd.backward(outputs, weights)
    expected = oracle.attention(q, k, v, s, dout=dout, dlse=dlse)
    for name, x, want in (("dq", q, expected.dq), ("dk", k, expected.dk), ("dv", v, expected.dv)):
        assert x.grad.dtype == dtype
        assert_close(x.grad, want, GRADIENT_TOLERANCE[dtype], name)
    assert_never_kept_is_zero(k.grad, v.grad, expected.kept)
    return expected


def assert_never_kept_is_zero(dk, dv, kept) -> None:
    """Exactly zero dK and dV for keys that no query of the KV head's group kept. kept (B,H,Tq,Tk)."""
    b, h, _, tk = kept.shape
    hkv = dk.shape[2]
    used = kept.any(dim=2).reshape(b, hkv, h // hkv, tk).any(dim=2).transpose(1, 2)  # (B, Tk, Hkv)
    assert bool((dk[~used] == 0).all()) and bool((dv[~used] == 0).all()), "gradient of a key that nobody kept"


def selection_kwargs(s: Settings) -> dict:
    """The arguments that topk_select takes."""
    return {name: value for name, value in s.kwargs().items() if name != "softmax_scale"}


# ------------------------------------------------------------------------------------------------------------
# What a path really used
# ------------------------------------------------------------------------------------------------------------

# So small that every kept key keeps a probability far from zero; the scale never changes the order.
FLAT_SCALE = 1e-4


def identity_values(b, tk, hkv, dtype, first, width) -> torch.Tensor:
    """v (b, tk, hkv, width), row j the unit vector j - first: out then holds the keys' probabilities."""
    v = torch.zeros(b, tk, hkv, width, dtype=dtype)
    for j in range(first, min(tk, first + width)):
        v[:, j, :, j - first] = 1
    return v


def used_sets(attend, b, tk, hkv, dtype) -> torch.Tensor:
    """The set a call of attend(v) -> out (B,Tq,H,Dv) really gave weight to: (B,H,Tq,tk) bool."""
    blocks = []
    for first in range(0, tk, 256):
        width = min(256, (tk - first + 7) // 8 * 8)
        out = attend(identity_values(b, tk, hkv, dtype, first, width))
        blocks.append((out != 0).permute(0, 2, 1, 3))
    return torch.cat(blocks, dim=-1)[..., :tk]


def kernel_scores(q, k) -> torch.Tensor:
    """The library's own raw scores (B,H,Tq,Tk): with one visible key, the threshold is that key's score."""
    b, tq, h, d = q.shape
    tk, hkv = k.shape[1], k.shape[2]
    rows = q.unsqueeze(1).expand(b, tk, tq, h, d).reshape(b * tk, tq, h, d)
    keys = k.reshape(b * tk, 1, hkv, d)
    threshold, _ = topk_attn.topk_select(rows, keys, causal=False, topk=1)
    return threshold.reshape(b, tk, h, tq).permute(0, 2, 3, 1)


def bottom_right_mask(tq, tk) -> torch.Tensor:
    i = torch.arange(tq).unsqueeze(1)
    return torch.arange(tk) <= i + (tk - tq)


def default_scale(d: int) -> float:
    return 1.0 / math.sqrt(d)
