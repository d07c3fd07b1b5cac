"""The oracle itself: it must be right before anything is compared with it."""

import ctypes
import ctypes.util
import math
import random

import numpy as np
import oracle
import pytest
import torch
from oracle import Settings

libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
libm.fmaf.restype = ctypes.c_float
libm.fmaf.argtypes = [ctypes.c_float] * 3
libm.fma.restype = ctypes.c_double
libm.fma.argtypes = [ctypes.c_double] * 3


def hard_floats(count, seed, dtype):
    """Random values over a wide range of exponents, with cancellation and halfway cases among them."""
    rng = np.random.default_rng(seed)
    span = 60 if dtype == np.float32 else 200
    x = rng.standard_normal(count) * 2.0 ** rng.integers(-span, span, count)
    short = rng.random(count) < 0.5
    x[short] = rng.integers(-(2**13), 2**13, short.sum()) * 2.0 ** rng.integers(-14, 14, short.sum())
    return x.astype(dtype).astype(np.float64)


@pytest.mark.parametrize(
    "dtype,emulated,exact", [(np.float32, oracle._fma32, libm.fmaf), (np.float64, oracle._fma64, libm.fma)]
)
def test_fma_is_exact(dtype, emulated, exact):
    a, b, c = (hard_floats(20000, seed, dtype) for seed in (1, 2, 3))
    # Half of the addends nearly cancel the product, or sit half a unit in the last place away from it.
    near = (a * b).astype(dtype).astype(np.float64)
    c = np.where(np.arange(len(c)) % 4 == 1, -near, c)
    c = np.where(np.arange(len(c)) % 4 == 2, near * 2.0**24, c)
    finite = np.isfinite(c)
    a, b, c = a[finite], b[finite], c[finite]
    with np.errstate(all="ignore"):
        got = emulated(a, b, c)
    want = np.array([exact(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])
    assert np.array_equal(got, want, equal_nan=True)


def test_fma_special_values():
    a = np.array([np.inf, np.inf, 0.0, np.nan, 1.0, -1.0, 3e38])
    b = np.array([1.0, 0.0, np.inf, 1.0, 0.0, 0.0, 3e38])
    c = np.array([-np.inf, 1.0, 1.0, 1.0, np.inf, 0.0, 0.0])
    with np.errstate(all="ignore"):
        got = oracle._fma32(a, b, c)
    assert np.array_equal(got, [np.nan, np.nan, np.nan, np.nan, np.inf, 0.0, np.inf], equal_nan=True)


def test_budget_of_the_contract():
    assert oracle.budget(100, Settings(ratio=0.07)) == 7
    assert oracle.budget(0, Settings(topk=5)) == 0
    assert oracle.budget(3, Settings(topk=5)) == 3
    assert oracle.budget(1000, Settings(ratio=0.01, min_keys=32)) == 32
    assert oracle.budget(10, Settings(ratio=0.01, min_keys=32)) == 10
    assert oracle.budget(1000, Settings(ratio=1.0, max_keys=8)) == 8
    assert oracle.budget(1, Settings(ratio=1e-12)) == 1


def test_order_of_the_contract():
    scores = np.array([1.0, math.nan, -math.inf, 0.0, -0.0, math.nan, math.inf, 1.0])
    assert oracle.ordered(scores, list(range(8))) == [1, 5, 6, 0, 7, 3, 4, 2]


def test_always_kept_keys():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    seen = list(range(5))
    assert oracle.select_row(scores, seen, Settings(topk=3, sink=1, recent=1)) == ([0, 3, 4], 3.0, 3)
    kept, threshold, tie = oracle.select_row(scores, seen, Settings(topk=2, sink=1, recent=4))
    assert kept == [0, 4] and math.isnan(threshold) and tie == -1
    assert oracle.select_row(scores, seen, Settings(topk=2, sink=9))[0] == [0, 1]
    assert oracle.select_row(scores, seen, Settings(topk=5, sink=3, recent=3))[0] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("h,hkv", [(2, 2), (4, 2), (3, 1)])
def test_full_budget_is_dense_attention(causal, h, hkv):
    g = torch.Generator().manual_seed(3)
    tq, tk, d, dv = 5, 9, 8, 16
    q, k = torch.randn(2, tq, h, d, generator=g).double(), torch.randn(2, tk, hkv, d, generator=g).double()
    v = torch.randn(2, tk, hkv, dv, generator=g).double()
    dout = torch.randn(2, tq, h, dv, generator=g).double()
    dlse = torch.randn(2, h, tq, generator=g).double()
    got = oracle.attention(q, k, v, Settings(ratio=1.0, causal=causal), dout=dout, dlse=dlse)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    kk, vv = k.repeat_interleave(h // hkv, 2), v.repeat_interleave(h // hkv, 2)
    z = torch.einsum("bihd,bjhd->bhij", q, kk) / math.sqrt(d)
    if causal:
        i, j = torch.arange(tq)[:, None], torch.arange(tk)
        z = z.masked_fill(j > i + tk - tq, -math.inf)
    out = torch.einsum("bhij,bjhd->bihd", z.softmax(-1), vv)
    lse = z.logsumexp(-1)
    (out * dout).sum().add((lse * dlse).sum()).backward()
    for a, b in ((got.out, out), (got.lse, lse), (got.dq, q.grad), (got.dk, k.grad), (got.dv, v.grad)):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


def test_encoding_stands_for_the_kept_set():
    rng = random.Random(5)
    values = [-1.0, 0.0, -0.0, 1.0, 2.0, math.nan, math.inf, -math.inf]
    for _ in range(300):
        tq, tk = rng.randint(1, 4), rng.randint(1, 9)
        scores = np.array([[[rng.choice(values) for _ in range(tk)] for _ in range(tq)]])
        s = Settings(
            causal=rng.random() < 0.5,
            topk=rng.randint(1, 10),
            sink=rng.choice([0, 1, 3]),
            recent=rng.choice([0, 2, 20]),
        )
        pad = rng.choice([0, 0, min(2, tk)])
        kept, threshold, tie = oracle.select_sequence(scores, 1, s, pad)
        again = oracle.decode_encoding(scores, threshold, tie, s, pad)
        assert np.array_equal(again.numpy(), kept)


def test_mask_and_lists_are_inverse():
    kept = torch.rand(2, 3, 11) < 0.4
    assert torch.equal(oracle.mask_of(oracle.index_lists(kept, 11), 11), kept)
