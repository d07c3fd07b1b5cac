"""Bad arguments: each raises one error that names the argument, what it was and what it must be."""

import math

import pytest
import torch
from op_helpers import make_qkv, normal

import topk_attn

ERRORS = (RuntimeError, ValueError, TypeError, IndexError)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def refuses(call, *words):
    """The call raises, and the message holds every word (case-insensitive)."""
    with pytest.raises(ERRORS) as info:
        call()
    message = str(info.value).split("Exception raised from")[0]
    for word in words:
        assert str(word).lower() in message.lower(), f"{word!r} is missing in: {message}"
    assert "internal assert" not in message.lower(), message


# ------------------------------------------------------------------------------------------------------------
# Budget and settings: the same on every call
# ------------------------------------------------------------------------------------------------------------

SETTINGS = [
    (dict(topk=0), ["topk", "0"]),
    (dict(topk=-1), ["topk", "-1"]),
    (dict(topk=-(2**63)), ["topk", "-9223372036854775808"]),
    (dict(ratio=0.0), ["ratio", "0"]),
    (dict(ratio=-0.5), ["ratio", "-0.5"]),
    (dict(ratio=1.5), ["ratio", "1.5"]),
    (dict(ratio=math.nan), ["ratio", "nan"]),
    (dict(ratio=math.inf), ["ratio", "inf"]),
    (dict(), ["topk", "ratio"]),
    (dict(topk=3, ratio=0.5), ["topk", "ratio", "3", "0.5"]),
    (dict(topk=3, min_keys=0), ["min_keys", "0"]),
    (dict(topk=3, min_keys=-7), ["min_keys", "-7"]),
    (dict(topk=3, max_keys=0), ["max_keys", "0"]),
    (dict(topk=3, max_keys=-2), ["max_keys", "-2"]),
    (dict(topk=3, min_keys=9, max_keys=8), ["min_keys", "max_keys", "9", "8"]),
    (dict(topk=3, select="foo"), ["select", "foo", "head", "kv_group"]),
    (dict(topk=3, select=""), ["select", "head"]),
    (dict(topk=3, select="HEAD"), ["select", "HEAD"]),
    (dict(topk=3, sink=-1), ["sink", "-1"]),
    (dict(topk=3, recent=-4), ["recent", "-4"]),
]
SCALES = [
    (dict(topk=3, softmax_scale=0.0), ["softmax_scale", "0"]),
    (dict(topk=3, softmax_scale=-1.0), ["softmax_scale", "-1"]),
    (dict(topk=3, softmax_scale=math.inf), ["softmax_scale", "inf"]),
    (dict(topk=3, softmax_scale=math.nan), ["softmax_scale", "nan"]),
    (dict(topk=3, softmax_scale=-math.inf), ["softmax_scale", "inf"]),
]


def attend(**kw):
    return topk_attn.topk_attn_func(*make_qkv(1, 4, 6, 2, 1, 8), **kw)


def packed(**kw):
    q, k, v = (x[0] for x in make_qkv(1, 4, 4, 2, 1, 8))
    return topk_attn.topk_attn_varlen_func(q, k, v, int32(0, 4), int32(0, 4), 4, 4, **kw)


def choose(**kw):
    return topk_attn.topk_select(*make_qkv(1, 4, 6, 2, 1, 8)[:2], **kw)


def decode(**kw):
    q, k, v = make_qkv(1, 1, 6, 2, 1, 8)
    return topk_attn.topk_attn_with_kvcache(q, k, v, cache_seqlens=int32(6), **kw)


CALLS = {"attend": attend, "packed": packed, "choose": choose, "decode": decode}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kw,words", SETTINGS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_settings(call, kw, words):
    refuses(lambda: CALLS[call](**kw), *words)


