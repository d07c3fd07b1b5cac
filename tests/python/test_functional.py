"""The Python functions: what they return, which alignment they use, what they refuse. Numbers are the
oracle's."""

import inspect
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import Settings

import topk_attn
from topk_attn import (
    _loader,
    budget,
    scaled_dot_product_topk_attention,
    topk_attn_func,
    topk_attn_varlen_func,
    topk_attn_with_kvcache,
    topk_select,
    topk_select_scores,
)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


Q, K, V = rand(2, 7, 4, 8), rand(2, 11, 2, 8, seed=1), rand(2, 11, 2, 16, seed=2)

# ------------------------------------------------------------------------------------------------------------
# Signatures
# ------------------------------------------------------------------------------------------------------------

SHARED = dict(
    topk=None,
    ratio=None,
    min_keys=1,
    max_keys=None,
    select="head",
    sink=0,
    recent=0,
    softmax_scale=None,
    deterministic=False,
    return_lse=False,
)


@pytest.mark.parametrize(
    "function,positional,own",
    [
        (topk_attn_func, "q k v", dict(causal=True)),
        (
            topk_attn_varlen_func,
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
            dict(causal=True),
        ),
        (
            topk_attn_with_kvcache,
            "q k_cache v_cache k v",
            dict(
                cache_seqlens=inspect.Parameter.empty,
                cache_leftpad=None,
                block_table=None,
                key_codes=None,
                causal=True,
                return_indices=False,
                return_slots=False,
                return_encoding=False,
            ),
        ),
        (
            scaled_dot_product_topk_attention,
            "query key value attn_mask dropout_p is_causal scale enable_gqa",
            dict(),
        ),
        (
            topk_select,
            "q k",
            dict(
                causal=True,
                cu_seqlens_q=None,
                cu_seqlens_k=None,
                max_seqlen_q=None,
                max_seqlen_k=None,
                return_indices=False,
            ),
        ),
        (budget, "n", dict()),
    ],
)
def test_signature(function, positional, own):
    parameters = inspect.signature(function).parameters
    by_position = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    by_name = {n: p.default for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert by_position == positional.split()
    assert by_name == {**own, **SHARED}


def test_everything_public_is_documented_and_exported():
    for name in topk_attn.functional.__all__:
        assert getattr(topk_attn, name) is getattr(topk_attn.functional, name)
        assert len(getattr(topk_attn, name).__doc__) > 100


def test_build_info():
    info = topk_attn.build_info()
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["version"] == topk_attn.__version__
    assert info["cpu_isa"] in ("avx512", "avx2", "generic")
    assert info["compiler"]


def test_another_torch_is_named_in_one_sentence():
    built = topk_attn.build_info()["torch"]
    _loader.check_torch(built + "+cpu")
    _loader.check_torch(".".join(built.split(".")[:2]) + ".99a0+git123")
    for running in ("2.1.0", "2.110.0", "3.11.0"):
        with pytest.raises(ImportError) as caught:
            _loader.check_torch(running)
        text = str(caught.value)
        assert built in text and running in text and "reinstall" in text and text.count(". ") == 0


# ------------------------------------------------------------------------------------------------------------
# Returns
# ------------------------------------------------------------------------------------------------------------


def test_func_returns_out_or_out_and_lse():
    expected = oracle.attention(Q, K, V, Settings(topk=3))
    out = topk_attn_func(Q, K, V, topk=3)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 7, 4, 16)
    close(out, expected.out)
    out, lse = topk_attn_func(Q, K, V, topk=3, return_lse=True)
    close(out, expected.out)
    close(lse, expected.lse)


def test_varlen_returns_out_or_out_and_lse():
    q, k, v = Q.reshape(14, 4, 8), K.reshape(22, 2, 8), V.reshape(22, 2, 16)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 14], [0, 9, 22]))
    expected = oracle.varlen(q, k, v, cu_q, cu_k, Settings(ratio=0.4, sink=1))
    out, lse = topk_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 13, ratio=0.4, sink=1, return_lse=True)
    close(out, expected.out)
    close(lse, expected.lse)
    assert lse.shape == (4, 14)
    assert isinstance(topk_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 13, ratio=0.4), torch.Tensor)


