"""Key codes: which scan the plan takes, the operators that make and read codes, and what they refuse."""

import pytest
import torch
from certified_helpers import CERTIFIED_CARD, Cache, make_keys, make_queries, random
from cuda_helpers import BF16, DEVICE, F32, int32, refuses
from op_helpers import assert_same

import topk_attn

pytestmark = CERTIFIED_CARD

# ------------------------------------------------------------------------------------------------------------
# The plan
# ------------------------------------------------------------------------------------------------------------


def planned(q, cache, **kw):
    table = cache.extra.get("block_table")
    return topk_attn.cuda.decode_plan(q, cache.k, cache.v, block_table=table, key_codes=cache.codes, **kw)


def test_plan():
    n = 1 << 18
    cache = Cache(make_keys("normal", 1, n, 2, 128, BF16), [n])
    q = make_queries("normal", 1, 1, 8, 128, BF16)
    assert planned(q, cache, ratio=0.01).scan == "certified"
    for b, page, room in ((1, None, n - 1), (64, 64, 8192)):
        small = Cache(torch.zeros(b, room, 2, 64, dtype=BF16, device=DEVICE), [9] * b, page)
        plan = planned(make_queries("normal", b, 1, 8, 64, BF16), small, ratio=0.01)
        assert plan.scan == "exact" and str(room) in plan.reason, plan
    for kw, reason in (
        (dict(ratio=0.0601), "6 %"),
        (dict(topk=16384), "6 %"),
        (dict(ratio=0.01, select="kv_group"), "select"),
    ):
        plan = planned(q, cache, **kw)
        assert plan.scan == "exact" and reason in plan.reason, plan
        cache.call(q, None, **kw)
        assert cache.stats().rows == 0
    assert "query rows" in planned(make_queries("normal", 1, 3, 8, 128, BF16), cache, topk=9).reason
    bare = topk_attn.cuda.decode_plan(q, cache.k, cache.v, topk=9)
    assert bare.scan == "exact" and "key_codes" in bare.reason
    cache.call(q, None, ratio=0.01)
    assert cache.stats().rows == 8
    with topk_attn.cuda.override(scan="exact"):
        assert planned(q, cache, ratio=0.01).scan == "exact"
    with topk_attn.cuda.override(scan="certified"):
        assert planned(q, cache, ratio=0.09).scan == "certified"


