"""Padding and packing: a token's result does not depend on what else is in its batch."""

import oracle
import pytest
import torch
from hf_helpers import MODELS, pad_batch, positions_of, tiny_model, tokens
from oracle import Settings
from transformers import DynamicCache, StaticCache

from topk_attn import hf

LENGTHS = (17, 5, 1, 12)
SETTINGS = (
    dict(ratio=0.25, min_keys=2),
    dict(topk=3, sink=1, recent=1),
    dict(topk=3, select="kv_group"),
    dict(ratio=0.25, dense_layers=[1]),
)


def rows_of(lengths=LENGTHS) -> list[torch.Tensor]:
    return [tokens(n, seed=10 + n) for n in lengths]


def alone(model, rows) -> list[torch.Tensor]:
    return [model(row[None], use_cache=False).logits[0] for row in rows]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_padding(kind, side, grad, settings):
    model = hf.configure(tiny_model(kind), **settings)
    rows = rows_of()
    ids, mask = pad_batch(rows, side)
    with torch.set_grad_enabled(grad):
        logits = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    for i, expected in enumerate(alone(model, rows)):
        close(logits[i][mask[i].bool()], expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (12, 5, 1, 9)])
def test_padding_without_position_ids(side, use_cache, lengths):
    """Without position_ids a left-padded row is rotated by its offset, which relative positions do not
    see."""
    model = hf.configure(tiny_model(), topk=4)
    rows = rows_of(lengths)
    ids, mask = pad_batch(rows, side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    for i, expected in enumerate(alone(model, rows)):
        torch.testing.assert_close(logits[i][mask[i].bool()], expected, rtol=1e-3, atol=1e-3)


def test_holes_in_the_mask():
    """A masked token in the middle is as if it were not there (positions given so that rotations agree)."""
    model = hf.configure(tiny_model(), ratio=0.3, min_keys=2)
    row = tokens(14)
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, [3, 4, 9]] = 0
    with torch.no_grad():
        logits = model(row[None], attention_mask=mask, position_ids=positions_of(mask)).logits[0]
        expected = model(row[mask[0].bool()][None]).logits[0]
    close(logits[mask[0].bool()], expected)


def test_a_row_of_nothing_but_padding():
    model = hf.configure(tiny_model(), topk=4)
    rows = [tokens(9), tokens(0), tokens(5)]
    for side in ("left", "right"):
        ids, mask = pad_batch(rows, side)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        for i in (0, 2):
            torch.testing.assert_close(
                logits[i][mask[i].bool()], model(rows[i][None]).logits[0], rtol=1e-3, atol=1e-3
            )


