"""TopKCache: what generate and the model do with pages is what they do with DynamicCache."""

import pytest
import torch
from hf_helpers import LAYERS, CountOperators, pad_batch, positions_of, tiny_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from topk_attn import hf

SETTINGS = (
    dict(ratio=0.25, min_keys=2),
    dict(topk=3, sink=1, recent=1),
    dict(topk=4, dense_layers=[0]),
    dict(topk=3, prefill="dense"),
)
KINDS = ("Llama", "Qwen3")
NEW = 12
GREEDY = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)


def pages(model, max_length=64, page_size=4, **kw):
    return hf.TopKCache(model.config, max_length=max_length, page_size=page_size, **kw)


def same_tokens(model, ids, **kw):
    """generate with both caches; returns the TopKCache."""
    expected = model.generate(ids, past_key_values=DynamicCache(), **kw)
    cache = pages(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **kw), expected)
    cache.kv.check()
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_generate(kind, settings):
    model = hf.configure(tiny_model(kind), **settings)
    cache = same_tokens(model, tokens(2, 21), **GREEDY)
    assert cache.get_seq_length() == 21 + NEW - 1
    memory = cache.kv.memory()
    assert memory.used_pages == 2 * 8 and memory.tokens == 2 * 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_left_padded_batch(kind, settings):
    model = hf.configure(tiny_model(kind), **settings)
    ids, mask = pad_batch([tokens(n, seed=n) for n in (17, 4, 9)], "left")
    same_tokens(model, ids, attention_mask=mask, **GREEDY)


@pytest.mark.parametrize("settings", SETTINGS)
def test_beams(settings):
    model = hf.configure(tiny_model(), **settings)
    ids, mask = pad_batch([tokens(9), tokens(6)], "left")
    cache = same_tokens(model, ids, attention_mask=mask, num_beams=3, num_return_sequences=2, **GREEDY)
    # Beams that come from one another have pages in common.
    assert cache.kv.memory().shared_pages > 0


def test_assisted_decoding_crops():
    model, draft = (hf.configure(tiny_model(seed=seed), topk=4) for seed in (0, 1))
    same_tokens(model, tokens(1, 12), assistant_model=draft, **GREEDY)


def test_sampling():
    model = hf.configure(tiny_model(), topk=4)
    outs = []
    for cache in (DynamicCache(), pages(model)):
        torch.manual_seed(3)
        kw = dict(do_sample=True, num_return_sequences=3, max_new_tokens=8, pad_token_id=0)
        outs.append(model.generate(tokens(1, 8), past_key_values=cache, **kw))
    assert torch.equal(*outs)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("pieces", [(24,), (1,) * 24, (7, 1, 9, 7), (3, 20, 1)])
