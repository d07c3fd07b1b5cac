"""The certified scan (`key_codes`): the sets of the exact scan and of training, bit for bit, and statistics
that say that the certificate served."""

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from certified_helpers import (
    BF16_ALONE,
    CERTIFIED_CARD,
    COMPARED,
    HALVES,
    KINDS,
    RESULTS,
    Cache,
    assert_served,
    make_keys,
    make_queries,
    random,
    same_as_training,
    same_sets,
)
from cuda_helpers import BF16, DEVICE, F16, name_of, normal
from op_helpers import assert_same

import topk_attn

pytestmark = CERTIFIED_CARD


@pytest.fixture(autouse=True, scope="module")
def told():
    yield
    print(f"\n{COMPARED.rows} rows compared")


# ------------------------------------------------------------------------------------------------------------
# The same sets
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [None, 16, 48])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_sets(dtype, kind, page):
    """Against the exact scan and against training: ragged lengths, an empty sequence, one of one key."""
    if dtype == F16 and kind in BF16_ALONE:
        pytest.skip("beyond fp16")
    for d, kw in ((128, dict(ratio=0.01, min_keys=4)), (64, dict(topk=300, sink=3, recent=70))):
        lengths = [12000, 0, 1, 9001, 5000]
        keys = make_keys(kind, 5, 12016, 2, d, dtype, seed=d)
        cache = Cache(keys, lengths, page, pads=[0, 0, 0, 40, 4990] if d == 64 else None)
        q = make_queries(kind, 5, 1, 8, d, dtype)
        got, stats = same_sets(cache, q, kind, **kw)
        same_as_training(cache, q, got, kind, **kw)
        if kind in ("normal", "outliers", "offset"):
            assert_served(stats, what=kind)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("page", [None, 64])
@pytest.mark.parametrize("kind", ["normal", "outliers", "permuted", "integers"])
def test_batches(batch, page, kind):
    n = 40000 if batch == 1 else 9000
    lengths = [n - 131 * i for i in range(batch)]
    keys = make_keys(kind, batch, n, 2, 128, BF16)
    cache, q = Cache(keys, lengths, page), make_queries(kind, batch, 1, 8, 128, BF16)
    got, stats = same_sets(cache, q, kind, ratio=0.01)
    same_as_training(cache, q, got, kind, ratio=0.01)
    if kind in ("normal", "outliers"):
        assert_served(stats, 8 * batch, kind)


@pytest.mark.parametrize("h,hkv,tq", [(1, 1, 1), (8, 1, 1), (6, 2, 2), (8, 2, 2), (4, 4, 8), (16, 8, 4)])
@pytest.mark.parametrize("d", [8, 40, 64, 96, 128])
def test_heads_tokens_and_dims(h, hkv, tq, d):
    """Up to 8 query rows a KV head: groups, and tokens of speculative decoding."""
    cache = Cache(make_keys("outliers", 2, 9000, hkv, d, BF16), [9000, 8500], 16)
    q = make_queries("normal", 2, tq, h, d, BF16)
    got, stats = same_sets(cache, q, ratio=0.02)
    same_as_training(cache, q, got, ratio=0.02)
    assert_served(stats, 2 * h * tq)


@pytest.mark.parametrize("w", [1, 3, 300, 2048, 6000])
@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_one_long_sequence(w, kind):
    cache = Cache(make_keys(kind, 1, 131072, 2, 128, BF16), [131072])
    q = make_queries(kind, 1, 1, 8, 128, BF16)
    got, stats = same_sets(cache, q, kind, topk=w)
    same_as_training(cache, q, got, kind, topk=w)
    assert_served(stats, 8, f"{kind} W {w}")


def test_a_million_keys():
    cache = Cache(make_keys("normal", 1, 1 << 20, 1, 128, BF16), [1 << 20])
    got, stats = same_sets(cache, make_queries("normal", 1, 1, 4, 128, BF16), ratio=0.01)
    assert_served(stats, 4, "a million")


