"""Packed documents: sets, outputs and gradients per document, empty and one-token documents."""

import math

import oracle
import pytest
import torch
from op_helpers import (
    DTYPES,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    accumulate_dtype,
    assert_close,
    assert_encoding,
    assert_same,
    make_qkv,
    normal,
    selection_kwargs,
)
from oracle import Settings

import topk_attn


def bounds(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def packed_inputs(lq, lk, h, hkv, d, dv=None, dtype=torch.float32, seed=0, kind="normal"):
    q, k, v = make_qkv(1, sum(lq), sum(lk), h, hkv, d, dv, dtype=dtype, seed=seed, kind=kind)
    return q[0], k[0], v[0], bounds(lq), bounds(lk), max(lq), max(lk)


def check_packed(lq, lk, s: Settings, h=4, hkv=2, d=16, dv=None, dtype=torch.float32, kind="normal", extra=0):
    """Forward, selection, indices and gradients of one packed batch; `extra` widens max_seqlen."""
    q, k, v, cu_q, cu_k, mq, mk = packed_inputs(lq, lk, h, hkv, d, dv, dtype, len(lq), kind)
    mq, mk = mq + extra, mk + extra
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = topk_attn.topk_attn_varlen_func(q, k, v, cu_q, cu_k, mq, mk, **s.kwargs(), return_lse=True)
    dout, dlse = normal(*out.shape, dtype=dtype, seed=1), normal(*lse.shape, dtype=lse.dtype, seed=2)
    torch.autograd.backward([out, lse], [dout, dlse])
    want = oracle.varlen(q, k, v, cu_q, cu_k, s, dout=dout, dlse=dlse)
    assert_close(out, want.out, FORWARD_TOLERANCE[dtype], "out")
    assert_close(lse, want.lse, FORWARD_TOLERANCE[accumulate_dtype(dtype)], "lse")
    for name, x, g in (("dq", q, want.dq), ("dk", k, want.dk), ("dv", v, want.dv)):
        assert_close(x.grad, g, GRADIENT_TOLERANCE[dtype], name)
    threshold, tie_index, indices = topk_attn.topk_select(
        q,
        k,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=mq,
        max_seqlen_k=mk,
        **selection_kwargs(s),
        return_indices=True,
    )
    assert_encoding(threshold, tie_index, want, dtype)
    width = oracle.budget(mk, s)
    lists = torch.cat([oracle.index_lists(kept, width) for kept in want.kept], dim=1)
    assert_same(indices, lists, "indices")
    return want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_documents(dtype, causal):
    check_packed([5, 1, 17, 9], [5, 1, 17, 9], Settings(topk=4, causal=causal), dtype=dtype)


@pytest.mark.parametrize("lengths", [[0, 5], [5, 0], [0, 0, 3, 0], [1, 1, 1], [1], [40], [2, 0, 1, 30, 0]])
def test_empty_and_short_documents(lengths):
    check_packed(lengths, lengths, Settings(ratio=0.3, min_keys=2))


@pytest.mark.parametrize(
    "lq,lk", [([3, 7, 0, 2], [9, 4, 5, 0]), ([1, 1, 1], [10, 0, 33]), ([20, 4], [3, 50])]
)
@pytest.mark.parametrize("causal", [True, False])
def test_unequal_documents(lq, lk, causal):
    check_packed(lq, lk, Settings(topk=3, causal=causal))


@pytest.mark.parametrize("h,hkv", [(1, 1), (6, 2), (8, 1)])
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_heads(h, hkv, select):
    check_packed([6, 13], [6, 13], Settings(topk=3, select=select), h=h, hkv=hkv)


@pytest.mark.parametrize("kind", ["permuted", "two_values", "equal", "duplicated", "mixed"])
def test_hard_orders(kind):
    scale = 1e-3 if kind == "mixed" else None
    check_packed([11, 24], [11, 24], Settings(topk=5, softmax_scale=scale), d=64, dv=16, kind=kind)


@pytest.mark.parametrize(
    "s",
    [
        Settings(topk=5, sink=2, recent=2),
        Settings(ratio=0.5, sink=30),
        Settings(ratio=1.0, recent=3),
        Settings(topk=2, recent=9),
        Settings(ratio=0.1, min_keys=3, max_keys=5),
    ],
    ids=lambda s: str(s.kwargs()),
)
def test_settings(s):
    check_packed([4, 19, 1, 8], [4, 19, 1, 8], s)


@pytest.mark.parametrize("d,dv", [(8, 24), (72, 40), (256, 128)])
def test_dims(d, dv):
    check_packed([7, 12], [7, 12], Settings(topk=4), d=d, dv=dv)


def test_max_seqlen_may_be_larger():
    check_packed([7, 12], [7, 12], Settings(topk=4), extra=100)
    check_packed([7, 12], [7, 12], Settings(ratio=0.25), extra=100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "permuted", "mixed"])
