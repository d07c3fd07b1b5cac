"""Inputs, builds and comparisons of the CUDA operator tests."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass

import cuda_reference as reference
import op_helpers
import pytest
import torch
from op_helpers import assert_same, first_difference, selection_kwargs
from oracle import Settings

import topk_attn

DEVICE = torch.device(os.environ.get("TOPK_TEST_DEVICE") or "cuda")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
ERRORS = (RuntimeError, ValueError, TypeError, IndexError)
# What the forward leaves for the backward, as autograd asks for it on CUDA.
KEPT = {"kept": "tiles"} if DEVICE.type == "cuda" else {}

# ------------------------------------------------------------------------------------------------------------
# Builds and regimes
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A build of the kernels and how its query tiles are shared between the regimes; None: as planned.

    largest_share = 0 sends every tile through the masked dense kernels, 1 through the gathered ones.
    """

    build: str | None = None
    largest_share: float | None = None

    def __str__(self) -> str:
        share = {None: "", 0.0: "-masked", 1.0: "-gathered"}.get(
            self.largest_share, f"-share{self.largest_share}"
        )
        return (self.build or "planned") + share

    @contextlib.contextmanager
    def used(self, check: bool = True):
        """Calls inside run this way, or raise. On the CPU there is one way only. `check` is False where the
        last call may have nothing to do and plan nothing."""
        if DEVICE.type != "cuda":
            yield
            return
        changes = {name: value for name, value in vars(self).items() if value is not None}
        with topk_attn.cuda.override(**changes):
            _ways.append(self)
            depth = len(_ways)
            _strayed.discard(depth)
            try:
                yield
            finally:
                _ways.pop()
            if check and self.build is not None and depth not in _strayed:
                ran = topk_attn.cuda.last_plan().build
                assert ran == self.build, f"asked for build {self.build}, {ran} ran"


PLANNED = Way()
_ways: list[Way] = [PLANNED]
_strayed: set[int] = set()  # depths of _ways at which a call was served by another build


@contextlib.contextmanager
def served(select: str):
    """Inside Way.used(): build sm90 has no group selection, so such calls run as planned."""
    if DEVICE.type != "cuda" or select != "kv_group" or _ways[-1].build != "sm90":
        yield
        return
    with topk_attn.cuda.override():
        yield
    _strayed.add(len(_ways))


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def builds(dtype: torch.dtype, head_dim: int, v_dim: int | None = None) -> list[str]:
    """Builds that must support these inputs on this card. TOPK_TEST_BUILDS names those to keep."""
    v_dim = head_dim if v_dim is None else v_dim
    if DEVICE.type != "cuda":
        return []
    if dtype == F32:
        found = ["plain"]
    else:
        found = ["portable"]
        if capability() == (9, 0) and head_dim in (64, 128) and v_dim == head_dim:
            found.append("sm90")
    wanted = os.environ.get("TOPK_TEST_BUILDS")
    return [b for b in found if wanted is None or b in wanted.split(",")]


def ways(dtype: torch.dtype, head_dim: int, v_dim: int | None = None, regimes: bool = True) -> list[Way]:
    """Every build, with `regimes` sm90 in either regime and in its own mix of both; the planned way where no
    build must support the inputs."""
    found = []
    for build in builds(dtype, head_dim, v_dim):
        found.append(Way(build))
        if build == "sm90" and regimes:
            found += [Way(build, 0.0), Way(build, 1.0)]
    return found or [PLANNED]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def every_way(dtypes=DTYPES, dims=(64, 128), regimes=True):
    """pytest's parameters (dtype, d, way)."""
    return pytest.mark.parametrize(
        "dtype,d,way",
        [
            pytest.param(dtype, d, way, id=f"{name_of(dtype)}-{d}-{way}")
            for dtype in dtypes
            for d in dims
            for way in ways(dtype, d, regimes=regimes)
        ],
    )


# ------------------------------------------------------------------------------------------------------------
# Inputs
# ------------------------------------------------------------------------------------------------------------


def permuted_keys(k: torch.Tensor, seed: int) -> torch.Tensor:
    """Channel permutations of one vector whose exponents span 2^-6 to 2^6: without that span, sums of bf16
    values are exact in float32 and every order of additions gives the same score."""
    g = torch.Generator().manual_seed(seed)
    d = k.shape[-1]
    one = torch.randn(d, generator=g, dtype=torch.float64) * torch.exp2(
        torch.randint(-6, 7, (d,), generator=g)
    )
    order = torch.rand(k.shape, generator=g).argsort(-1)
    return one.to(k.dtype)[order]