def test_the_shape_that_is_timed():
    """B8, H 32, Hkv 8: every row is served by the certificate."""
    for kind in ("normal", "outliers"):
        cache = Cache(make_keys(kind, 8, 32768, 8, 128, BF16), [32768] * 8)
        for kw in (dict(ratio=0.01), dict(topk=2048)):
            _, stats = same_sets(cache, make_queries("normal", 8, 1, 32, 128, BF16), kind, **kw)
            assert_served(stats, 256, kind)


def test_real_keys():
    """Queries and keys of SmolLM2 (TOPK_REAL, benchmarks/gpu/capture_smollm2.py): the last tokens of every
    document, against training too."""
    path = os.environ.get("TOPK_REAL", "")
    if not Path(path).is_file():
        pytest.skip("TOPK_REAL names no capture")
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
    from gpu import real

    prefix = real.Prefix(Path(path), DEVICE)
    for stretch in (1, 4):
        captured = prefix.capture(stretch, prefix.tokens)
        for layer in prefix.layers:
            q, k, _ = captured[layer]
            b, n = k.shape[:2]
            cache = Cache(k, [n - 7 * i for i in range(b)], 64 if layer % 2 else None)
            rows = torch.stack([q[i, length - 2 : length] for i, length in enumerate(cache.lengths)])
            for kw in (dict(ratio=0.01), dict(ratio=0.05, min_keys=8)):
                got, stats = same_sets(cache, rows, f"layer {layer}", **kw)
                same_as_training(cache, rows, got, f"layer {layer}", **kw)
                assert_served(stats, what=f"layer {layer}, {b} x {n}, {kw}")


# ------------------------------------------------------------------------------------------------------------
# Caches that grow
# ------------------------------------------------------------------------------------------------------------


def append(cache: Cache, q, tokens, seed, **kw):
    """Certified first, which writes the rows and their codes; then exact over the same cache."""
    new = [
        random(len(cache.lengths), tokens, *cache.k.shape[2:], seed=seed + x).to(cache.k.dtype)
        for x in (0, 1)
    ]
    before = cache.seqlens.clone()
    got = cache.call(q, "certified", new=new, **kw)
    cache.seqlens += tokens
    want = cache.call(q, "exact", **kw)
    cache.seqlens.copy_(before)
    for name, a, b in zip(RESULTS, got, want, strict=True):
        assert_same(a, b, f"after {seed}: {name}")
    COMPARED.rows += want[4].numel()
    for i in range(len(cache.lengths)):
        cache.keys[i, cache.lengths[i] : cache.lengths[i] + tokens] = new[0][i]
        cache.lengths[i] += tokens
    cache.seqlens += tokens
    return got


@pytest.mark.parametrize("page", [None, 16, 7])
@pytest.mark.parametrize("tokens", [1, 2])
def test_steps(page, tokens):
    """Hundreds of appended rows, whose codes are wrong until they are written: a row that was forgotten, or
    written to the wrong place, would fail. New rows are the larger ones, so that they are kept."""
    steps = 300
    keys = torch.cat(
        [make_keys("normal", 2, 8300, 2, 64, BF16), torch.zeros(2, 700, 2, 64, dtype=BF16, device=DEVICE)], 1
    )
    keys[:, :8300] *= 0.25
    cache = Cache(keys, [8300, 61], page)
    for step in range(steps):
        q = normal(2, tokens, 8, 64, dtype=BF16, seed=step)
        got = append(cache, q, tokens, 1000 + 7 * step, ratio=0.02, min_keys=8)
        if step % 50 == 49:
            same_as_training(cache, q, got, f"step {step}", ratio=0.02, min_keys=8)
    stats = cache.stats()
    assert stats.rows == steps * 2 * 8 * tokens
    assert_served(stats, what=f"{steps} steps")


def test_the_exact_scan_keeps_codes_up():
    """Rows written while the exact scan served have codes too."""
    keys = torch.cat(
        [make_keys("normal", 1, 9000, 2, 128, BF16), torch.zeros(1, 100, 2, 128, dtype=BF16, device=DEVICE)],
        1,
    )
    keys *= 0.25
    cache = Cache(keys, [9000])
    for step in range(20):
        new = [random(1, 3, 2, 128, seed=step + x).bfloat16() for x in (0, 50)]
        cache.call(normal(1, 1, 8, 128, dtype=BF16, seed=step), "exact", new=new, topk=90)
        cache.seqlens += 3
    assert cache.stats().rows == 0
    _, stats = same_sets(cache, normal(1, 1, 8, 128, dtype=BF16, seed=3), topk=90)
    assert_served(stats, 8)


