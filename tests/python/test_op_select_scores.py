"""topk_select_scores: top-k of given score rows, in the contract's order."""

import math

import oracle
import pytest
import torch
from op_helpers import assert_same, first_difference

import topk_attn

SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(scores, topk, lengths=None):
    threshold, tie_index, indices = topk_attn.topk_select_scores(scores, topk, lengths)
    want_threshold, want_tie, want_indices = oracle.select_scores(scores, topk, lengths)
    assert threshold.dtype == torch.float32 and tie_index.dtype == indices.dtype == torch.int32
    want_threshold = want_threshold.float()
    same = (threshold == want_threshold) | (threshold.isnan() & want_threshold.isnan())
    assert bool(same.all()), f"threshold at {first_difference(same, torch.ones_like(same))}"
    assert not bool((threshold == 0).logical_and(torch.signbit(threshold)).any())
    assert_same(tie_index, want_tie, "tie_index")
    assert_same(indices, want_indices, "indices")


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 16, 31, 64, 65, 255, 1000])
def test_random_rows(dtype, n):
    g = torch.Generator().manual_seed(n)
    scores = torch.randn(6, n, generator=g).to(dtype)
    for topk in {1, 2, min(8, n), n, n + 5}:
        check(scores, topk)


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
def test_lengths(dtype):
    scores = torch.randn(9, 50).to(dtype)
    lengths = torch.tensor([0, 1, 2, 5, 10, 49, 50, 3, 0], dtype=torch.int32)
    for topk in (1, 5, 50, 70):
        check(scores, topk, lengths)


def test_values_beyond_the_length_are_not_read_into_the_result():
    scores = torch.randn(4, 30)
    lengths = torch.tensor([3, 10, 0, 29], dtype=torch.int32)
    want = topk_attn.topk_select_scores(scores, 5, lengths)
    for bad in (math.nan, math.inf, -math.inf):
        poisoned = scores.clone()
        for r, n in enumerate(lengths.tolist()):
            poisoned[r, n:] = bad
        for a, b in zip(topk_attn.topk_select_scores(poisoned, 5, lengths), want, strict=True):
            assert_same(a, b, f"poisoned by {bad}")


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
def test_special_values(dtype):
    g = torch.Generator().manual_seed(1)
    table = torch.tensor([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf], dtype=dtype)
    scores = table[torch.randint(0, 7, (200, 12), generator=g)]
    for topk in (1, 3, 6, 12):
        check(scores, topk)


def test_every_bit_pattern_of_bfloat16_and_float16():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    shuffled = bits[torch.randperm(2**16, generator=torch.Generator().manual_seed(2))]
    for dtype in (torch.bfloat16, torch.float16):
        check(shuffled.view(dtype).reshape(64, 1024), 100)
        check(shuffled.view(dtype).reshape(1, -1), 30000)


@pytest.mark.parametrize("topk", [1, 17, 500, 999, 1000])
def test_all_equal_keeps_the_first(topk):
    threshold, tie_index, indices = topk_attn.topk_select_scores(torch.full((3, 1000), 2.5), topk)
    assert bool((threshold == 2.5).all()) and bool((tie_index == topk - 1).all())
    assert_same(indices, torch.arange(topk, dtype=torch.int32).expand(3, topk).contiguous(), "indices")


def test_sorted_and_adversarial_rows():
    """Ascending, descending, saw-tooth, one bin holding nearly everything, last bit apart."""
    n = 3000
    x = torch.arange(n, dtype=torch.float32)
    near = (torch.tensor(0x3F800000, dtype=torch.int32) + torch.arange(n, dtype=torch.int32)).view(
        torch.float32
    )
    rows = torch.stack(
        [x, -x, x % 7, torch.where(x == 5, 1e30, 1.0), near, near.flip(0), near[torch.randperm(n)]]
    )
    for topk in (1, 2, 300, 2999):
        check(rows, topk)


def test_strided_scores():
    base = torch.randn(40, 64)
    check(base[::2, 8:40], 5)
    check(base[:1].expand(7, 64), 5)
    wide = torch.randn(5, 3, 20)
    check(wide[:, 1], 4, torch.tensor([20, 3, 0, 7, 9], dtype=torch.int32))


@pytest.mark.parametrize("rows,n", [(0, 5), (3, 0), (0, 0)])
def test_empty(rows, n):
    threshold, tie_index, indices = topk_attn.topk_select_scores(torch.zeros(rows, n), 4)
    assert tuple(indices.shape) == (rows, 4) and bool((indices == -1).all())
    assert bool(threshold.isnan().all()) and bool((tie_index == -1).all())


def test_agrees_with_topk_select():
    """The scores of one visible row, selected directly and through the attention's selection."""
    from op_helpers import kernel_scores, make_qkv

    q, k, _ = make_qkv(1, 6, 90, 3, 3, 16, seed=3, kind="permuted")
    scores = kernel_scores(q, k)
    a = topk_attn.topk_select(q, k, topk=9, causal=False, return_indices=True)
    b = topk_attn.topk_select_scores(scores.reshape(-1, 90).contiguous(), 9)
    for x, y in zip(a, b, strict=True):
        assert_same(x.reshape(y.shape), y, "select")