def make_qkv(*args, **kwargs):
    """op_helpers.make_qkv, a harder kind="permuted" and kind="clustered", on the device under test."""
    kind = kwargs.get("kind")
    if kind in ("clustered", "half clustered"):
        kwargs["kind"] = "normal"
    q, k, v = op_helpers.make_qkv(*args, **kwargs)
    if kind == "permuted":
        # A constant whose products with bf16 values have 16 bits.
        q, k = torch.full_like(q, 171 / 128), permuted_keys(k, kwargs.get("seed", 0))
    if kind in ("clustered", "half clustered"):
        # Rows of 64 share a direction, so together they keep few keys; "half": every other tile does.
        tq = q.shape[1]
        tile = torch.arange(tq) // 64
        noise = 0.05 * q.double()
        shared = q[:, tile * 64].double() + noise
        follow = (tile % 2 == 0) if kind == "half clustered" else torch.ones(tq, dtype=torch.bool)
        q = torch.where(follow[None, :, None, None], shared, q.double()).to(q.dtype)
    return tuple(x.to(DEVICE) for x in (q, k, v))


def normal(*shape, dtype=F32, seed=0):
    return op_helpers.normal(*shape, dtype=dtype, seed=seed).to(DEVICE)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def bounds(lengths) -> torch.Tensor:
    return int32(0, *torch.tensor(lengths).cumsum(0).tolist())


def flat_scale(kind: str) -> float:
    """A softmax scale at which every kept key keeps a probability that the dtype can hold."""
    return 1e-7 if kind == "mixed" else 1e-3


def poison_free_memory() -> None:
    """Fills memory that the allocator will hand out next with NaN, so that unwritten results show."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    held = [torch.full((2**p,), math.nan, device=DEVICE) for p in range(7, 24) for _ in range(6)]
    del held


# ------------------------------------------------------------------------------------------------------------
# Selection
# ------------------------------------------------------------------------------------------------------------


def own_scores(q, k) -> torch.Tensor:
    """The kernels' own raw scores (B,H,Tq,Tk), a column at a time: the only visible key's score is the row's
    threshold. Zeros come out as +0 and NaNs as one NaN."""
    return op_helpers.kernel_scores(q, k)


def ranked_scores(q, k, causal=False) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, found): raw scores (B,H,Tq,Tk) read out of whole rows, key by key in the kernels' own order:
    the last of the first w keys is (threshold, tie_index). `found` (B,H,Tq,Tk): the key turned up."""
    b, tq, h, _ = q.shape
    tk = k.shape[1]
    scores = torch.full((b, h, tq, tk), math.nan, device=q.device)
    found = torch.zeros(b, h, tq, tk, dtype=torch.int32, device=q.device)
    for w in range(1, tk + 1):
        threshold, tie_index = topk_attn.topk_select(q, k, causal=causal, topk=w)
        at = tie_index.long().clamp(min=0)[..., None]
        scores.scatter_(-1, at, threshold[..., None])
        found.scatter_(-1, at, 1)
    return scores, found.bool()


def assert_encoding(threshold, tie_index, want: reference.Selected, what="encoding") -> None:
    """Bit for bit (+0 for zeros, one NaN, -1 for nothing)."""
    assert threshold.dtype == F32 and tie_index.dtype == torch.int32
    assert_same(tie_index, want.tie_index, f"{what}: tie_index")
    quiet = torch.full_like(want.threshold, math.nan)
    assert_same(threshold, torch.where(want.threshold.isnan(), quiet, want.threshold), f"{what}: threshold")


def check_selection(q, k, s: Settings, scores=None) -> reference.Selected:
    """topk_select, with and without lists, against the reference fed with the kernels' own scores."""
    scores = own_scores(q, k) if scores is None else scores
    want = reference.select(scores, k.shape[2], s)
    kw = selection_kwargs(s)
    with served(s.select):
        threshold, tie_index, indices = topk_attn.topk_select(q, k, **kw, return_indices=True)
        without = topk_attn.topk_select(q, k, **kw)  # may be another kernel
    assert_encoding(threshold, tie_index, want, "with lists")
    lists = reference.index_lists(want.kept, reference.budget(k.shape[1], s))
    assert_same(indices, lists, "indices")
    assert_encoding(*without, want, "without lists")
    return want


def kept_mask(q, k, s: Settings) -> torch.Tensor:
    """The operator's own set (B,H,Tq,Tk)."""
    with served(s.select):
        indices = topk_attn.topk_select(q, k, **selection_kwargs(s), return_indices=True)[2]
    return reference.mask_of(indices, k.shape[1])


# ------------------------------------------------------------------------------------------------------------
# The sets that the kernels really used
# ------------------------------------------------------------------------------------------------------------


def used_by_forward(attend, b, tk, hkv, v_dim, dtype) -> torch.Tensor:
    """Keys that attend(v) -> out gave weight to, (B,H,Tq,Tk): one-hot V, in blocks of v_dim keys."""
    blocks = []
    for first in range(0, tk, v_dim):
        v = torch.zeros(b, tk, hkv, v_dim, dtype=dtype, device=DEVICE)
        at = torch.arange(min(v_dim, tk - first), device=DEVICE)
        v[:, first + at, :, at] = 1
        out = attend(v)
        assert not out.isnan().any()
        blocks.append((out != 0).permute(0, 2, 1, 3))
    return torch.cat(blocks, dim=-1)[..., :tk]