def test_plan_is_pure():
    """The same answer again, and no work on the device."""
    cache = Cache(make_keys("normal", 8, 40000, 2, 128, BF16), [40000] * 8)
    q = make_queries("normal", 8, 1, 8, 128, BF16)
    first = planned(q, cache, ratio=0.01)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert all(planned(q, cache, ratio=0.01) == first for _ in range(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == allocated
    assert cache.stats().rows == 0


def test_requests_that_cannot_be_served():
    cache = Cache(make_keys("normal", 1, 9000, 2, 128, BF16), [9000])
    q = make_queries("normal", 1, 1, 8, 128, BF16)
    with topk_attn.cuda.override(scan="certified"):
        refuses(lambda: cache.call(q, None, topk=9, select="kv_group"), "certified", "head")
        refuses(lambda: cache.call(make_queries("normal", 1, 3, 8, 128, BF16), None, topk=9), "8", "12")
        refuses(
            lambda: topk_attn.topk_attn_with_kvcache(
                q, cache.k, cache.v, cache_seqlens=cache.seqlens, topk=9
            ),
            "key_codes",
        )
    with topk_attn.cuda.override(scan="other"):
        refuses(lambda: cache.call(q, None, topk=9), "scan", "other")
    assert planned(q, cache, topk=9).scan == "exact"  # the wish is over


# ------------------------------------------------------------------------------------------------------------
# The operators
# ------------------------------------------------------------------------------------------------------------


def test_errors():
    new = topk_attn.cuda.new_key_codes
    k = torch.zeros(2, 32, 2, 64, dtype=BF16, device=DEVICE)
    refuses(lambda: new(k.float()), "k_cache", "bfloat16")
    refuses(lambda: new(torch.zeros(2, 32, 2, 136, dtype=BF16, device=DEVICE)), "128", "136")
    refuses(lambda: new(k[0]), "k_cache", "4")
    refuses(lambda: new(k.cpu()), "CUDA")
    codes, lengths = new(k), int32(3, 4)
    q = torch.zeros(2, 1, 4, 64, dtype=BF16, device=DEVICE)

    def call(key_codes):
        return topk_attn.topk_attn_with_kvcache(q, k, k, cache_seqlens=lengths, key_codes=key_codes, topk=3)

    refuses(lambda: call(codes[:-16]), "key_codes", str(codes.numel()))
    refuses(lambda: call(codes.view(torch.int16)), "key_codes", "int8")
    refuses(lambda: call(codes.view(2, -1)), "key_codes", "1")
    refuses(lambda: call(codes.cpu()), "key_codes", "one device")
    moved = torch.cat([codes, codes[:1]])[1:]
    refuses(lambda: call(moved), "key_codes", "16")
    rebuild = topk_attn.cuda.rebuild_key_codes
    refuses(lambda: rebuild(codes, k, lengths[:1]), "cache_seqlens", "2")
    refuses(lambda: rebuild(codes, k, lengths.long()), "cache_seqlens", "int32")
    refuses(lambda: rebuild(codes[:-16], k, lengths), "key_codes")
    with pytest.raises(ValueError, match="key_codes"):
        topk_attn.cuda.key_codes_views(codes[:-16], k)


@pytest.mark.parametrize("d", [8, 64, 72, 128])
@pytest.mark.parametrize("shape", [(3, 5), (2, 17), (1, 4096)])
def test_layout(d, shape):
    """The views cover the buffer, and what is encoded lies where they say."""
    k = random(*shape, 2, d).bfloat16()
    codes = topk_attn.cuda.new_key_codes(k)
    assert codes.dtype == torch.int8 and not bool(codes.any())
    lengths = int32(*[shape[1]] * shape[0])
    topk_attn.cuda.rebuild_key_codes(codes, k, lengths)
    views = topk_attn.cuda.key_codes_views(codes, k)
    width = 64 if d <= 64 else 128
    assert views.codes.shape == (shape[0], 2, shape[1], width) and views.stats.shape == (8,)
    assert bool((views.words != 0).all()) and not bool(views.stats.any())
    assert not bool(views.codes[..., d:].any())
    # Decoded, the keys come back within half a step of the scale.
    unit = (views.words & -65536).view(F32)[..., None] * torch.exp2(views.exponent.float())[None, :, None]
    keys = views.codes.float() * unit + views.center[None, :, None]
    error = (keys[..., :d] - k.transpose(1, 2).float()).abs()
    assert bool((error <= 0.501 * unit[..., :d]).all()), (error / unit[..., :d]).max()


def operator_cases():
    ops = torch.ops.topk_attn
    k, v = random(2, 300, 2, 64).bfloat16(), random(2, 300, 2, 64, seed=1).bfloat16()
    q = random(2, 1, 4, 64, seed=2).bfloat16()
    lengths, codes = int32(200, 250), topk_attn.cuda.new_key_codes(k)
    topk_attn.cuda.rebuild_key_codes(codes, k, lengths)
    new = [random(2, 1, 2, 64, seed=x).bfloat16() for x in (3, 4)]
    return {
        "new": (ops.key_codes_new, (k,), {}),
        "rebuild": (ops.key_codes_rebuild, (codes, k, lengths), dict(calibrate=False)),
        "calibrate": (ops.key_codes_rebuild, (codes, k, lengths), {}),
        "decode": (ops.fwd_kvcache, (q, k, v, None, None, lengths, None, None, codes), dict(topk=9)),
        "append": (ops.fwd_kvcache, (q, k, v, *new, lengths, None, None, codes), dict(topk=9)),
    }


@pytest.mark.parametrize("name", ["new", "rebuild", "calibrate", "decode", "append"])
def test_opcheck(name):
    op, args, kwargs = operator_cases()[name]
    torch.library.opcheck(op, args, kwargs)


def test_schema_says_what_is_written():
    ops = torch.ops.topk_attn
    written = {
        a.name for a in ops.fwd_kvcache.default._schema.arguments if a.alias_info and a.alias_info.is_write
    }
    assert written == {"k_cache", "v_cache", "key_codes"}
    arguments = ops.key_codes_rebuild.default._schema.arguments
    assert [a.name for a in arguments if a.alias_info and a.alias_info.is_write] == ["key_codes"]
    op, args, kwargs = operator_cases()["append"]
    versions = [args[8]._version, args[1]._version]
    op(*args, **kwargs)
    assert args[8]._version > versions[0] and args[1]._version > versions[1]


def test_compiled():
    """torch.compile sees that codes are written."""
    keys = make_keys("normal", 1, 9000, 2, 64, BF16) * 0.25
    cache = Cache(keys, [8500])
    other = Cache(keys, [8500])
    q = make_queries("normal", 1, 1, 4, 64, BF16)
    new = [random(1, 1, 2, 64, seed=x).bfloat16() for x in (3, 4)]

    def step(q, k, v, codes, lengths, new_k, new_v):
        out = topk_attn.topk_attn_with_kvcache(
            q, k, v, new_k, new_v, cache_seqlens=lengths, key_codes=codes, topk=60
        )
        return out + topk_attn.topk_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths + 1, key_codes=codes, topk=60
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with topk_attn.cuda.override(scan="certified"):
        got = compiled(q, cache.k, cache.v, cache.codes, cache.seqlens, *new)
        want = step(q, other.k, other.v, other.codes, other.seqlens, *new)
    assert_same(got, want, "out")
    views = [topk_attn.cuda.key_codes_views(c.codes, c.k) for c in (cache, other)]
    assert_same(views[0].codes[:, :, :8501], views[1].codes[:, :, :8501], "codes")
    assert_same(views[0].words[:, :, :8501], views[1].words[:, :, :8501], "words")