@pytest.mark.parametrize("call", ["attend", "packed", "decode"])
@pytest.mark.parametrize("kw,words", SCALES, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_softmax_scale(call, kw, words):
    refuses(lambda: CALLS[call](**kw), *words)


@pytest.mark.parametrize(
    "kw,words", [x for x in SETTINGS if not {"select", "sink", "recent"} & set(x[0])], ids=str
)
def test_budget_function(kw, words):
    refuses(lambda: topk_attn.budget(10, **kw), *words)


def test_budget_function_n():
    refuses(lambda: topk_attn.budget(-1, topk=3), "n", "-1")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "kw", [dict(topk="3"), dict(topk=2.5), dict(ratio="a"), dict(topk=3, sink=1.5), dict(top_k=3)], ids=str
)
def test_wrong_python_types(call, kw):
    refuses(lambda: CALLS[call](**kw))


@pytest.mark.parametrize("call", CALLS)
def test_settings_are_checked_on_empty_inputs_too(call):
    q = zeros(0, 4, 2, 8)
    if call == "attend":
        refuses(lambda: topk_attn.topk_attn_func(q, q, q, topk=0), "topk")
    elif call == "choose":
        refuses(lambda: topk_attn.topk_select(q, q, ratio=2.0), "ratio")
    elif call == "decode":
        refuses(
            lambda: topk_attn.topk_attn_with_kvcache(
                q, q, q, cache_seqlens=zeros(0, dtype=torch.int32), topk=0
            ),
            "topk",
        )
    else:
        e = zeros(0, 2, 8)
        refuses(lambda: topk_attn.topk_attn_varlen_func(e, e, e, int32(0), int32(0), 0, 0, topk=0), "topk")


# ------------------------------------------------------------------------------------------------------------
# q, k, v
# ------------------------------------------------------------------------------------------------------------

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