def used_by_backward(q, k, v, **kw) -> torch.Tensor:
    """Keys whose dV row i reaches, (B,H,Tq,Tk): one-hot dO, in blocks of Dv rows, one head of a group at a
    time."""
    b, tq, h, _ = q.shape
    tk, hkv, v_dim = v.shape[1:]
    group = h // hkv
    used = torch.zeros(b, h, tq, tk, dtype=torch.bool, device=DEVICE)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = topk_attn.topk_attn_func(q, k, v, **kw)
    for first in range(0, tq, v_dim):
        at = torch.arange(min(v_dim, tq - first), device=DEVICE)
        for member in range(group):
            dout = torch.zeros_like(out)
            dout[:, first + at, member::group, at] = 1
            (dv,) = torch.autograd.grad(out, v, dout, retain_graph=True)
            assert not dv.isnan().any()
            used[:, member::group, first + at] = (dv != 0).permute(0, 2, 3, 1)[:, :, at]
    return used


# ------------------------------------------------------------------------------------------------------------
# Errors of outputs
# ------------------------------------------------------------------------------------------------------------

# Added to twice the error of the dense reference: relative to the largest expected magnitude, and the
# rounding of the result itself, relative to its own.
FLOOR = {BF16: 1e-4, F16: 2e-5, F32: 5e-6}
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}
RESULTS = reference.Attended._fields


def assert_twice_dense(actual, dense, exact, dtype, what: str) -> None:
    """The largest error is at most twice that of the dense reference of the same dtype."""
    assert tuple(actual.shape) == tuple(exact.shape), f"{what}: shape {tuple(actual.shape)}"
    if not actual.numel():
        return
    assert actual.isfinite().all(), f"{what}: not finite at {first_difference(actual.isfinite(), True)}"
    error = (actual.double() - exact).abs() - ROUNDING[dtype] * exact.abs()
    largest = float(exact.abs().max())
    allowed = 2 * float((dense.double() - exact).abs().max()) + FLOOR[dtype] * largest
    # What is zero but for rounding (dQ and dK of rows that keep one key) is a difference of terms of order 1.
    allowed += FLOOR[F32] * max(0.0, 1.0 - largest)
    worst, at = float(error.max()), op_helpers.unravel(error.argmax().cpu(), error.shape)
    assert worst <= allowed, f"{what}: error {worst:.3e} > {allowed:.3e} at {at}"


def assert_lse(actual, exact, what="lse") -> None:
    """-inf in the same places, the rest within float32 rounding of scores and exponentials."""
    assert actual.dtype == F32
    nothing = exact == -math.inf
    assert torch.equal(actual == -math.inf, nothing), (
        f"{what}: -inf at {first_difference(actual == -math.inf, nothing)}"
    )
    expected = exact.masked_fill(nothing, 0)
    error = (actual.double().masked_fill(nothing, 0) - expected).abs()
    assert bool((error <= 2e-5 * (1 + expected.abs())).all()), f"{what}: error {float(error.max()):.3e}"


def check_attention(q, k, v, s: Settings, *, gradients=True, with_lse=True, seed=7, **kw):
    """Forward and backward over the operator's own set, against float64. Returns (kept, results)."""
    dtype = q.dtype
    kept = kept_mask(q, k, s)
    q, k, v = (x.detach().requires_grad_(gradients) for x in (q, k, v))
    dout = dlse = None
    with served(s.select):
        out, lse = topk_attn.topk_attn_func(q, k, v, **s.kwargs(), **kw, return_lse=True)
        assert out.dtype == dtype and out.is_contiguous()
        results = [out.detach(), lse.detach()]
        if gradients:
            dout = normal(*out.shape, dtype=dtype, seed=seed)
            dlse = normal(*lse.shape, seed=seed + 1) if with_lse else None
            targets, weights = ([out, lse], [dout, dlse]) if with_lse else ([out], [dout])
            results += torch.autograd.grad(targets, (q, k, v), weights)
    with torch.no_grad():
        inputs = (q, k, v, kept, s.scale(q.shape[-1]), dout, dlse)
        exact, dense = reference.exact(*inputs), reference.dense(*inputs)
    assert_lse(results[1], exact.lse)
    for name, got, near, want in zip(RESULTS, results, dense, exact, strict=False):
        if name != "lse":
            assert_twice_dense(got, near, want, dtype, name)
    if gradients:
        assert all(x.dtype == dtype for x in results[2:])
        op_helpers.assert_never_kept_is_zero(results[3], results[4], kept)
    return kept, results


# ------------------------------------------------------------------------------------------------------------
# Errors that are raised
# ------------------------------------------------------------------------------------------------------------


def refuses(call, *words) -> None:
    """The call raises, and the message holds every word; `a|b` are alternatives."""
    with pytest.raises(ERRORS) as info:
        call()
    message = str(info.value).split("Exception raised from")[0].lower()
    for word in words:
        assert any(w.lower() in message for w in word.split("|")), f"{word!r} is missing in: {message}"
    assert "internal assert" not in message, message
