"""The operators as torch sees them: schemas, opcheck, Meta, autocast, torch.compile."""

import pytest
import torch
from op_helpers import DTYPES, assert_close, assert_same, make_qkv, normal

import topk_attn

OPS = ("select", "fwd", "bwd", "select_scores", "fwd_kvcache", "key_codes_new", "key_codes_rebuild")
WRITTEN = {"fwd_kvcache": ["k_cache", "v_cache", "key_codes"], "key_codes_rebuild": ["key_codes"]}


def int32(*values, device=None):
    return torch.tensor(values, dtype=torch.int32, device=device)


def cases(dtype=torch.float32, grad=False):
    """name -> (operator, args, kwargs): every operator in its main forms.

    Every row competes for a key: the threshold of one that does not is NaN, which opcheck takes for unequal.
    """
    q, k, v = make_qkv(2, 10, 12, 4, 2, 8, 16, dtype=dtype)
    if grad:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    qp, kp, vp = (x.detach()[0] for x in (q, k, v))
    if grad:
        qp, kp, vp = (x.requires_grad_() for x in (qp, kp, vp))
    packed = (int32(0, 3, 10), int32(0, 5, 12), 7, 7)
    ops = torch.ops.topk_attn
    found = {
        "fwd": (ops.fwd, (q, k, v), dict(topk=3)),
        "fwd kept": (ops.fwd, (q, k, v), dict(ratio=0.5, kept="lists")),
        "fwd full": (
            ops.fwd,
            (q, k, v),
            dict(ratio=0.5, min_keys=3, max_keys=5, sink=1, recent=1, softmax_scale=0.3),
        ),
        "fwd group": (ops.fwd, (q, k, v), dict(topk=3, causal=False, select="kv_group", deterministic=True)),
        "fwd packed": (ops.fwd, (qp, kp, vp, *packed), dict(topk=3)),
        "select": (ops.select, (q, k), dict(topk=3)),
        "select lists": (ops.select, (q, k), dict(ratio=0.4, return_indices=True)),
        "select packed": (ops.select, (qp, kp, *packed), dict(topk=3, return_indices=True)),
    }
    if dtype != torch.float64:
        found["scores"] = (ops.select_scores, (normal(3, 9, dtype=dtype), 4), {})
        found["scores lengths"] = (ops.select_scores, (normal(3, 9, dtype=dtype), 4, int32(1, 4, 9)), {})
    q, k, v = (x.detach() for x in (q, k, v))
    for save in ("lists", "none"):
        forward = ops.fwd(q, k, v, topk=3, kept=save)
        dout, dlse = normal(*forward[0].shape, dtype=dtype), normal(*forward[1].shape, dtype=forward[1].dtype)
        found[f"bwd {save}"] = (ops.bwd, (dout, dlse, q, k, v, *forward), dict(topk=3))
    found["bwd no lse"] = (ops.bwd, (dout, None, q, k, v, *forward), dict(topk=3))
    q, lengths = q[:, :2], int32(4, 9)
    new = normal(2, 1, 2, 8, dtype=dtype), normal(2, 1, 2, 16, dtype=dtype)
    pages_k, pages_v = normal(6, 4, 2, 8, dtype=dtype), normal(6, 4, 2, 16, dtype=dtype)
    table = torch.tensor([[0, 2, 4], [5, 3, 1]], dtype=torch.int32)
    found["cache"] = (ops.fwd_kvcache, (q, k.clone(), v.clone(), None, None, lengths), dict(topk=3))
    found["cache lists"] = (
        ops.fwd_kvcache,
        (q, k.clone(), v.clone(), *new, lengths, int32(0, 2)),
        dict(ratio=0.5, return_indices=True),
    )
    found["cache paged"] = (
        ops.fwd_kvcache,
        (q, pages_k, pages_v, *new, lengths, None, table),
        dict(topk=3, return_indices=True),
    )
    return found


NAMES = list(cases())


def test_schemas_are_functional_except_for_the_caches():
    for name in OPS:
        schema = getattr(torch.ops.topk_attn, name).default._schema
        mutated = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert mutated == WRITTEN.get(name, []), name
        assert all(r.alias_info is None for r in schema.returns)


@pytest.mark.parametrize("name", OPS)
def test_backends_are_registered(name):
    for key in ("CPU", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"topk_attn::{name}", key), key