@pytest.mark.parametrize("mask", range(16))
def test_kvcache_returns_what_was_asked_for_in_order(mask):
    names = ("return_lse", "return_indices", "return_slots", "return_encoding")
    asked = {name: bool(mask >> i & 1) for i, name in enumerate(names)}
    seqlens = torch.tensor([11, 8], dtype=torch.int32)
    result = topk_attn_with_kvcache(Q, K, V, cache_seqlens=seqlens, topk=3, **asked)
    expected = oracle.kvcache(Q, K, V, seqlens, Settings(topk=3))
    if not mask:
        assert isinstance(result, torch.Tensor)
        close(result, expected.out)
        return
    out, *rest = result
    assert isinstance(result, tuple) and len(rest) == sum(asked.values())
    close(out, expected.out)
    indices = torch.stack([oracle.index_lists(kept, 3) for kept in expected.kept])
    for name in names:
        if not asked[name]:
            continue
        value = rest.pop(0)
        if name == "return_lse":
            close(value, expected.lse)
        elif name == "return_indices":
            assert value.dtype == torch.int32 and torch.equal(value, indices)
        elif name == "return_slots":
            base = torch.arange(2, dtype=torch.int32)[:, None, None, None] * 11
            assert torch.equal(value, torch.where(indices < 0, indices, indices + base))
        else:
            threshold, tie_index = value
            assert torch.equal(tie_index.long(), expected.tie_index)
            torch.testing.assert_close(threshold.double(), expected.threshold, rtol=0, atol=0, equal_nan=True)


def test_kvcache_writes_new_rows_in_place_and_leaves_the_lengths():
    k_cache, v_cache = K.clone(), V.clone()
    new_k, new_v = rand(2, 2, 2, 8, seed=3), rand(2, 2, 2, 16, seed=4)
    seqlens = torch.tensor([9, 4], dtype=torch.int32)
    q = Q[:, :2]
    out = topk_attn_with_kvcache(
        q, k_cache, v_cache, new_k, new_v, cache_seqlens=seqlens, ratio=0.3, recent=1
    )
    assert seqlens.tolist() == [9, 4]
    for b, n in enumerate((9, 4)):
        assert torch.equal(k_cache[b, n : n + 2], new_k[b]) and torch.equal(v_cache[b, n : n + 2], new_v[b])
        assert torch.equal(k_cache[b, :n], K[b, :n]) and torch.equal(k_cache[b, n + 2 :], K[b, n + 2 :])
    expected = oracle.kvcache(q, K, V, seqlens, Settings(ratio=0.3, recent=1), k=new_k, v=new_v)
    close(out, expected.out)


def test_kvcache_is_not_differentiable():
    q = Q.clone().requires_grad_()
    seqlens = torch.tensor([11, 11], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="grad"):
        topk_attn_with_kvcache(q, K, V, cache_seqlens=seqlens, topk=3)
    with torch.no_grad():
        topk_attn_with_kvcache(q, K, V, cache_seqlens=seqlens, topk=3)


@pytest.mark.parametrize("return_indices", [False, True])
def test_select_returns(return_indices):
    expected = oracle.attention(Q, K, V, Settings(topk=3, select="kv_group"))
    result = topk_select(Q, K, topk=3, select="kv_group", return_indices=return_indices)
    assert len(result) == 2 + return_indices
    assert torch.equal(result[1].long(), expected.tie_index)
    torch.testing.assert_close(result[0].double(), expected.threshold, rtol=0, atol=0, equal_nan=True)
    if return_indices:
        assert torch.equal(result[2], oracle.index_lists(expected.kept, 3))