def test_wrong_codes_are_found():
    """These comparisons can fail: one wrong code among 9,000, of a key that is kept, shows."""
    cache = Cache(make_keys("normal", 1, 9000, 1, 128, BF16), [9000])
    q = make_queries("normal", 1, 1, 4, 128, BF16)
    got, _ = same_sets(cache, q, topk=90)
    best = int(got[2][0, 0, 0, 0])
    views = topk_attn.cuda.key_codes_views(cache.codes, cache.k)
    views.codes[0, 0, best] *= -1
    with pytest.raises(AssertionError):
        same_sets(cache, q, topk=90)
    views.words[0, 0, best] = 0  # not known: looked at exactly
    same_sets(cache, q, topk=90)


def test_without_calibration_and_after_another():
    """A buffer that was never fitted, one fitted to other keys, and sequences whose codes were forgotten when
    it was fitted anew: right in any case."""
    keys = make_keys("outliers", 3, 9000, 2, 128, BF16)
    cache = Cache(keys, [9000, 8900, 8800], 16, encoded=False)  # a row's list holds 8,192 keys
    q = make_queries("normal", 3, 1, 8, 128, BF16)
    _, stats = same_sets(cache, q, "unknown", ratio=0.01)
    assert stats.rows == 24 and stats.certified == 0
    cache.rebuild(calibrate=False)
    _, stats = same_sets(cache, q, "not fitted", ratio=0.01)
    assert stats.rows == 24
    print(stats)
    table, lengths = cache.extra["block_table"], cache.seqlens
    topk_attn.cuda.rebuild_key_codes(cache.codes, cache.k, lengths[1:2], block_table=table[1:2])
    _, stats = same_sets(cache, q, "fitted to one sequence", ratio=0.01)
    assert stats.certified == 8
    topk_attn.cuda.rebuild_key_codes(cache.codes, cache.k, lengths, block_table=table, calibrate=False)
    _, stats = same_sets(cache, q, "fitted", ratio=0.01)
    assert_served(stats, 24)


def test_mean_that_moves():
    """Keys appended later have another mean and other spreads than those that the buffer was fitted to."""
    keys = make_keys("normal", 2, 12000, 2, 128, BF16)
    keys[:, 6000:] = make_keys("outliers", 2, 6000, 2, 128, BF16, seed=3)
    cache = Cache(keys, [6000, 6000])
    q = make_queries("normal", 2, 1, 8, 128, BF16)
    new = [x[:, 6000:11000] for x in (keys, cache.values)]
    cache.call(q, "certified", new=new, ratio=0.01)
    cache.lengths = [11000, 11000]
    cache.seqlens += 5000
    got, stats = same_sets(cache, q, ratio=0.01)
    same_as_training(cache, q, got, ratio=0.01)
    print(stats)


