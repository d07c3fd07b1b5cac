"""Contract section 4 on the card at hand: selection, forward and backward see the same bits of every score.

The sets are read back out of the kernels: one-hot V shows which keys the forward gave weight to, one-hot dO
which keys the backward reached. They must be the sets of topk_select, key for key, on keys where the last bit
of a score decides: channel permutations of one vector against a constant query, and mixed exponents.
"""

import cuda_reference as reference
import pytest
import torch
from cuda_helpers import (
    BF16,
    DTYPES,
    KEPT,
    assert_encoding,
    bounds,
    every_way,
    flat_scale,
    int32,
    kept_mask,
    make_qkv,
    own_scores,
    served,
    used_by_backward,
    used_by_forward,
    ways,
)
from op_helpers import assert_same, first_difference, selection_kwargs
from oracle import Settings

import topk_attn

KINDS = ("permuted", "mixed", "two_values", "normal")
# (Tq, Tk, settings): square and not, few and many keys, in whole tiles and not.
CASES = [
    (200, 200, Settings(ratio=0.1, min_keys=3)),
    (70, 333, Settings(topk=33, causal=False)),
    (130, 190, Settings(topk=7, select="kv_group")),
    (128, 256, Settings(ratio=0.3, sink=2, recent=3)),
]


@every_way()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tq,tk,s", CASES, ids=lambda x: str(x.kwargs()) if isinstance(x, Settings) else str(x)
)
def test_forward_and_backward_use_the_selected_sets(dtype, d, way, kind, tq, tk, s):
    q, k, v = make_qkv(1, tq, tk, 4, 2, d, dtype=dtype, seed=17, kind=kind)
    kw = s.but(softmax_scale=flat_scale(kind)).kwargs()
    with way.used(), served(s.select):
        selected = kept_mask(q, k, s)
        forward = used_by_forward(lambda v: topk_attn.topk_attn_func(q, k, v, **kw), 1, tk, 2, d, dtype)
        assert torch.equal(forward, selected), f"forward: {first_difference(forward, selected)}"
        for deterministic in (False, True):
            backward = used_by_backward(q, k, v, deterministic=deterministic, **kw)
            assert torch.equal(backward, selected), f"backward: {first_difference(backward, selected)}"


@every_way(dims=(8, 72, 80, 96, 192, 256))
@pytest.mark.parametrize("kind", ["permuted", "mixed"])
def test_other_head_dims(dtype, d, way, kind):
    q, k, v = make_qkv(1, 100, 170, 2, 1, d, dtype=dtype, seed=17, kind=kind)
    s = Settings(topk=15)
    kw = s.but(softmax_scale=flat_scale(kind)).kwargs()
    with way.used():
        selected = kept_mask(q, k, s)
        forward = used_by_forward(lambda v: topk_attn.topk_attn_func(q, k, v, **kw), 1, 170, 1, d, dtype)
        assert torch.equal(forward, selected), f"forward: {first_difference(forward, selected)}"
        backward = used_by_backward(q, k, v, **kw)
        assert torch.equal(backward, selected), f"backward: {first_difference(backward, selected)}"


@every_way()
@pytest.mark.parametrize("kind", KINDS)
def test_forward_hands_on_the_encoding_of_select(dtype, d, way, kind):
    q, k, v = make_qkv(2, 150, 220, 4, 2, d, dtype=dtype, seed=2, kind=kind)
    with way.used():
        for s in (dict(topk=6), dict(ratio=0.2, sink=1, recent=2), dict(topk=9, select="kv_group")):
            with served(s.get("select", "head")):
                threshold, tie_index = topk_attn.topk_select(q, k, **s)
                for kept in ({}, KEPT):
                    fwd = torch.ops.topk_attn.fwd(q, k, v, **s, **kept)
                    assert_same(fwd[2], threshold, "threshold")
                    assert_same(fwd[3], tie_index, "tie_index")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
def test_the_data_is_hard(dtype, d):
    """Scores that differ, but in the last bits only, and that depend on the order of the additions."""
    q, k, _ = make_qkv(1, 1, 200, 1, 1, d, dtype=dtype, seed=1, kind="permuted")
    scores = own_scores(q, k).flatten()
    spread = float(scores.max() - scores.min())
    assert len(scores.unique()) > 3 and spread < 1e-5 * float(scores.abs().max())
    backwards = own_scores(q.flip(-1).contiguous(), k.flip(-1).contiguous()).flatten()
    assert not torch.equal(scores, backwards)