def test_select_takes_the_settings_of_the_other_calls():
    settings = dict(ratio=0.5, softmax_scale=2.0, deterministic=True, sink=1)
    assert len(topk_select(Q, K, **settings)) == 2
    assert budget(10, **settings) == 5
    with pytest.raises(ValueError, match="return_lse"):
        topk_select(Q, K, topk=2, return_lse=True)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="softmax_scale"):
            topk_select(Q, K, topk=2, softmax_scale=scale)


def test_select_scores():
    scores = rand(5, 20)
    lengths = torch.tensor([20, 3, 0, 7, 20], dtype=torch.int32)
    threshold, tie_index, indices = topk_select_scores(scores, 6, lengths)
    expected = oracle.select_scores(scores, 6, lengths)
    torch.testing.assert_close(threshold.double(), expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tie_index, expected[1]) and torch.equal(indices, expected[2])


def test_lse_is_differentiable():
    q = Q.clone().double().requires_grad_()
    k, v = K.double(), V.double()
    _, lse = topk_attn_func(q, k, v, topk=11, return_lse=True)
    lse[lse.isfinite()].sum().backward()
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) / math.sqrt(8)
    visible = torch.ones(7, 11, dtype=torch.bool).tril(4)
    reference = torch.autograd.grad(scores.masked_fill(~visible, -math.inf).logsumexp(-1).sum(), q)[0]
    close(q.grad, reference)


# ------------------------------------------------------------------------------------------------------------
# Budget
# ------------------------------------------------------------------------------------------------------------


def test_budget_equals_the_oracle():
    for arguments in (
        dict(ratio=0.07),
        dict(ratio=0.01, min_keys=64),
        dict(ratio=1.0),
        dict(ratio=1 / 3, max_keys=10),
        dict(topk=5),
        dict(topk=5, min_keys=7),
        dict(topk=50, max_keys=7),
    ):
        for n in [*range(0, 130), 1000, 4096, 131072, 2**31, 2**40]:
            assert budget(n, **arguments) == oracle.budget(n, Settings(**arguments)), (n, arguments)
    assert budget(100, ratio=0.07) == 7


@pytest.mark.parametrize(
    "arguments,name",
    [
        (dict(), "topk"),
        (dict(topk=3, ratio=0.1), "ratio"),
        (dict(topk=0), "topk"),
        (dict(ratio=0.0), "ratio"),
        (dict(ratio=1.1), "ratio"),
        (dict(ratio=math.nan), "ratio"),
        (dict(topk=3, min_keys=0), "min_keys"),
        (dict(topk=3, max_keys=0), "max_keys"),
        (dict(topk=3, min_keys=5, max_keys=4), "min_keys"),
    ],
)
def test_bad_budgets_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        budget(10, **arguments)
    with pytest.raises((ValueError, RuntimeError), match=name):
        topk_attn_func(Q, K, V, **arguments)


def test_budget_refuses_other_numbers():
    with pytest.raises(ValueError, match="-1"):
        budget(-1, topk=3)
    for n in (1.5, "3", None):
        with pytest.raises(TypeError):
            budget(n, topk=3)


# ------------------------------------------------------------------------------------------------------------
# The SDPA face
# ------------------------------------------------------------------------------------------------------------


