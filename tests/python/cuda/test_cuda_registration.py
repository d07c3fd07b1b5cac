"""The CUDA operators as torch sees them: dispatch keys, opcheck, Meta, autocast, torch.compile."""

import pytest
import torch
from cuda_helpers import BF16, DEVICE, DTYPES, F16, F32, KEPT, int32, make_qkv, normal
from op_helpers import assert_close, assert_same

import topk_attn


def cases(dtype, grad=False):
    """name -> (operator, args, kwargs). Every row competes for a key: opcheck takes NaN for unequal."""
    q, k, v = make_qkv(2, 70, 80, 4, 2, 64, dtype=dtype)
    qp, kp, vp = (x[0].detach().requires_grad_(grad) for x in (q, k, v))
    q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
    pack = (int32(0, 30, 70), int32(0, 35, 80), 40, 45)
    ops = torch.ops.topk_attn
    found = {
        "fwd": (ops.fwd, (q, k, v), dict(topk=3)),
        "fwd kept": (ops.fwd, (q, k, v), dict(topk=3, **KEPT)),
        "fwd group": (ops.fwd, (q, k, v), dict(topk=3, causal=False, select="kv_group", deterministic=True)),
        "fwd packed": (ops.fwd, (qp, kp, vp, *pack), dict(topk=3)),
        "select": (ops.select, (q, k), dict(ratio=0.4, return_indices=True)),
        "select packed": (ops.select, (qp, kp, *pack), dict(topk=3)),
        "scores": (ops.select_scores, (normal(3, 90, dtype=dtype), 4, int32(4, 9, 90)), {}),
    }
    q, k, v = (x.detach() for x in (q, k, v))
    forward = ops.fwd(q, k, v, topk=3, **KEPT)
    grads = normal(*forward[0].shape, dtype=dtype), normal(*forward[1].shape)
    found["bwd"] = (ops.bwd, (*grads, q, k, v, *forward), dict(topk=3, deterministic=True))
    found["bwd no lse"] = (ops.bwd, (grads[0], None, q, k, v, *forward), dict(topk=3, deterministic=True))
    return found


NAMES = (
    "fwd",
    "fwd kept",
    "fwd group",
    "fwd packed",
    "select",
    "select packed",
    "scores",
    "bwd",
    "bwd no lse",
)


@pytest.mark.parametrize("name", ["select", "fwd", "bwd", "select_scores"])
def test_backend_is_registered(gpu, name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"topk_attn::{name}", "CUDA")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name, grad):
    op, args, kwargs = cases(BF16, grad)[name]
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_meta_is_the_truth(name, dtype):
    """Shapes, dtypes and strides on Meta are those of the device."""
    op, args, kwargs = cases(dtype)[name]
    real = op(*args, **kwargs)
    meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
    for i, (r, m) in enumerate(zip(real, meta, strict=True)):
        assert (r.shape, r.dtype) == (m.shape, m.dtype), f"output {i}: {r.shape} {r.dtype}"
        assert not r.numel() or r.stride() == m.stride(), f"output {i}: {r.stride()} != {m.stride()}"


@pytest.mark.parametrize("to", [BF16, F16])
@pytest.mark.parametrize("given", [F32, F16, BF16])
def test_autocast_casts_as_sdpa_does(to, given):
    q, k, v = make_qkv(1, 70, 70, 2, 2, 64, dtype=given)
    with torch.autocast(DEVICE.type, dtype=to):
        ours = topk_attn.topk_attn_func(q, k, v, topk=3)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert ours.dtype == sdpa.dtype
    assert_same(ours, topk_attn.topk_attn_func(*(x.to(ours.dtype) for x in (q, k, v)), topk=3), "out")


def test_autocast_gradients():
    q, k, v = make_qkv(1, 70, 70, 2, 2, 64)
    q, k, v = q.requires_grad_(), k.bfloat16().requires_grad_(), v.requires_grad_()
    with torch.autocast(DEVICE.type, dtype=BF16):
        out, lse = topk_attn.topk_attn_func(q, k, v, topk=3, return_lse=True)
        threshold, _ = topk_attn.topk_select(q, k, topk=3)
    assert out.dtype == BF16 and lse.dtype == F32
    out.float().sum().backward()
    assert (q.grad.dtype, k.grad.dtype, v.grad.dtype) == (F32, BF16, F32)
    assert_same(threshold, topk_attn.topk_select(q.bfloat16(), k, topk=3)[0], "threshold")


def compiled(f, **kw):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager", **kw)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_forward_and_backward(dynamic):
    def loss(q, k, v):
        out, lse = topk_attn.topk_attn_func(
            q * 1.5, k, v, ratio=0.3, min_keys=2, deterministic=True, return_lse=True
        )
        return (out * out).sum() + lse.sum()

    run = compiled(loss, dynamic=dynamic)
    for n in (70, 133):
        args = [x.requires_grad_() for x in make_qkv(1, n, n, 4, 2, 64, seed=n)]
        want = torch.autograd.grad(loss(*args), args)
        got = torch.autograd.grad(run(*args), args)
        for a, b in zip(got, want, strict=True):
            assert_close(a.cpu(), b.double().cpu(), 1e-6, "gradient")


def test_compile_packed_select_and_scores():
    q, k, v = make_qkv(1, 120, 120, 4, 2, 64, dtype=BF16)
    cu = int32(0, 50, 120)

    def everything(q, k, v):
        a = topk_attn.topk_attn_varlen_func(q[0], k[0], v[0], cu, cu, 70, 70, topk=3)
        s = topk_attn.topk_select_scores(q.reshape(120, -1), 4)[2]
        return a, *topk_attn.topk_select(q, k, topk=3, return_indices=True), s

    for a, b in zip(compiled(everything)(q, k, v), everything(q, k, v), strict=True):
        assert_same(a, b, "compiled")