@pytest.mark.parametrize("page", [None, 32])
def test_graph_replays_while_lengths_grow(page):
    """Captured once; every replay appends, encodes and decodes at the lengths that the device holds."""
    tokens, b, h, hkv, d, room = 2, 3, 8, 2, 128, 9600
    keys = make_keys("normal", b, room, hkv, d, BF16) * 0.25
    cache = Cache(keys, [8200, 9000, 3], page)
    q = torch.empty(b, tokens, h, d, dtype=BF16, device=DEVICE)
    new = [torch.empty(b, tokens, hkv, d, dtype=BF16, device=DEVICE) for _ in "kv"]
    kw = dict(ratio=0.01, min_keys=4)

    def fill(turn):
        for i, x in enumerate((q, *new)):
            x.copy_(random(*x.shape, seed=100 + 10 * turn + i))

    fill(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cache.call(q, "certified", new=new, **kw)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cache.call(q, "certified", new=new, **kw)
    cache.stats()
    for turn in range(30):
        fill(turn)
        graph.replay()
        got = [x.clone() for x in captured]
        cache.seqlens += tokens
        want = cache.call(q, "exact", **kw)
        for name, x, y in zip(RESULTS, got, want, strict=True):
            assert_same(x, y, f"turn {turn}: {name}")
        COMPARED.rows += want[4].numel()
    assert_served(cache.stats(), 30 * b * h * tokens)


def test_bad_lengths_and_pages():
    """Sequences that count as empty: nothing is written, codes included, and the others are right."""
    keys = make_keys("normal", 4, 9000, 2, 64, BF16)
    cache = Cache(keys, [8000] * 4, 16)
    new = [random(4, 1, 2, 64, seed=x).bfloat16() for x in (1, 2)]
    q = make_queries("normal", 4, 1, 8, 64, BF16)
    cache.seqlens[1] = 9100
    cache.extra["block_table"][2, 5] = 10**6
    views = topk_attn.cuda.key_codes_views(cache.codes, cache.k)
    before = views.words.clone()
    got = cache.call(q, "certified", new=new, ratio=0.01)
    for i in (1, 2):
        assert bool((got[0][i] == 0).all()) and bool((got[1][i] == -math.inf).all())
        assert bool((got[2][i] == -1).all())
    table = cache.extra["block_table"]
    changed = (views.words != before).any(1).nonzero().tolist()
    assert sorted(changed) == sorted([int(table[i, 500]), 8000 % 16] for i in (0, 3)), changed
    want = cache.call(q, "exact", new=new, ratio=0.01)
    for name, a, b in zip(RESULTS, got, want, strict=True):
        assert_same(a, b, name)


# ------------------------------------------------------------------------------------------------------------
# The fallback
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("h,tq", [(8, 1), (4, 3)])
def test_forced_overflow(page, h, tq):
    """Lists that are too short: every row is repaired, to the same set."""
    cache = Cache(make_keys("normal", 2, 9000, 2, 128, BF16), [9000, 8888], page)
    q = make_queries("normal", 2, tq, h, 128, BF16)
    want = cache.call(q, "exact", ratio=0.02)
    with topk_attn.cuda.override(scan="certified", list_room=100):
        got = cache.call(q, None, ratio=0.02)
    for name, a, b in zip(RESULTS, got, want, strict=True):
        assert_same(a, b, name)
    stats = cache.stats()
    assert stats.rows == 2 * h * tq and stats.certified == 0 and stats.listed == 0, stats
    got, stats = same_sets(cache, q, ratio=0.02)
    assert_served(stats, 2 * h * tq)


def test_equal_keys_are_repaired():
    """No certificate can choose among equal keys: the fallback does, by index."""
    cache = Cache(make_keys("equal", 1, 9000, 2, 128, BF16), [9000])
    got, stats = same_sets(cache, make_queries("normal", 1, 1, 8, 128, BF16), topk=50)
    assert stats.rows == 8 and stats.certified == 0
    assert_same(got[2], torch.arange(50, device=DEVICE).int().expand(1, 8, 1, 50), "indices")


# ------------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------------


def test_no_host_synchronisation():
    cache = Cache(make_keys("normal", 2, 9600, 2, 64, BF16), [9000, 9001], 16)
    q = make_queries("normal", 2, 1, 8, 64, BF16)
    new = [random(2, 1, 2, 64, seed=x).bfloat16() for x in (3, 4)]
    for synchronised in (True, False):  # the first round loads the kernels
        torch.cuda.synchronize()
        if not synchronised:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                cache.call(q, "certified", new=new, ratio=0.01)
                cache.rebuild()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_repeats_and_streams():
    """The same bits from run to run, also where several streams use one buffer."""
    cache = Cache(make_keys("normal", 3, 20000, 2, 128, BF16), [20000, 12000, 77], 16)
    q = make_queries("normal", 3, 1, 8, 128, BF16)
    want = cache.call(q, "certified", topk=400)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(cache.call(q, "certified", topk=400))
    torch.cuda.synchronize()
    for got in results:
        for name, a, b in zip(RESULTS, got, want, strict=True):
            assert_same(a, b, name)
    stats = cache.stats()
    assert stats.rows == 31 * 24 and stats.certified == stats.rows, stats