def test_gradients_of_a_padded_batch():
    """Loss gradients of a padded batch are the sum of the rows' own; padding gets none."""
    rows = rows_of()
    for side in ("left", "right"):
        batch, single = (hf.configure(tiny_model(), ratio=0.25, min_keys=2) for _ in range(2))
        ids, mask = pad_batch(rows, side)
        weights = [torch.linspace(-1, 1, len(row) * 97).reshape(len(row), 97) for row in rows]
        logits = batch(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        sum((logits[i][mask[i].bool()] * weights[i]).sum() for i in range(len(rows))).backward()
        sum((out * weight).sum() for out, weight in zip(alone(single, rows), weights, strict=True)).backward()
        for a, b in zip(single.parameters(), batch.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3)


def packed(rows):
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    cu = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return ids, positions, cu


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["positions", "cache", "ones", "static", "cu", "cu_int64", "cu_only"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_packing(kind, how, settings):
    model = hf.configure(tiny_model(kind), **settings)
    rows = rows_of()
    ids, positions, cu = packed(rows)
    longest = max(len(row) for row in rows)
    lengths = dict(max_length_q=longest, max_length_k=longest)
    extra = {
        "positions": dict(use_cache=False),
        "cache": dict(past_key_values=DynamicCache()),
        "ones": dict(attention_mask=torch.ones_like(ids)),
        "static": dict(past_key_values=StaticCache(model.config, max_cache_len=64)),
        "cu": dict(cu_seq_lens_q=cu.int(), cu_seq_lens_k=cu.int(), **lengths),
        "cu_int64": dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, **lengths),
        "cu_only": dict(cu_seq_lens_q=cu.int()),
    }[how]
    with torch.no_grad():
        logits = model(ids, position_ids=positions, **extra).logits[0]
        expected = torch.cat(alone(model, rows))
    close(logits, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_packing_in_several_rows(grad):
    """Documents that differ from row to row, positions given for each."""
    model = hf.configure(tiny_model(), ratio=0.25, min_keys=2)
    first, second = [tokens(6), tokens(9, seed=1)], [tokens(11, seed=2), tokens(4, seed=3)]
    ids, positions = (torch.cat(x) for x in zip(*(packed(rows)[:2] for rows in (first, second)), strict=True))
    with torch.set_grad_enabled(grad):
        logits = model(ids, position_ids=positions).logits
    close(logits[0], torch.cat(alone(model, first)))
    close(logits[1], torch.cat(alone(model, second)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_packing_and_padding_together(side):
    model = hf.configure(tiny_model(), ratio=0.25, min_keys=2)
    documents = [tokens(6), tokens(5, seed=1)]
    other = tokens(16, seed=2)
    joined = torch.cat(documents)
    ids, mask = pad_batch([joined, other], side)
    positions = torch.zeros_like(ids)
    positions[0][mask[0].bool()] = torch.cat([torch.arange(6), torch.arange(5)])
    positions[1] = torch.arange(16)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    close(logits[0][mask[0].bool()], torch.cat(alone(model, documents)))
    close(logits[1], alone(model, [other])[0])


def test_packed_documents_cannot_continue_a_cache():
    model = hf.configure(tiny_model(), topk=4)
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="restart"):
            model(tokens(1, 6), position_ids=torch.tensor([[5, 6, 7, 0, 1, 2]]), past_key_values=cache)


def test_cu_seq_lens_with_padding_is_refused():
    model = hf.configure(tiny_model(), topk=4)
    ids, mask = pad_batch([tokens(6), tokens(4)], "right")
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(ids, attention_mask=mask, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=6, max_length_k=6)


def test_mask_of_the_wrong_length_is_refused():
    model = hf.configure(tiny_model(), topk=4)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(2, 8), attention_mask=torch.ones(2, 5))
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens(2, 8), past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask"):
            model(tokens(2, 1), attention_mask=torch.ones(2, 5), past_key_values=cache)


@pytest.mark.parametrize("mask", ["bool4d", "float4d"])
def test_custom_masks_are_refused(mask):
    model = hf.configure(tiny_model(), topk=4)
    ids = tokens(1, 6)
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    given = causal if mask == "bool4d" else torch.where(causal, 0.0, float("-inf"))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=given)


class Layer(torch.nn.Module):
    """Just enough of an attention layer for the registered function."""

    def __init__(self, **block) -> None:
        super().__init__()
        self.config = type("Config", (), {"topk_attention": {"version": 1, **block}})()
        self.layer_idx = 0
        self.is_causal = True


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("spare", [0, 5])
def test_any_padding_mask_against_the_oracle(seed, past, spare):
    """Random masks, new tokens after a past, and a cache longer than what it holds."""
    g = torch.Generator().manual_seed(seed)
    batch, tq, heads, kv_heads, dim = 3, 6, 4, 2, 8
    length = past + tq
    q = torch.randn(batch, heads, tq, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, length + spare, dim, generator=g) for _ in range(2))
    valid = torch.rand(batch, length, generator=g) < 0.7
    mask = hf.topk_attention_mask(
        batch, tq, length + spare, past, attention_mask=valid.long(), mask_function=None, device="cpu"
    )
    layer = Layer(ratio=0.4, min_keys=2, sink=1)
    out, weights = hf.topk_attention_forward(layer, q, k, v, mask, scaling=0.3)
    assert weights is None and out.shape == (batch, tq, heads, dim)
    settings = Settings(ratio=0.4, min_keys=2, sink=1, softmax_scale=0.3)
    for b in range(batch):
        rows = valid[b, past:]
        assert (out[b][~rows] == 0).all()
        if not rows.any():
            continue
        keys = valid[b].nonzero().flatten()
        expected = oracle.attention(
            q[b : b + 1].transpose(1, 2)[:, rows],
            k[b : b + 1].transpose(1, 2)[:, keys],
            v[b : b + 1].transpose(1, 2)[:, keys],
            settings,
        )
        torch.testing.assert_close(out[b][rows].double(), expected.out[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_bidirectional_attention(masked):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, 7, 8, generator=g) for _ in range(3))
    layer = Layer(topk=3)
    layer.is_causal = False
    valid = torch.ones(2, 7, dtype=torch.bool)
    if masked:
        valid[0, 5:] = False
        valid[1, 2] = False
    out, _ = hf.topk_attention_forward(layer, q, k, v, valid if masked else None)
    for b in range(2):
        keys = valid[b].nonzero().flatten()
        one = (x[b : b + 1].transpose(1, 2) for x in (q, k[:, :, keys], v[:, :, keys]))
        expected = oracle.attention(*one, Settings(topk=3, causal=False))
        torch.testing.assert_close(out[b].double(), expected.out[0], rtol=1e-5, atol=1e-5)