def test_packed_document_equals_the_document_alone(dtype, kind):
    lengths = [23, 1, 40, 9]
    q, k, v, cu, _, longest, _ = packed_inputs(lengths, lengths, 4, 2, 64, dtype=dtype, kind=kind)
    for s in (dict(topk=5), dict(ratio=0.2, sink=1, recent=1), dict(ratio=0.3, select="kv_group")):
        packed = topk_attn.topk_select(
            q,
            k,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **s,
            return_indices=True,
        )
        out = topk_attn.topk_attn_varlen_func(q, k, v, cu, cu, longest, longest, softmax_scale=1e-2, **s)
        for b, n in enumerate(lengths):
            rows = slice(int(cu[b]), int(cu[b + 1]))
            alone = topk_attn.topk_select(q[None, rows], k[None, rows], **s, return_indices=True)
            assert_same(packed[0][:, rows], alone[0][0], "threshold")
            assert_same(packed[1][:, rows], alone[1][0], "tie_index")
            width = alone[2].shape[-1]
            assert_same(packed[2][:, rows, :width], alone[2][0], "indices")
            assert bool((packed[2][:, rows, width:] == -1).all())
            single = topk_attn.topk_attn_func(
                q[None, rows], k[None, rows], v[None, rows], softmax_scale=1e-2, **s
            )
            assert_close(out[rows], single[0].double(), 2 * FORWARD_TOLERANCE[dtype], f"document {b} of {n}")


def test_nothing_crosses_documents():
    """NaN in one document leaves the bits of the others alone, forward and backward."""
    lengths = [9, 14, 6]
    q, k, v, cu, _, longest, _ = packed_inputs(lengths, lengths, 4, 2, 16)

    def run(q, k, v):
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        out = topk_attn.topk_attn_varlen_func(q, k, v, cu, cu, longest, longest, topk=3)
        return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]

    clean = run(q, k, v)
    for which in range(3):
        bad = [q.clone(), k.clone(), v.clone()]
        bad[which][9:23] = math.nan
        for got, want in zip(run(*bad), clean, strict=True):
            assert torch.equal(got[:9], want[:9]) and torch.equal(got[23:], want[23:])


def test_no_documents():
    q = torch.zeros(0, 2, 8)
    cu = torch.zeros(1, dtype=torch.int32)
    out, lse = topk_attn.topk_attn_varlen_func(q, q, q, cu, cu, 0, 0, topk=3, return_lse=True)
    assert tuple(out.shape) == (0, 2, 8) and tuple(lse.shape) == (2, 0)


def test_many_documents():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 6, (80,), generator=g).tolist()
    check_packed(lengths, lengths, Settings(ratio=0.5), h=2, hkv=1, d=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_packed_inputs(dtype):
    lengths = [9, 14]
    q, k, v, cu, _, longest, _ = packed_inputs(lengths, lengths, 4, 2, 16, dtype=dtype)
    want = topk_attn.topk_attn_varlen_func(q, k, v, cu, cu, longest, longest, topk=3)
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert_same(
        topk_attn.topk_attn_varlen_func(*swapped, cu, cu, longest, longest, topk=3), want, "heads first"
    )


def test_strided_bounds_are_read_right_or_refused():
    lengths = [9, 14]
    q, k, v, cu, _, longest, _ = packed_inputs(lengths, lengths, 4, 2, 16)
    want = topk_attn.topk_attn_varlen_func(q, k, v, cu, cu, longest, longest, topk=3)
    strided = torch.stack([cu, cu + 100], dim=1)[:, 0]
    assert strided.stride(0) == 2
    try:
        got = topk_attn.topk_attn_varlen_func(q, k, v, strided, strided, longest, longest, topk=3)
    except (RuntimeError, ValueError) as error:
        assert "cu_seqlens" in str(error)
    else:
        assert_same(got, want, "strided cu_seqlens")