def test_logits_of_pieces(settings, pieces):
    model = hf.configure(tiny_model(), **settings)
    ids = tokens(2, 24)
    logits = []
    with torch.no_grad():
        for cache in (DynamicCache(), pages(model)):
            parts, begin = [], 0
            for n in pieces:
                parts.append(model(ids[:, begin : begin + n], past_key_values=cache).logits)
                begin += n
                assert cache.get_seq_length() == begin
            logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_right_padding_and_holes():
    """Masks that the pages cannot be read under in place."""
    model = hf.configure(tiny_model(), topk=4)
    ids, mask = pad_batch([tokens(9), tokens(5)], "right")
    mask[0, 3] = 0
    logits = []
    with torch.no_grad():
        for cache in (DynamicCache(), pages(model)):
            model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
            grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            new = dict(attention_mask=grown, position_ids=positions_of(grown)[:, -1:], past_key_values=cache)
            logits.append(model(torch.tensor([[7], [8]]), **new).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


class NoConcatenation(TorchDispatchMode):
    """Fails on a concatenation or copy of anything as large as the cached keys of a layer."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::cat", "aten::index_select", "aten::clone", "aten::copy_", "aten::index"):
            if isinstance(out, torch.Tensor) and out.numel() >= self.least:
                self.seen.append((name, tuple(out.shape)))
        return out


def test_decode_steps_copy_nothing_and_call_the_cache_operator():
    model = hf.configure(tiny_model(), topk=4)
    ids = tokens(2, 200)
    found = {}
    for name, cache in (("dynamic", DynamicCache()), ("pages", pages(model, 256))):
        with torch.no_grad():
            model(ids, past_key_values=cache)
            with NoConcatenation(2 * 2 * 200 * 8) as mode:
                for _ in range(3):
                    model(ids[:, :1], past_key_values=cache)
        found[name] = mode.seen
    assert len(found["dynamic"]) >= 3 * 2 * LAYERS, "the check sees concatenations"
    assert found["pages"] == []
    with CountOperators() as count:
        model.generate(tokens(2, 9), past_key_values=pages(model), **GREEDY)
    assert count.counts.get("fwd") == LAYERS
    # The cache calls the operator from C++, where a Python mode sees it all the same.
    assert count.counts.get("fwd_kvcache") == (NEW - 1) * LAYERS


def test_operations_on_the_batch():
    model = hf.configure(tiny_model(), topk=4)
    ids = tokens(3, 10)
    logits = []
    with torch.no_grad():
        for cache in (DynamicCache(), pages(model)):
            model(ids, past_key_values=cache)
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            first = model(ids[:, :2], past_key_values=cache).logits
            cache.batch_repeat_interleave(2)
            second = model(tokens(6, 1), past_key_values=cache).logits
            cache.batch_select_indices(torch.tensor([5, 1]))
            third = model(tokens(2, 3), past_key_values=cache).logits
            assert cache.get_seq_length() == 13
            cache.reset()
            assert cache.get_seq_length() == 0
            fourth = model(tokens(3, 3), past_key_values=cache).logits
            logits.append([first, second, third, fourth])
    for a, b in zip(*logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_continuing_after_generate():
    model = hf.configure(tiny_model(), ratio=0.3)
    ids = tokens(1, 9)
    outs = []
    for cache in (DynamicCache(), pages(model)):
        out = model.generate(ids, past_key_values=cache, **GREEDY)
        longer = torch.cat([out, tokens(1, 5, seed=2)], dim=1)
        outs.append(model.generate(longer, past_key_values=cache, **GREEDY))
    assert torch.equal(*outs)


def test_a_step_that_fails_is_forgotten():
    model = hf.configure(tiny_model(), topk=4)
    ids = tokens(1, 10)
    cache = pages(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids[:, :1], past_key_values=cache, output_attentions=True)
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens(1, 6), past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == 10
        logits = model(ids[:, :1], past_key_values=cache).logits
        expected = model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# What raises
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_is_refused(implementation):
    model = tiny_model(attn_implementation=implementation)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="only attn_implementation='topk_attn' reads its pages"),
    ):
        model(tokens(1, 5), past_key_values=pages(model))


def test_no_room():
    model = hf.configure(tiny_model(), topk=4)
    with torch.no_grad():
        with pytest.raises(
            (RuntimeError, ValueError), match="0 tokens of at most 8 .max_length.: 9 more do not fit"
        ):
            model(tokens(1, 9), past_key_values=pages(model, max_length=8))
        cache = pages(model, max_length=8, pages=3)
        model(tokens(1, 8), past_key_values=cache)
        cache.batch_repeat_interleave(3)
        cache.crop(-1)
        with pytest.raises(RuntimeError, match="1 free pages of 4 tokens.*1 pages are missing"):
            model(tokens(3, 1), past_key_values=cache)
        assert cache.get_seq_length() == 7


def test_bad_use():
    model = hf.configure(tiny_model(), topk=4)
    with pytest.raises(ValueError, match="under torch.no_grad"):
        model(tokens(1, 5), past_key_values=pages(model))
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        pages(model, max_length=0)
    with pytest.raises(ValueError, match="sliding_attention"):
        hf.TopKCache(tiny_model("Qwen2", layer_types=["sliding_attention"] * LAYERS).config, max_length=8)
    cache = pages(model)
    with torch.no_grad():
        model(tokens(2, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="3 sequences, but the cache holds 2"):
            model(tokens(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="tokens_to_remove is 2"):
        cache.crop(2)
    with pytest.raises(ValueError, match="holds 5 tokens"):
        cache.crop(-6)