def test_key_codes_on_meta_and_not_on_the_cpu():
    ops = torch.ops.topk_attn
    k = torch.zeros(3, 40, 2, 64, dtype=torch.bfloat16)
    codes = ops.key_codes_new(k.to("meta"))
    # A key: 64 bytes and a word; a head and channel: centre and exponent; eight counters.
    assert codes.dtype == torch.int8 and codes.shape == (3 * 40 * 2 * 68 + 2 * 64 * 8 + 64,)
    lengths = torch.zeros(3, dtype=torch.int32)
    ops.key_codes_rebuild(codes, k.to("meta"), lengths.to("meta"))
    for call in (
        lambda: ops.key_codes_new(k),
        lambda: ops.key_codes_layout(k),
        lambda: ops.key_codes_rebuild(torch.zeros(codes.shape, dtype=torch.int8), k, lengths),
    ):
        with pytest.raises(RuntimeError, match="certified scan, which exists on CUDA only"):
            call()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name, grad):
    op, args, kwargs = cases(grad=grad)[name]
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_meta_equals_cpu(name, dtype):
    """Shapes, dtypes and strides on Meta are those of the CPU."""
    found = cases(dtype)
    if name not in found:
        pytest.skip("float64 scores are not an input of select_scores")
    op, args, kwargs = found[name]
    real = op(*args, **kwargs)
    meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
    for i, (r, m) in enumerate(zip(real, meta, strict=True)):
        assert m.device.type == "meta"
        assert (r.shape, r.dtype) == (m.shape, m.dtype), (
            f"output {i}: {r.shape} {r.dtype} != {m.shape} {m.dtype}"
        )
        if r.numel():
            assert r.stride() == m.stride(), f"output {i}: {r.stride()} != {m.stride()}"