TENSORS = [
    # q, k, v shapes and dtypes, words of the message
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (F32, F16, F32), ["k", "dtype|float16|half"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (F32, F32, F64), ["v", "float64|double"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (BF16, F32, F32), ["k", "bfloat16"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (torch.int32,) * 3, ["q", "int"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (torch.bool,) * 3, ["q", "bool"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (torch.complex64,) * 3, ["q", "complex"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (torch.float8_e4m3fn,) * 3, ["q", "float8"]),
    ((1, 4, 2, 12), (1, 4, 1, 12), (1, 4, 1, 8), (F32,) * 3, ["head_dim|D", "12", "8"]),
    ((1, 4, 2, 264), (1, 4, 1, 264), (1, 4, 1, 8), (F32,) * 3, ["264", "256"]),
    ((1, 4, 2, 0), (1, 4, 1, 0), (1, 4, 1, 8), (F32,) * 3, ["0", "8"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 12), (F32,) * 3, ["v", "12", "8"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 264), (F32,) * 3, ["v", "264", "256"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 0), (F32,) * 3, ["v", "0"]),
    ((1, 4, 2, 8), (1, 4, 1, 16), (1, 4, 1, 8), (F32,) * 3, ["k", "16", "8"]),
    ((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8), (F32,) * 3, ["3", "2"]),
    ((1, 4, 1, 8), (1, 4, 2, 8), (1, 4, 2, 8), (F32,) * 3, ["1", "2"]),
    ((1, 4, 2, 8), (1, 4, 0, 8), (1, 4, 0, 8), (F32,) * 3, ["0"]),
    ((1, 4, 0, 8), (1, 4, 1, 8), (1, 4, 1, 8), (F32,) * 3, ["0"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 5, 1, 8), (F32,) * 3, ["v", "5", "4"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 2, 8), (F32,) * 3, ["v", "2", "1"]),
    ((2, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (F32,) * 3, ["k", "1", "2"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (2, 4, 1, 8), (F32,) * 3, ["v", "2", "1"]),
    ((4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (F32,) * 3, ["q", "3", "4"]),
    ((1, 4, 2, 8), (4, 1, 8), (1, 4, 1, 8), (F32,) * 3, ["k", "3", "4"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 1, 4, 1, 8), (F32,) * 3, ["v", "5", "4"]),
    ((), (), (), (F32,) * 3, ["q"]),
]


def refuses_any(call, words):
    """Like refuses, where a word may be given as alternatives a|b."""
    with pytest.raises(ERRORS) as info:
        call()
    message = str(info.value).split("Exception raised from")[0]
    for word in words:
        assert any(w.lower() in message.lower() for w in word.split("|")), (
            f"{word!r} is missing in: {message}"
        )
    assert "internal assert" not in message.lower(), message


@pytest.mark.parametrize("case", TENSORS, ids=lambda c: f"{c[:3]}-{c[3]}")
def test_tensors(case):
    q, k, v = (zeros(*shape, dtype=dtype) for shape, dtype in zip(case[:3], case[3], strict=True))
    refuses_any(lambda: topk_attn.topk_attn_func(q, k, v, topk=2), case[4])
    if "v" not in case[4]:
        refuses_any(lambda: topk_attn.topk_select(q, k, topk=2), case[4])
    words = [{"k": "k_cache|k ", "v": "v_cache|v "}.get(w, w) for w in case[4]]
    lengths = int32(*[1] * (case[0][0] if case[0] else 1))
    refuses_any(lambda: topk_attn.topk_attn_with_kvcache(q, k, v, cache_seqlens=lengths, topk=2), words)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_last_dimension_must_be_contiguous(which):
    args = list(make_qkv(1, 4, 4, 2, 2, 8))
    args[which] = args[which].transpose(2, 3).contiguous().transpose(2, 3)
    refuses(lambda: topk_attn.topk_attn_func(*args, topk=2), "qkv"[which], "contiguous")
    expanded = list(make_qkv(1, 4, 4, 2, 2, 8))
    expanded[which] = expanded[which][..., :1].expand(1, 4, 2, 8)
    refuses(lambda: topk_attn.topk_attn_func(*expanded, topk=2), "qkv"[which], "contiguous")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_devices_must_agree(which):
    args = list(make_qkv(1, 4, 4, 2, 2, 8))
    args[which] = args[which].to("meta")
    refuses(lambda: topk_attn.topk_attn_func(*args, topk=2), "meta")


def test_not_a_tensor():
    q, k, v = make_qkv(1, 4, 4, 2, 2, 8)
    for args in ((None, k, v), (q, [1.0], v), (q, k, 3)):
        refuses(lambda args=args: topk_attn.topk_attn_func(*args, topk=2))
    refuses(lambda: topk_attn.topk_attn_func(q, k, topk=2))


def test_sparse_and_quantised_tensors():
    q, k, v = make_qkv(1, 4, 4, 2, 2, 8)
    refuses(lambda: topk_attn.topk_attn_func(q.to_sparse(), k, v, topk=2))
    refuses(lambda: topk_attn.topk_attn_func(q, k.to_sparse(), v, topk=2))


# ------------------------------------------------------------------------------------------------------------
# Packed bounds
# ------------------------------------------------------------------------------------------------------------

I32 = torch.int32
GOOD = dict(cu_seqlens_q=int32(0, 3, 7), cu_seqlens_k=int32(0, 3, 7), max_seqlen_q=4, max_seqlen_k=4)
BOUNDS = [
    (dict(cu_seqlens_q=torch.tensor([0, 3, 7])), ["cu_seqlens_q", "int32"]),
    (dict(cu_seqlens_k=torch.tensor([0.0, 3, 7])), ["cu_seqlens_k", "int32"]),
    (dict(cu_seqlens_q=int32(1, 3, 7)), ["cu_seqlens_q", "0", "1"]),
    (dict(cu_seqlens_k=int32(-1, 3, 7)), ["cu_seqlens_k", "-1"]),
    (dict(cu_seqlens_q=int32(0, 5, 3)), ["cu_seqlens_q", "3", "5"]),
    (dict(cu_seqlens_k=int32(0, 9, 7)), ["cu_seqlens_k", "9"]),
    (dict(cu_seqlens_q=int32(0, 3, 8)), ["cu_seqlens_q", "8", "7"]),
    (dict(cu_seqlens_q=int32(0, 3, 6)), ["cu_seqlens_q", "6", "7"]),
    (dict(cu_seqlens_k=int32(0, 3, 2**31 - 1)), ["cu_seqlens_k", "2147483647"]),
    (dict(cu_seqlens_k=int32(0, -(2**31), 7)), ["cu_seqlens_k", "-2147483648"]),
    (dict(cu_seqlens_q=int32(0, 7)), ["cu_seqlens_q", "cu_seqlens_k"]),
    (dict(cu_seqlens_q=int32(0, 3, 7).reshape(1, 3)), ["cu_seqlens_q", "vector|dimension"]),
    (dict(cu_seqlens_q=torch.zeros(0, dtype=I32), cu_seqlens_k=torch.zeros(0, dtype=I32)), ["cu_seqlens_q"]),
    (dict(max_seqlen_q=3), ["max_seqlen_q", "3", "4"]),
    (dict(max_seqlen_k=3), ["max_seqlen_k", "3", "4"]),
    (dict(max_seqlen_q=0), ["max_seqlen_q", "0"]),
    (dict(max_seqlen_k=-1), ["max_seqlen_k", "-1"]),
    (dict(cu_seqlens_q=int32(0, 3, 7).to("meta")), ["cu_seqlens_q"]),
]


@pytest.mark.parametrize("change,words", BOUNDS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_packed_bounds(change, words):
    q, k, v = (x[0] for x in make_qkv(1, 7, 7, 2, 1, 8))
    bad = {**GOOD, **change}
    refuses_any(lambda: topk_attn.topk_attn_varlen_func(q, k, v, **bad, topk=2), words)
    refuses_any(lambda: topk_attn.topk_select(q, k, **bad, topk=2), words)


def test_packed_shapes():
    q, k, v = (x[0] for x in make_qkv(1, 7, 7, 2, 1, 8))
    bad = dict(GOOD)
    refuses(lambda: topk_attn.topk_attn_varlen_func(q[None], k, v, **bad, topk=2), "q", "4", "3")
    refuses(lambda: topk_attn.topk_attn_varlen_func(q, k, v[:6], **bad, topk=2), "v", "6", "7")
    refuses(lambda: topk_attn.topk_attn_varlen_func(q, k[:, :, ::2], v, **bad, topk=2), "k")


def test_packed_arguments_come_together():
    q, k, _ = (x[0] for x in make_qkv(1, 7, 7, 2, 1, 8))
    for missing in GOOD:
        some = {n: x for n, x in GOOD.items() if n != missing}
        if missing.startswith("cu"):
            refuses(lambda some=some: topk_attn.topk_select(q, k, **some, topk=2), missing)
        else:
            # Without a maximum the bounds themselves tell it, or the call says what is missing.
            try:
                topk_attn.topk_select(q, k, **some, topk=2)
            except ERRORS as error:
                assert missing in str(error)
    qd, kd, _ = make_qkv(1, 7, 7, 2, 1, 8)
    refuses(lambda: topk_attn.topk_select(qd, kd, max_seqlen_q=7, topk=2), "max_seqlen_q")


# ------------------------------------------------------------------------------------------------------------
# Cache
# ------------------------------------------------------------------------------------------------------------


def cache_call(**change):
    """A good paged call with new rows (2 sequences, pages of 4), with some arguments replaced."""
    args = dict(
        q=normal(2, 1, 4, 8),
        k_cache=normal(6, 4, 2, 8, seed=1),
        v_cache=normal(6, 4, 2, 16, seed=2),
        k=normal(2, 1, 2, 8, seed=3),
        v=normal(2, 1, 2, 16, seed=4),
        cache_seqlens=int32(5, 8),
        cache_leftpad=int32(0, 2),
        block_table=torch.tensor([[0, 2, 4], [1, 3, 5]], dtype=I32),
        topk=3,
    )
    args.update(change)
    return topk_attn.topk_attn_with_kvcache(**args)


def table(*rows):
    return torch.tensor(rows, dtype=I32)


CACHE = [
    (dict(cache_seqlens=torch.tensor([5, 8])), ["cache_seqlens", "int32"]),
    (dict(cache_seqlens=int32(5)), ["cache_seqlens", "1", "2"]),
    (dict(cache_seqlens=int32(5, 8, 9)), ["cache_seqlens", "3", "2"]),
    (dict(cache_seqlens=int32(5, 8).reshape(2, 1)), ["cache_seqlens"]),
    (dict(cache_seqlens=int32(-1, 8)), ["cache_seqlens", "-1"]),
    (dict(cache_seqlens=int32(5, 12)), ["cache_seqlens", "12"]),
    (dict(cache_seqlens=int32(5, 13), k=None, v=None), ["cache_seqlens", "13", "12"]),
    (dict(cache_seqlens=int32(5, 2**31 - 1)), ["cache_seqlens", "2147483647"]),
    (dict(cache_seqlens=int32(-(2**31), 8)), ["cache_seqlens", "-2147483648"]),
    (dict(cache_leftpad=torch.tensor([0, 2])), ["cache_leftpad", "int32"]),
    (dict(cache_leftpad=int32(0)), ["cache_leftpad", "1", "2"]),
    (dict(cache_leftpad=int32(-1, 0)), ["cache_leftpad", "-1"]),
    (dict(cache_leftpad=int32(0, 10)), ["cache_leftpad", "10"]),
    (dict(cache_leftpad=int32(6, 0), k=None, v=None), ["cache_leftpad", "6", "5"]),
    (dict(block_table=torch.tensor([[0, 2, 4], [1, 3, 5]])), ["block_table", "int32"]),
    (dict(block_table=table([0, 2, 4])), ["block_table", "1", "2"]),
    (dict(block_table=int32(0, 1)), ["block_table"]),
    (dict(block_table=table([0, 6, 4], [1, 3, 5])), ["block_table", "6"]),
    (dict(block_table=table([-1, 2, 4], [1, 3, 5])), ["block_table", "-1"]),
    (dict(block_table=table([0, 2, 4], [1, 3, 2**31 - 1])), ["block_table", "2147483647"]),
    (dict(block_table=table([0, 2], [1, 3])), ["cache_seqlens|block_table", "8"]),
    (dict(k=None), ["k", "v"]),
    (dict(v=None), ["k", "v"]),
    (dict(k=normal(1, 1, 2, 8)), ["k", "1", "2"]),
    (dict(k=normal(2, 2, 2, 8)), ["2", "1"]),
    (dict(k=normal(2, 1, 1, 8)), ["k", "1", "2"]),
    (dict(k=normal(2, 1, 2, 16)), ["k", "16", "8"]),
    (dict(v=normal(2, 1, 2, 8)), ["v", "8", "16"]),
    (dict(k=normal(2, 1, 2, 8).half()), ["k", "half|float16"]),
    (dict(v=normal(2, 1, 2, 16).double()), ["v", "double|float64"]),
    (dict(k=normal(2, 1, 16).transpose(1, 2)), ["k"]),
    (dict(k_cache=normal(5, 4, 2, 8)), ["k_cache|v_cache", "5", "6"]),
    (dict(v_cache=normal(6, 3, 2, 16)), ["v_cache|k_cache", "3", "4"]),
    (dict(k_cache=normal(6, 4, 2, 16)), ["k_cache", "16", "8"]),
    (dict(k_cache=normal(6, 4, 2, 8).double()), ["k_cache", "double|float64"]),
    (dict(v_cache=normal(6, 4, 1, 16)), ["v_cache", "1", "2"]),
    (dict(q=normal(2, 1, 3, 8)), ["3", "2"]),
    (dict(q=normal(3, 1, 4, 8)), ["3", "2"]),
    (dict(q=normal(2, 4, 8)), ["q", "3", "4"]),
    (dict(q=normal(2, 1, 8, 4).transpose(2, 3)), ["q", "contiguous"]),
    (dict(k_cache=normal(6, 4, 8, 2).transpose(2, 3)), ["k_cache", "contiguous"]),
    (dict(v_cache=normal(6, 4, 16, 2).transpose(2, 3)), ["v_cache", "contiguous"]),
    (dict(cache_seqlens=None), ["cache_seqlens"]),
    (dict(key_codes=torch.zeros(6, 4, 2, 8, dtype=torch.int8)), ["key_codes"]),
]


def name_of(x):
    if not isinstance(x, dict):
        return ""
    return ",".join(f"{n}={x[n].shape if isinstance(x[n], torch.Tensor) else x[n]}" for n in x)


@pytest.mark.parametrize("change,words", CACHE, ids=name_of)
def test_cache(change, words):
    cache_call()  # the unchanged call is good
    refuses_any(lambda: cache_call(**change), words)


def test_contiguous_cache_bounds():
    q, k, v = make_qkv(2, 1, 10, 4, 2, 8)
    new = normal(2, 3, 2, 8)

    def call(**kw):
        return topk_attn.topk_attn_with_kvcache(q, k.clone(), v.clone(), topk=3, **kw)

    refuses(lambda: call(cache_seqlens=int32(3, 11)), "cache_seqlens", "11", "10")
    refuses(lambda: call(k=new, v=new, cache_seqlens=int32(3, 8)), "cache_seqlens", "8", "3", "10")
    refuses(lambda: call(cache_seqlens=int32(3, 4), cache_leftpad=int32(0, 5)), "cache_leftpad", "5", "4")
    refuses(
        lambda: topk_attn.topk_attn_with_kvcache(q, k[:1], v[:1], cache_seqlens=int32(3, 4), topk=3),
        "k_cache",
        "1",
        "2",
    )


def test_nothing_is_written_before_an_error():
    """All checks come before the new rows are written."""
    k_cache, v_cache = normal(6, 4, 2, 8, seed=1), normal(6, 4, 2, 16, seed=2)
    before = k_cache.clone(), v_cache.clone()
    for change, _ in CACHE:
        if not {"k_cache", "v_cache"} & set(change):
            with pytest.raises(ERRORS):
                cache_call(k_cache=k_cache, v_cache=v_cache, **change)
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


def test_new_rows_into_an_expanded_cache_are_refused():
    """Several rows of the cache share memory: writing in place would overwrite other rows."""
    k = normal(1, 8, 2, 8).expand(2, 8, 2, 8)
    new = normal(2, 1, 2, 8)
    q = normal(2, 1, 4, 8)
    refuses(
        lambda: topk_attn.topk_attn_with_kvcache(
            q, k, k.clone(), new, new, cache_seqlens=int32(3, 3), topk=2
        ),
        "k_cache",
    )


# ------------------------------------------------------------------------------------------------------------
# select_scores, bwd
# ------------------------------------------------------------------------------------------------------------

SCORES = [
    (dict(topk=0), ["topk", "0"]),
    (dict(topk=-3), ["topk", "-3"]),
    (dict(scores=torch.zeros(5)), ["scores", "1", "2"]),
    (dict(scores=torch.zeros(2, 5, 3)), ["scores", "3", "2"]),
    (dict(scores=torch.zeros(2, 5, dtype=I32)), ["scores", "int"]),
    (dict(scores=torch.zeros(2, 5, dtype=F64)), ["scores", "double|float64"]),
    (dict(lengths=torch.tensor([5, 5])), ["lengths", "int32"]),
    (dict(lengths=int32(5)), ["lengths", "1", "2"]),
    (dict(lengths=int32(5, 6)), ["lengths", "6", "5"]),
    (dict(lengths=int32(-1, 5)), ["lengths", "-1"]),
    (dict(lengths=int32(5, 5).reshape(2, 1)), ["lengths"]),
    (dict(scores=torch.zeros(5, 2).T), ["scores", "contiguous"]),
]


@pytest.mark.parametrize("change,words", SCORES, ids=name_of)
def test_select_scores(change, words):
    args = dict(scores=torch.zeros(2, 5), topk=3, lengths=int32(5, 5))
    topk_attn.topk_select_scores(**args)
    refuses_any(lambda: topk_attn.topk_select_scores(**{**args, **change}), words)


def bwd_call(keys=6, **change):
    q, k, v = make_qkv(1, 5, keys, 4, 2, 8, 16)
    out, lse, threshold, tie_index, kept_index, kept_prob = torch.ops.topk_attn.fwd(
        q, k, v, topk=3, kept="lists"
    )
    args = dict(
        dout=torch.ones_like(out),
        dlse=torch.ones_like(lse),
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        threshold=threshold,
        tie_index=tie_index,
        kept_index=kept_index,
        kept_prob=kept_prob,
    )
    args.update(change)
    return torch.ops.topk_attn.bwd(**args, topk=3)


BACKWARD = [
    (dict(dout=torch.ones(1, 5, 4, 8)), ["dout", "8", "16"]),
    (dict(dout=torch.ones(1, 5, 4, 16, dtype=F64)), ["dout", "double|float64"]),
    (dict(dlse=torch.ones(1, 5, 4)), ["dlse"]),
    (dict(dlse=torch.ones(1, 4, 5, dtype=F64)), ["dlse", "double|float64"]),
    (dict(out=torch.ones(1, 5, 4, 8)), ["out"]),
    (dict(lse=torch.ones(1, 4, 4)), ["lse"]),
    (dict(lse=torch.ones(1, 4, 5, dtype=F64)), ["lse", "double|float64"]),
    (dict(threshold=torch.ones(4, 5)), ["threshold"]),
    (dict(tie_index=torch.ones(1, 4, 5)), ["tie_index", "int"]),
    (dict(tie_index=torch.ones(1, 4, 3, dtype=I32)), ["tie_index"]),
    (dict(k=normal(1, 6, 2, 16)), ["k", "16", "8"]),
]


@pytest.mark.parametrize("change,words", BACKWARD, ids=name_of)
def test_backward_operator(change, words):
    bwd_call()
    refuses_any(lambda: bwd_call(**change), words)


def test_backward_operator_kept_lists():
    """Kept lists of a wrong shape, or with keys outside the row, touch no memory out of bounds."""
    keys = 48  # enough for the forward to save its lists
    q, k, v = make_qkv(1, 5, keys, 4, 2, 8, 16)
    kept = torch.ops.topk_attn.fwd(q, k, v, topk=3, kept="lists")[4:]
    assert kept[0].shape == (1, 4, 5, 3)
    refuses(lambda: bwd_call(keys, kept_index=kept[0][..., :1].contiguous()), "kept_index")
    refuses(lambda: bwd_call(keys, kept_prob=kept[1].double()), "kept_prob")
    for bad in (keys, -2, 2**31 - 1, -(2**31)):
        wrong = kept[0].clone()
        wrong.view(-1)[0] = bad
        refuses(lambda wrong=wrong: bwd_call(keys, kept_index=wrong), "kept_index")


def test_backward_operator_with_a_foreign_encoding():
    """An encoding that does not belong to q and k is an error or harmless, never an access out of bounds."""
    for threshold, tie_index in (
        (math.inf, 0),
        (math.nan, -1),
        (-math.inf, 5),
        (0.0, 2**31 - 1),
        (0.0, -(2**31)),
    ):
        none = dict(kept_index=torch.zeros(1, 4, 5, 0, dtype=I32), kept_prob=torch.zeros(1, 4, 5, 0))
        change = dict(
            threshold=torch.full((1, 4, 5), threshold), tie_index=torch.full((1, 4, 5), tie_index, dtype=I32)
        )
        try:
            grads = bwd_call(**none, **change)
        except ERRORS as error:
            assert "threshold" in str(error) or "tie_index" in str(error)
        else:
            assert [tuple(g.shape) for g in grads] == [(1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 16)]
