"""topk_select: exact sets, by the kernels' own scores and by float64, over lengths, budgets and layouts."""

import cuda_reference as reference
import pytest
import torch
from cuda_helpers import (
    BF16,
    DEVICE,
    DTYPES,
    F16,
    F32,
    PLANNED,
    assert_encoding,
    bounds,
    builds,
    check_selection,
    every_way,
    int32,
    make_qkv,
    own_scores,
    ranked_scores,
    served,
    ways,
)
from op_helpers import ORDER_KINDS, assert_same, selection_kwargs
from oracle import Settings

import topk_attn

LONGEST = 257
SELECTIONS = ("slab", "fused")


def budget_of_length(n: int) -> Settings:
    return (Settings(ratio=0.13, min_keys=2), Settings(topk=1 + n // 5), Settings(topk=64))[n % 3]


@every_way(dims=(64,), regimes=False)
def test_every_length(dtype, d, way):
    """S = 1 to 257 one by one. A score does not depend on the length, so one table of them serves all."""
    q, k, _ = make_qkv(1, LONGEST, LONGEST, 2, 1, d, dtype=dtype, seed=1)
    with way.used():
        scores = own_scores(q, k)
        for n in range(1, LONGEST + 1):
            check_selection(q[:, :n], k[:, :n], budget_of_length(n), scores[..., :n, :n])


@every_way(dtypes=(BF16, F32), dims=(64,), regimes=False)
def test_every_length_in_one_pack(dtype, d, way):
    """Documents of 0 to 257 tokens, shuffled: each has the encoding of the document alone."""
    lengths = [(n * 101) % (LONGEST + 1) for n in range(LONGEST + 1)]
    assert sorted(lengths) == list(range(LONGEST + 1))
    cu = bounds(lengths)
    q, k, _ = (x[0] for x in make_qkv(1, sum(lengths), sum(lengths), 2, 1, d, dtype=dtype, seed=2))
    s = dict(ratio=0.07, min_keys=3)
    with way.used():
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        pack = dict(zip(names, (cu, cu, LONGEST, LONGEST), strict=True))
        threshold, tie_index, indices = topk_attn.topk_select(q, k, **pack, **s, return_indices=True)
        without = topk_attn.topk_select(q, k, **pack, **s)
        assert_same(without[0], threshold, "threshold without lists")
        assert_same(without[1], tie_index, "tie_index without lists")
        start = 0
        for n in lengths:
            rows = slice(start, start + n)
            start += n
            if n == 0:
                continue
            alone = topk_attn.topk_select(q[None, rows], k[None, rows], **s, return_indices=True)
            assert_same(threshold[:, rows], alone[0][0], f"threshold, length {n}")
            assert_same(tie_index[:, rows], alone[1][0], f"tie_index, length {n}")
            width = alone[2].shape[-1]
            assert_same(indices[:, rows, :width], alone[2][0], f"indices, length {n}")
            assert bool((indices[:, rows, width:] == -1).all())


@every_way(regimes=False)
@pytest.mark.parametrize("tq,tk", [(1, 1), (1, 300), (300, 1), (70, 333), (333, 70), (129, 128), (128, 129)])
def test_unequal_lengths(dtype, d, way, tq, tk):
    q, k, _ = make_qkv(2, tq, tk, 4, 2, d, dtype=dtype, seed=tq)
    with way.used():
        scores = own_scores(q, k)
        for causal in (True, False):
            for s in (Settings(topk=9), Settings(ratio=0.2)):
                check_selection(q, k, s.but(causal=causal), scores)


@every_way(regimes=False)
@pytest.mark.parametrize("kind", [*ORDER_KINDS, "clustered"])
def test_hard_orders(dtype, d, way, kind):
    """Ties (all equal, two values, every key twice), signed zeros, and scores that differ in last bits."""
    q, k, _ = make_qkv(1, 150, 300, 4, 2, d, dtype=dtype, seed=11, kind=kind)
    with way.used():
        scores = own_scores(q, k)
        for s in (
            Settings(topk=1),
            Settings(topk=9),
            Settings(ratio=0.5, causal=False),
            Settings(topk=17, sink=3, recent=5),
        ):
            for select in ("head", "kv_group"):
                check_selection(q, k, s.but(select=select), scores)


BUDGETS = [
    Settings(topk=1),
    Settings(topk=7),
    Settings(topk=200),
    Settings(topk=10**9),
    Settings(topk=2**62),
    Settings(ratio=1.0),
    Settings(ratio=0.07),
    Settings(ratio=1e-9),
    Settings(ratio=0.5, max_keys=4),
    Settings(ratio=0.01, min_keys=5),
    Settings(ratio=0.3, min_keys=4, max_keys=4),
    Settings(topk=3, min_keys=9),
    Settings(topk=20, max_keys=6),
    Settings(topk=5, min_keys=2**62),
    Settings(topk=5, max_keys=2**62),
]
ALWAYS = [
    dict(),
    dict(sink=1),
    dict(recent=1),
    dict(sink=2, recent=3),
    dict(sink=1000),
    dict(recent=1000),
    dict(sink=4, recent=1000),
    dict(sink=70, recent=70),
    dict(sink=2**40, recent=2**40),
]


@every_way(dtypes=(BF16, F32), dims=(64,), regimes=False)
def test_budgets_and_always_kept_keys(dtype, d, way):
    q, k, _ = make_qkv(1, 200, 200, 2, 1, d, dtype=dtype, seed=4)
    tied = torch.ones_like(q), torch.ones_like(k)
    with way.used():
        scores, tied_scores = own_scores(q, k), own_scores(*tied)
        for budget in BUDGETS:
            for always in ALWAYS:
                for causal in (True, False):
                    s = Settings(**{**budget.__dict__, **always, "causal": causal})
                    check_selection(q, k, s, scores)
                check_selection(*tied, s, tied_scores)


@pytest.mark.parametrize("h,hkv", [(1, 1), (4, 4), (4, 2), (8, 1), (9, 3), (32, 8)])
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_heads(h, hkv, select):
    for dtype in DTYPES:
        q, k, _ = make_qkv(2, 70, 90, h, hkv, 64, dtype=dtype, seed=h)
        for way in ways(dtype, 64, regimes=False):
            with way.used():
                for s in (Settings(topk=5, select=select), Settings(ratio=0.3, select=select, sink=1)):
                    check_selection(q, k, s)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim(dtype):
    for d in range(8, 257, 8):
        q, k, _ = make_qkv(1, 66, 130, 2, 1, d, dtype=dtype, seed=d)
        for way in {PLANNED, *ways(dtype, d, regimes=False)}:
            with way.used():
                check_selection(q, k, Settings(topk=6))


@every_way(regimes=False)
@pytest.mark.parametrize("kind", ["normal", "permuted", "two_values", "mixed"])
def test_the_order_itself(dtype, d, way, kind):
    """Rows read out key by key: every key turns up once, in the contract's order, with the score that it has
    as the only key. Nothing here knows the scores beforehand."""
    q, k, _ = make_qkv(1, 70, 140, 2, 1, d, dtype=dtype, seed=5, kind=kind)
    with way.used():
        scores, found = ranked_scores(q, k)
        assert bool(found.all())
        assert_same(scores, own_scores(q, k), "scores")
    error = (scores.double() - reference.float64_scores(q, k)).abs()
    assert bool((error <= reference.rounding_bound(q, k)).all())


@every_way(regimes=False)
@pytest.mark.parametrize("kind", ["normal", "clustered", "half clustered", "mixed"])
def test_longer_sequences_by_float64(dtype, d, way, kind):
    """No dropped key beats a kept one by more than rounding, and every row has its number of keys."""
    n = 2111
    q, k, _ = make_qkv(1, n, n, 2, 1, d, dtype=dtype, seed=3, kind=kind)
    for s in (Settings(ratio=0.01), Settings(topk=300), Settings(ratio=0.05, causal=False)):
        with way.used():
            threshold, tie_index, indices = topk_attn.topk_select(
                q, k, **selection_kwargs(s), return_indices=True
            )
            without = topk_attn.topk_select(q, k, **selection_kwargs(s))
        assert_same(without[0], threshold, "threshold without lists")
        assert_same(without[1], tie_index, "tie_index without lists")
        kept = reference.mask_of(indices, k.shape[1])
        counts = torch.tensor(
            [reference.budget(x, s) for x in reference.seen_counts(n, n, s.causal)], device=DEVICE
        )
        assert torch.equal(kept.sum(-1), counts.expand(1, 2, n))
        assert not bool((kept & ~reference.visible(n, n, s.causal, DEVICE)).any())
        wrong = reference.wrongly_sorted(q, k, kept, s)
        assert not bool(wrong.any()), f"{s.kwargs()}: rows {wrong.nonzero()[:5].tolist()}"
        # The encoding is the last kept key: its score, and its index among those.
        last = tie_index.long()
        assert bool(kept.gather(-1, last[..., None]).all())
        exact = reference.float64_scores(q, k).gather(-1, last[..., None])[..., 0]
        bound = reference.rounding_bound(q, k).gather(-1, last[..., None])[..., 0]
        assert bool(((threshold.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_longer_sequences_by_own_scores(dtype):
    """Exactly the reference's sets at a length where selection works in many pieces."""
    n = 1500
    for kind in ("normal", "permuted", "duplicated", "two_values"):
        q, k, _ = make_qkv(1, 96, n, 2, 1, 64, dtype=dtype, seed=7, kind=kind)
        for way in ways(dtype, 64, regimes=False):
            with way.used():
                scores = own_scores(q, k)
                for s in (Settings(topk=1), Settings(ratio=0.01), Settings(topk=700), Settings(topk=1499)):
                    check_selection(q, k, s, scores)


@every_way(dtypes=(BF16, F16, F32), dims=(64,), regimes=False)
def test_packs(dtype, d, way):
    """Empty and one-token documents, unequal lengths; max_seqlen may be larger than needed."""
    for lq, lk, extra in (
        ([0, 5], [0, 5], 0),
        ([5, 0], [5, 0], 100),
        ([0, 0, 3, 0], [0, 0, 3, 0], 0),
        ([1, 1, 1], [10, 0, 133], 0),
        ([3, 70, 0, 2], [90, 40, 5, 0], 31),
        ([64, 1, 128, 63], [64, 1, 128, 63], 0),
        ([200, 4], [3, 150], 0),
    ):
        q, k, _ = make_qkv(1, sum(lq), sum(lk), 4, 2, d, dtype=dtype, seed=len(lq))
        for s in (
            Settings(topk=4),
            Settings(ratio=0.3, select="kv_group"),
            Settings(topk=6, sink=1, recent=2),
        ):
            for causal in (True, False):
                s = s.but(causal=causal)
                pack = dict(
                    cu_seqlens_q=bounds(lq),
                    cu_seqlens_k=bounds(lk),
                    max_seqlen_q=max(lq) + extra,
                    max_seqlen_k=max(lk) + extra,
                    **selection_kwargs(s),
                )
                with way.used(), served(s.select):
                    got = topk_attn.topk_select(q[0], k[0], **pack, return_indices=True)
                    without = topk_attn.topk_select(q[0], k[0], **pack)
                    check_documents(q, k, lq, lk, got, s, max(lk) + extra)
                for a, b in zip(without, got[:2], strict=True):
                    assert_same(a, b, "without lists")


def check_documents(q, k, lq, lk, got, s, longest):
    row = key = 0
    for tq, tk in zip(lq, lk, strict=True):
        rows, keys = slice(row, row + tq), slice(key, key + tk)
        row, key = row + tq, key + tk
        threshold, tie_index, indices = (x[:, rows] for x in got)
        if tq and tk:
            want = reference.select(own_scores(q[:, rows], k[:, keys]), 2, s)
            assert_encoding(threshold[None], tie_index[None], want, f"document of {tq} and {tk}")
            lists = reference.index_lists(want.kept, reference.budget(longest, s))
            assert_same(indices[None], lists, "indices")
        else:
            assert bool(threshold.isnan().all()) and bool((tie_index == -1).all())
            assert bool((indices == -1).all())


@pytest.mark.parametrize("tq,tk,b", [(0, 5, 2), (5, 0, 2), (0, 0, 1), (4, 4, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_inputs(tq, tk, b, dtype):
    q = torch.zeros(b, tq, 4, 64, device=DEVICE, dtype=dtype)
    k = torch.zeros(b, tk, 2, 64, device=DEVICE, dtype=dtype)
    threshold, tie_index, indices = topk_attn.topk_select(q, k, topk=3, return_indices=True)
    assert tuple(threshold.shape) == tuple(tie_index.shape) == (b, 4, tq)
    assert tuple(indices.shape) == (b, 4, tq, min(3, tk))
    assert bool(threshold.isnan().all()) or tk > 0
    assert bool((tie_index == -1).all()) or tk > 0
    none = q.new_zeros(0, 4, 64)
    threshold, tie_index = topk_attn.topk_select(
        none, none, cu_seqlens_q=int32(0), cu_seqlens_k=int32(0), max_seqlen_q=0, max_seqlen_k=0, topk=3
    )
    assert tuple(threshold.shape) == tuple(tie_index.shape) == (4, 0)


def test_builds_agree_to_the_bit():
    """Whatever build or selection algorithm runs, one card has one set of scores."""
    for dtype in (BF16, F16):
        for d in (64, 128):
            for kind in ("permuted", "mixed", "normal"):
                q, k, _ = make_qkv(1, 300, 400, 4, 2, d, dtype=dtype, seed=8, kind=kind)
                results = []
                for way in ways(dtype, d, regimes=False):
                    with way.used():
                        results.append((way, topk_attn.topk_select(q, k, ratio=0.1)))
                for way, got in results[1:]:
                    for a, b, name in zip(got, results[0][1], ("threshold", "tie_index"), strict=True):
                        assert_same(a, b, f"{name}, {way} against {results[0][0]}, {kind}")


@pytest.mark.parametrize("tq,tk", [(700, 900), (130, 20_011), (4099, 4099)])
@pytest.mark.parametrize("kind", ["normal", "two_values", "duplicated", "clustered", "permuted", "equal"])
def test_selection_algorithms_agree(gpu, tq, tk, kind):
    """Every selection algorithm gives the same encoding, at lengths where they cut rows differently."""
    for dtype, d in ((BF16, 64), (BF16, 128), (F16, 64), (F32, 64)):
        q, k, _ = make_qkv(1, tq, tk, 2, 1, d, dtype=dtype, seed=8, kind=kind)
        for s in (dict(ratio=0.01), dict(topk=300), dict(ratio=0.2, sink=2, recent=9), dict(topk=tk - 1)):
            want = topk_attn.topk_select(q, k, **s, return_indices=True)  # lists come from slabs
            for name in SELECTIONS:
                try:
                    with topk_attn.cuda.override(selection=name):
                        got = topk_attn.topk_select(q, k, **s)
                        assert topk_attn.cuda.last_plan().selection == name
                except RuntimeError as error:
                    assert name == "fused" and name in str(error), f"no reason in: {error}"
                    assert builds(dtype, d) != ["portable", "sm90"] or "sink" in s
                    continue
                for a, b, what in zip(got, want, ("threshold", "tie_index"), strict=False):
                    assert_same(a, b, f"{what}, {name}, {kind}, {s}")