def test_meta_of_huge_shapes_allocates_nothing():
    q = torch.empty(8, 2**20, 32, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(8, 2**20, 8, 128, device="meta", dtype=torch.bfloat16)
    out, lse = topk_attn.topk_attn_func(q, k, k, ratio=0.01, return_lse=True)
    assert out.shape == q.shape and lse.shape == (8, 32, 2**20)


def test_meta_checks_shapes_too():
    q, k = torch.empty(1, 4, 2, 12, device="meta"), torch.empty(1, 4, 1, 12, device="meta")
    with pytest.raises(RuntimeError, match="12"):
        topk_attn.topk_attn_func(q, k, k, topk=2)
    q = torch.empty(1, 4, 2, 8, device="meta")
    with pytest.raises((RuntimeError, ValueError), match="topk"):
        topk_attn.topk_attn_func(q, q, q, topk=0)


# ------------------------------------------------------------------------------------------------------------
# Autocast
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_autocast_casts_as_sdpa_does(to, given):
    q, k, v = make_qkv(1, 9, 9, 2, 2, 8, dtype=given)

    def dtype_of(attend):
        try:
            return attend().dtype
        except RuntimeError as error:
            return type(error)

    with torch.autocast("cpu", dtype=to):
        ours = dtype_of(lambda: topk_attn.topk_attn_func(q, k, v, topk=3))
        sdpa = dtype_of(
            lambda: torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        )
    assert ours == sdpa


def test_autocast_mixed_dtypes_and_gradients():
    q, k, v = make_qkv(1, 9, 9, 2, 2, 8)
    q, k, v = q.requires_grad_(), k.bfloat16().requires_grad_(), v.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = topk_attn.topk_attn_func(q, k, v, topk=3, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    out.float().sum().backward()
    assert (q.grad.dtype, k.grad.dtype, v.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    cast = [x.detach().bfloat16() for x in (q, k, v)]
    assert_same(out.detach(), topk_attn.topk_attn_func(*cast, topk=3), "out")


def test_autocast_of_every_attention_call():
    q, k, v = make_qkv(1, 9, 9, 2, 2, 8)
    cu = int32(0, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert topk_attn.topk_attn_varlen_func(q[0], k[0], v[0], cu, cu, 9, 9, topk=3).dtype == torch.bfloat16
        select = topk_attn.topk_select(q, k, topk=3)
    for a, b in zip(select, topk_attn.topk_select(q.bfloat16(), k.bfloat16(), topk=3), strict=True):
        assert_same(a, b, "select")
    with torch.autocast("cpu", enabled=False):
        assert topk_attn.topk_attn_func(q, k, v, topk=3).dtype == torch.float32


def test_autocast_decode_never_copies_the_cache():
    """q is cast; a cache of another dtype is an error: a cast copy would lose the new rows."""
    q, k, v = make_qkv(1, 1, 9, 2, 2, 8)
    new = normal(1, 1, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kb, vb = k.bfloat16(), v.bfloat16()
        out = topk_attn.topk_attn_with_kvcache(q, kb, vb, new, new, cache_seqlens=int32(4), topk=3)
        assert out.dtype == torch.bfloat16
        assert_same(kb[0, 4], new[0, 0].bfloat16(), "new row")
        try:
            topk_attn.topk_attn_with_kvcache(q, k, v, new, new, cache_seqlens=int32(4), topk=3)
        except (RuntimeError, ValueError) as error:
            assert "k_cache" in str(error)
        else:
            assert_same(k[0, 4], new[0, 0], "a float32 cache must hold the new row")


# ------------------------------------------------------------------------------------------------------------
# torch.compile
# ------------------------------------------------------------------------------------------------------------


def compiled(f, **kw):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager", **kw)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_forward_and_backward(dynamic):
    def loss(q, k, v):
        out, lse = topk_attn.topk_attn_func(q * 1.5, k, v, ratio=0.3, min_keys=2, return_lse=True)
        return (out * out).sum() + lse.sum()

    run = compiled(loss, dynamic=dynamic)
    for n in (12, 17):
        args = [x.requires_grad_() for x in make_qkv(2, n, n, 4, 2, 16, seed=n)]
        want = torch.autograd.grad(loss(*args), args)
        got = torch.autograd.grad(run(*args), args)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b.double(), 1e-6, "gradient")


def test_compile_varlen_select_and_cache():
    q, k, v = make_qkv(1, 12, 12, 4, 2, 16)
    cu, lengths = int32(0, 5, 12), int32(6)

    def everything(q, k, v, k_cache, v_cache):
        a = topk_attn.topk_attn_varlen_func(q[0], k[0], v[0], cu, cu, 7, 7, topk=3)
        threshold, tie_index, indices = topk_attn.topk_select(q, k, topk=3, return_indices=True)
        s = topk_attn.topk_select_scores(q.reshape(12, -1), 4)[2]
        d = topk_attn.topk_attn_with_kvcache(
            q[:, :2], k_cache, v_cache, k[:, :2], v[:, :2], cache_seqlens=lengths, topk=3, return_indices=True
        )
        return a, threshold, tie_index, indices, s, *d, k_cache.sum()

    want = everything(q, k, v, k.clone(), v.clone())
    caches = k.clone(), v.clone()
    got = compiled(everything)(q, k, v, *caches)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, "compiled")
    assert torch.equal(caches[0][:, 6:8], k[:, :2]) and torch.equal(caches[1][:, 6:8], v[:, :2])


def test_compile_with_inductor():
    """The default backend: strides that Meta promises are those that the kernels deliver."""

    def f(q, k, v):
        return topk_attn.topk_attn_func(q, k, v, topk=3).transpose(1, 2).relu() + 1

    q, k, v = (x.requires_grad_() for x in make_qkv(1, 9, 9, 2, 1, 8))
    torch._dynamo.reset()
    run = torch.compile(f, fullgraph=True)
    try:
        got = run(q, k, v)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"inductor has no working compiler here: {str(error).splitlines()[0]}")
    assert_close(got, f(q, k, v).detach().double(), 1e-6, "out")
    a = torch.autograd.grad(got.sum(), (q, k, v))
    b = torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
    for x, y in zip(a, b, strict=True):
        assert_close(x, y.double(), 1e-6, "gradient")


def test_compiled_errors_are_errors():
    run = compiled(lambda q, k, v: topk_attn.topk_attn_func(q, k, v, topk=0))
    with pytest.raises(Exception, match="topk"):
        run(*make_qkv(1, 5, 5, 2, 1, 8))


# ------------------------------------------------------------------------------------------------------------
# Other machinery
# ------------------------------------------------------------------------------------------------------------


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    args = [x.requires_grad_() for x in make_qkv(1, 15, 15, 4, 2, 16)]
    f = lambda q, k, v: topk_attn.topk_attn_func(q, k, v, topk=4)  # noqa: E731
    want = torch.autograd.grad(f(*args).sum(), args)
    got = torch.autograd.grad(checkpoint(f, *args, use_reentrant=False).sum(), args)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, "gradient")


def test_inference_mode():
    with torch.inference_mode():
        q, k, v = make_qkv(1, 6, 6, 2, 1, 8)
        out = topk_attn.topk_attn_func(q, k, v, topk=3)
        topk_attn.topk_attn_with_kvcache(q, k, v, k[:, :1], v[:, :1], cache_seqlens=int32(3), topk=2)
    assert out.is_inference()


def test_several_python_threads():
    """Concurrent calls do not disturb one another."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [make_qkv(1, 40, 40, 2, 1, 16, seed=i) for i in range(8)]
    want = [topk_attn.topk_attn_func(*x, topk=5) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda x: topk_attn.topk_attn_func(*x, topk=5), inputs))
            for a, b in zip(got, want, strict=True):
                assert_same(a, b, "concurrent call")