def sdpa_oracle(q, k, v, settings, mask=None, causal=False):
    """4D SDPA layout; causal top-left; mask (B, H, Tk) bool of keys. Row by row through the contract's
    oracle."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = torch.arange(k.shape[2])
                if causal:
                    keys = keys[: i + 1]
                if mask is not None:
                    keys = keys[mask[b, h, keys]]
                if len(keys) == 0:
                    continue
                one = (q[b, h, i][None, None, None], k[b, h // group, keys][None, :, None])
                row = oracle.attention(*one, v[b, h // group, keys][None, :, None], settings)
                out[b, h, i] = row.out[0, 0, 0]
    return out


@pytest.mark.parametrize("tq,tk", [(6, 6), (4, 9), (9, 4), (1, 7), (7, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_alignment(tq, tk, causal):
    q, k, v = rand(2, 4, tq, 8), rand(2, 4, tk, 8, seed=1), rand(2, 4, tk, 16, seed=2)
    out = scaled_dot_product_topk_attention(q, k, v, is_causal=causal, ratio=0.4)
    close(out, sdpa_oracle(q, k, v, Settings(ratio=0.4, causal=False), causal=causal))
    full = scaled_dot_product_topk_attention(q, k, v, is_causal=causal, ratio=1.0)
    close(full, F.scaled_dot_product_attention(q, k, v, is_causal=causal))


MASKS = [
    (9,),
    (1, 9),
    (1, 1, 1, 9),
    (2, 1, 1, 9),
    (1, 4, 1, 9),
    (2, 4, 1, 9),
    (4, 1, 9),
    (2, 4, 5, 9),
    (5, 9),
    (2, 1, 5, 9),
]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_sdpa_key_masks(shape, gqa, expanded):
    kv_heads = 2 if gqa else 4
    q, k, v = rand(2, 4, 5, 8), rand(2, kv_heads, 9, 8, seed=1), rand(2, kv_heads, 9, 16, seed=2)
    row = (
        rand(*(1 if len(shape) > 1 and i == len(shape) - 2 else n for i, n in enumerate(shape)), seed=5)
        > -0.4
    )
    mask = row.expand(shape) if expanded else row.expand(shape).clone()
    out = scaled_dot_product_topk_attention(q, k, v, mask, enable_gqa=gqa, ratio=0.4, sink=1)
    full = torch.broadcast_to(row, (2, 4, 1, 9))[:, :, 0]
    close(out, sdpa_oracle(q, k, v, Settings(ratio=0.4, sink=1, causal=False), mask=full))


def test_sdpa_mask_of_nothing_and_of_everything():
    q, k, v = rand(2, 4, 5, 8), rand(2, 4, 9, 8, seed=1), rand(2, 4, 9, 16, seed=2)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    same = scaled_dot_product_topk_attention(q, k, v, mask, topk=3)
    assert torch.equal(same, scaled_dot_product_topk_attention(q, k, v, topk=3))
    mask[1] = False
    out, lse = scaled_dot_product_topk_attention(q, k, v, mask, topk=3, return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    assert torch.equal(out[0], same[0])


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8), (2, 3, 6, 8), (2, 2, 3, 6, 8), (0, 3, 6, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_leading_dimensions(shape, masked):
    q, k, v = rand(*shape), rand(*shape, seed=1), rand(*shape[:-1], 16, seed=2)
    mask = torch.tensor([[True, False, True, True, False, True]]) if masked else None
    out, lse = scaled_dot_product_topk_attention(q, k, v, mask, ratio=1.0, return_lse=True)
    assert out.shape == (*shape[:-1], 16) and lse.shape == shape[:-1]
    close(out, F.scaled_dot_product_attention(q, k, v, mask))


def test_sdpa_broadcasts_leading_dimensions():
    q, k, v = rand(2, 3, 4, 6, 8), rand(3, 1, 6, 8, seed=1), rand(1, 1, 4, 6, 8, seed=2)
    out = scaled_dot_product_topk_attention(q, k, v, ratio=1.0)
    expanded = (x.expand(2, 3, 4, 6, 8) for x in (q, k, v))
    close(out, F.scaled_dot_product_attention(*expanded))


def test_sdpa_scale_by_either_name():
    q, k, v = rand(1, 2, 5, 8), rand(1, 2, 5, 8, seed=1), rand(1, 2, 5, 8, seed=2)
    a = scaled_dot_product_topk_attention(q, k, v, scale=0.3, topk=3)
    assert torch.equal(a, scaled_dot_product_topk_attention(q, k, v, softmax_scale=0.3, topk=3))
    assert not torch.equal(a, scaled_dot_product_topk_attention(q, k, v, topk=3))
    with pytest.raises(ValueError, match="softmax_scale"):
        scaled_dot_product_topk_attention(q, k, v, scale=0.3, softmax_scale=0.4, topk=3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_gradients(masked, causal):
    if masked and causal:
        return
    q, k, v = (rand(2, 4, 6, 8, seed=i, dtype=torch.float64) for i in range(3))
    mask = (rand(2, 1, 1, 6, seed=5) > -0.3) if masked else None
    grads = []
    for call in (
        lambda q, k, v: scaled_dot_product_topk_attention(q, k, v, mask, is_causal=causal, ratio=1.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        (call(*inputs) * rand(2, 4, 6, 8, seed=9)).sum().backward()
        grads.append([x.grad for x in inputs])
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize(
    "arguments,name",
    [
        (dict(dropout_p=0.1), "dropout_p"),
        (dict(attn_mask=torch.zeros(5, 5)), "attn_mask"),
        (dict(attn_mask=torch.zeros(5, 5, dtype=torch.int64)), "attn_mask"),
        (dict(attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()), "attn_mask"),
        (dict(attn_mask=torch.ones(5, 6, dtype=torch.bool)), "attn_mask"),
        (dict(attn_mask=torch.ones(3, 1, 1, 5, dtype=torch.bool)), "attn_mask"),
        (dict(attn_mask=torch.ones(1, 2, 2, 1, 5, dtype=torch.bool)), "attn_mask"),
        (dict(attn_mask=torch.ones(5, 5, dtype=torch.bool), is_causal=True), "is_causal"),
        (dict(scale=0.0), "scale"),
        (dict(scale=-1.0), "scale"),
        (dict(scale=math.inf), "scale"),
    ],
)
def test_sdpa_refuses_with_the_reason(arguments, name):
    q = rand(2, 2, 5, 8)
    with pytest.raises((ValueError, RuntimeError), match=name):
        scaled_dot_product_topk_attention(q, q, q, topk=3, **arguments)


def test_sdpa_refuses_bad_shapes():
    q = rand(2, 4, 5, 8)
    for k, v, gqa, name in (
        (rand(2, 2, 5, 8), rand(2, 2, 5, 8), False, "enable_gqa"),
        (rand(2, 3, 5, 8), rand(2, 3, 5, 8), True, "multiple"),
        (rand(2, 4, 5, 8), rand(2, 4, 6, 8), False, "value"),
        (rand(3, 4, 5, 8), rand(3, 4, 5, 8), False, "broadcast"),
        (rand(5, 8), rand(5, 8), True, "head dimension"),
        (rand(8), rand(8), False, "key"),
    ):
        with pytest.raises(ValueError, match=name):
            scaled_dot_product_topk_attention(q, k, v, enable_gqa=gqa, topk=3)
    with pytest.raises(TypeError, match="value"):
        scaled_dot_product_topk_attention(q, q, None, topk=3)


def test_sdpa_group_selection_needs_a_mask_equal_for_the_heads():
    q, k = rand(1, 4, 5, 8), rand(1, 2, 5, 8)
    mask = rand(1, 4, 1, 5, seed=3) > 0
    with pytest.raises(ValueError, match="kv_group"):
        scaled_dot_product_topk_attention(q, k, k, mask, enable_gqa=True, topk=2, select="kv_group")


def test_sdpa_mask_makes_no_square_buffer():
    """A mask of keys for many rows: peak memory stays far from Tq x Tk."""
    t = 2048
    q = rand(1, 1, t, 8)
    mask = (rand(1, t, seed=3) > 0).expand(t, t)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as prof:
        scaled_dot_product_topk_attention(q, q, q, mask, topk=4)
    largest = max(event.cpu_memory_usage for event in prof.events())
    assert largest < t * t // 4, f"an operator allocated {largest} bytes"


def test_compiles_without_a_graph_break():
    q, k, v = (rand(2, 4, 6, 8, seed=i) for i in range(3))
    mask = rand(2, 1, 1, 6, seed=5) > -0.3
    for arguments in (dict(), dict(is_causal=True), dict(attn_mask=mask)):
        call = lambda q, k, v, a=arguments: scaled_dot_product_topk_attention(q, k, v, ratio=0.4, **a)  # noqa: E731
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(q, k, v), call(q, k, v))
