"""The vectorised references against the oracle, on the CPU: they must be right before they judge anything."""

import math

import cuda_reference as reference
import numpy as np
import op_helpers
import oracle
import pytest
import torch
from op_helpers import assert_close, assert_same
from oracle import Settings

NEEDS_DEVICE = False

SETTINGS = [
    Settings(topk=1),
    Settings(topk=5),
    Settings(ratio=0.3, min_keys=2),
    Settings(ratio=1.0),
    Settings(topk=10**9, max_keys=6),
    Settings(topk=5, sink=2, recent=2),
    Settings(topk=4, sink=100),
    Settings(ratio=0.4, recent=100),
    Settings(topk=6, sink=3, recent=1, select="kv_group"),
    Settings(ratio=0.25, select="kv_group"),
]


def special_scores(heads, tq, tk, seed):
    """Random scores with many ties, zeros of both signs, infinities and NaNs."""
    g = torch.Generator().manual_seed(seed)
    table = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 2.0, math.inf, -math.inf, math.nan, -3e38])
    scores = table[torch.randint(0, len(table), (heads, tq, tk), generator=g)]
    plain = torch.randn(heads, tq, tk, generator=g)
    return torch.where(torch.rand(heads, tq, tk, generator=g) < 0.5, plain, scores)


@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: str(s.kwargs()))
@pytest.mark.parametrize("causal", [True, False])
def test_selection(s, causal):
    s = s.but(causal=causal)
    for seed, (tq, tk) in enumerate([(1, 1), (9, 9), (5, 17), (17, 5), (30, 40)]):
        scores = special_scores(4, tq, tk, seed)
        kept, threshold, tie_index = oracle.select_sequence(scores.double().numpy(), 2, s)
        got = reference.select(scores, 2, s)
        assert torch.equal(got.kept, torch.from_numpy(kept))
        assert np.array_equal(got.threshold.double().numpy(), threshold, equal_nan=True)
        assert not bool(((got.threshold == 0) & got.threshold.signbit()).any())
        assert_same(got.tie_index, torch.from_numpy(tie_index).to(torch.int32), "tie_index")
        width = oracle.budget(tk, s)
        lists = reference.index_lists(got.kept, width)
        assert_same(lists, oracle.index_lists(got.kept, width), "lists")
        assert torch.equal(reference.mask_of(lists, tk), got.kept)
        assert torch.equal(
            reference.visible(tq, tk, causal, "cpu"),
            op_helpers.bottom_right_mask(tq, tk) if causal else torch.ones(tq, tk, dtype=torch.bool),
        )


@pytest.mark.parametrize("h,hkv", [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("tq,tk", [(12, 12), (9, 5), (4, 20)])
def test_attention(h, hkv, tq, tk):
    s = Settings(topk=3)
    q, k, v = op_helpers.make_qkv(2, tq, tk, h, hkv, 16, 8, seed=tq)
    dout, dlse = op_helpers.normal(2, tq, h, 8, seed=1), op_helpers.normal(2, h, tq, seed=2)
    want = oracle.attention(q, k, v, s, dout=dout, dlse=dlse)
    got = reference.exact(q, k, v, want.kept, s.scale(16), dout, dlse)
    near = reference.dense(q, k, v, want.kept, s.scale(16), dout, dlse)
    for name in reference.Attended._fields:
        # The oracle's scores are rounded to float32.
        assert_close(getattr(got, name), getattr(want, name), 2e-6, name)
        assert_close(getattr(near, name), getattr(want, name), 2e-5, f"dense {name}")


def test_wrongly_sorted_finds_a_wrong_set():
    s = Settings(topk=5)
    q, k, _ = op_helpers.make_qkv(1, 30, 30, 2, 1, 16, seed=1)
    kept = oracle.attention(q, k, k, s).kept
    assert not reference.wrongly_sorted(q, k, kept, s).any()
    row = kept[0, 1, 20]
    inside, outside = int(row.nonzero()[2]), int((~row[:21]).nonzero()[3])
    row[inside], row[outside] = False, True
    wrong = reference.wrongly_sorted(q, k, kept, s)
    assert wrong.sum() == 1 and wrong[0, 1, 20]