@every_way()
@pytest.mark.parametrize("kind", ["permuted", "mixed"])
def test_position_changes_no_bit(dtype, d, way, kind):
    """Rows in any tile, tile position and batch entry, in any company, and any order of heads."""
    q, k, v = make_qkv(1, 200, 150, 4, 2, d, dtype=dtype, seed=3, kind=kind)
    kw = dict(topk=9, causal=False)
    with way.used():
        threshold, tie_index = topk_attn.topk_select(q, k, **kw)
        for size in (1, 5, 16, 63, 64, 65, 128):
            for first in {0, 1, 8, 37, 64, 200 - size}:
                at = slice(first, min(200, first + size))
                t, i = topk_attn.topk_select(q[:, at], k, **kw)
                assert_same(t, threshold[:, :, at].contiguous(), f"threshold of rows {at}")
                assert_same(i, tie_index[:, :, at].contiguous(), f"tie_index of rows {at}")
        other = make_qkv(3, 200, 150, 4, 2, d, dtype=dtype, seed=9)
        batch = [torch.cat([x[:2], y, x[2:]]) for x, y in zip(other, (q, k, v), strict=True)]
        t, i = topk_attn.topk_select(*batch[:2], **kw)
        assert_same(t[2:3], threshold, "threshold in a batch")
        assert_same(i[2:3], tie_index, "tie_index in a batch")
        t, i = topk_attn.topk_select(q.flip(2), k.flip(2), **kw)
        assert_same(t.flip(1), threshold, "threshold of reversed heads")
        assert_same(i.flip(1), tie_index, "tie_index of reversed heads")
        one_head = topk_attn.topk_select(q[:, :, 3:], k[:, :, 1:], **kw)
        assert_same(one_head[0], threshold[:, 3:].contiguous(), "threshold of a head alone")
        assert_same(one_head[1], tie_index[:, 3:].contiguous(), "tie_index of a head alone")


@every_way()
@pytest.mark.parametrize("kind", ["permuted", "mixed"])
def test_place_of_a_key_changes_no_bit(dtype, d, way, kind):
    """The same keys in another order, and more keys behind them: the same scores, so the same sets."""
    n = 300
    q, k, _ = make_qkv(1, 70, n, 2, 1, d, dtype=dtype, seed=3, kind=kind)
    s = Settings(topk=21, causal=False)
    with way.used():
        scores = own_scores(q, k)
        for seed in range(3):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(k.device)
            threshold, tie_index = topk_attn.topk_select(q, k[:, order], **selection_kwargs(s))
            assert_encoding(threshold, tie_index, reference.select(scores[..., order], 1, s), "shuffled")
        for m in (1, 7, 16, 17, 63, 64, 65, 128, 200, 299):
            threshold, _ = topk_attn.topk_select(q, k[:, :m], causal=False, topk=m)
            assert_same(threshold, scores[..., :m].amin(-1), f"{m} keys")


@every_way()
@pytest.mark.parametrize("kind", ["normal", "permuted", "mixed"])
def test_packed_document_equals_the_document_alone(dtype, d, way, kind):
    lengths = [123, 1, 240, 64, 9]
    cu, longest = bounds(lengths), 240
    q, k, _ = make_qkv(1, sum(lengths), sum(lengths), 4, 2, d, dtype=dtype, seed=5, kind=kind)
    for s in (
        Settings(topk=5),
        Settings(ratio=0.2, sink=1, recent=1),
        Settings(ratio=0.1, select="kv_group"),
    ):
        kw = s.but(softmax_scale=flat_scale(kind)).kwargs()
        pack = (cu, cu, longest, longest)

        def attend(v, kw=kw, pack=pack):
            return topk_attn.topk_attn_varlen_func(q[0], k[0], v[0], *pack, **kw)[None]

        with way.used(), served(s.select):
            used = used_by_forward(attend, 1, sum(lengths), 2, d, dtype)
            names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
            packed = topk_attn.topk_select(
                q[0], k[0], **dict(zip(names, pack, strict=True)), **selection_kwargs(s)
            )
            start = 0
            for n in lengths:
                at = slice(start, start + n)
                start += n
                threshold, tie_index = topk_attn.topk_select(q[:, at], k[:, at], **selection_kwargs(s))
                assert_same(packed[0][:, at], threshold[0], f"threshold of the document of {n}")
                assert_same(packed[1][:, at], tie_index[0], f"tie_index of the document of {n}")
                want = kept_mask(q[:, at], k[:, at], s)
                assert torch.equal(used[:, :, at, at], want), f"forward, document of {n}"
                used[:, :, at, at] = False
        assert not bool(used.any()), "a key of another document"


def test_cache_keeps_the_same_sets():
    """Prefill and decode against a cache use the sets of training, or say that they do not exist yet."""
    n = 120
    for dtype in DTYPES:
        q, k, v = make_qkv(1, n, n, 4, 2, 64, dtype=dtype, seed=2, kind="permuted")
        threshold, tie_index = topk_attn.topk_select(q, k, topk=6)
        for t in (0, 63, 64, n - 1):
            try:
                _, got = topk_attn.topk_attn_with_kvcache(
                    q[:, t : t + 1], k, v, cache_seqlens=int32(t + 1), topk=6, return_encoding=True
                )
            except RuntimeError as error:
                assert "fwd_kvcache" in str(error) or "not implemented" in str(error).lower(), error
                pytest.skip("no cache operator on this device")
            assert_same(got[0][..., 0], threshold[..., t].contiguous(), f"threshold {t}")
            assert_same(got[1][..., 0], tie_index[..., t].contiguous(), f"tie_index {t}")


def test_builds_use_the_same_sets():
    """Encodings of one build are good for every other."""
    for d in (64, 128):
        q, k, v = make_qkv(1, 200, 300, 4, 2, d, dtype=BF16, seed=4, kind="permuted")
        sets = []
        for way in ways(BF16, d):
            with way.used():
                sets.append(
                    used_by_forward(
                        lambda v, q=q, k=k: topk_attn.topk_attn_func(q, k, v, topk=20, softmax_scale=1e-3),
                        1,
                        300,
                        2,
                        d,
                        BF16,
                    )
                )
        assert all(torch.equal(x, sets[0]) for x in sets)
