"""Generation: every cache gives the tokens that recomputing from scratch gives."""

import pytest
import torch
from hf_helpers import (
    LAYERS,
    MODELS,
    CountOperators,
    continuous_batching_config,
    pad_batch,
    positions_of,
    tiny_model,
    tokens,
)
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from topk_attn import hf

SETTINGS = (dict(ratio=0.25, min_keys=2), dict(topk=3, sink=1, recent=1), dict(topk=4, dense_layers=[0]))
NEW = 10
GREEDY = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)


@torch.no_grad()
def recompute(model, row: torch.Tensor, new: int = NEW) -> list[int]:
    """Greedy decoding that runs the whole sequence again for every token."""
    ids = row[None]
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(row) :].tolist()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_caches_agree_with_recomputing(kind, settings):
    model = hf.configure(tiny_model(kind), **settings)
    row = tokens(21)
    expected = recompute(model, row)
    for extra in (dict(), dict(cache_implementation="static"), dict(use_cache=False)):
        assert model.generate(row[None], **GREEDY, **extra)[0, 21:].tolist() == expected, extra


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_left_padded_batch_agrees_with_each_row_alone(kind, settings):
    model = hf.configure(tiny_model(kind), **settings)
    rows = [tokens(n, seed=n) for n in (17, 4, 9)]
    ids, mask = pad_batch(rows, "left")
    for extra in (dict(), dict(cache_implementation="static"), dict(use_cache=False)):
        out = model.generate(ids, attention_mask=mask, **GREEDY, **extra)[:, 17:]
        for i, row in enumerate(rows):
            assert out[i].tolist() == recompute(model, row), (extra, i)


def test_right_padded_prefill_then_decode():
    """The new tokens of a right-padded row come after a gap; its past is the row without the gap."""
    model = hf.configure(tiny_model(), topk=4)
    rows = [tokens(9), tokens(5)]
    ids, mask = pad_batch(rows, "right")
    for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=40)):
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
            new = torch.tensor([[7], [8]])
            grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            positions = positions_of(grown)[:, -1:]
            logits = model(new, attention_mask=grown, position_ids=positions, past_key_values=cache).logits
            for i, row in enumerate(rows):
                expected = model(torch.cat([row, new[i]])[None]).logits[0, -1]
                torch.testing.assert_close(logits[i, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(tiny_model().config, max_cache_len=64)])
@pytest.mark.parametrize("pieces", [(24,), (1,) * 24, (7, 1, 9, 7), (23, 1)])
def test_prefill_in_pieces_gives_the_logits_of_one_call(make, pieces):
    model = hf.configure(tiny_model(), ratio=0.25, min_keys=2)
    ids = tokens(2, 24)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, begin, parts = make(), 0, []
        for n in pieces:
            parts.append(model(ids[:, begin : begin + n], past_key_values=cache).logits)
            begin += n
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_decode_reads_the_cache_through_the_cache_operator():
    model = hf.configure(tiny_model(), topk=4)
    with CountOperators() as count:
        model.generate(tokens(2, 9), **GREEDY)
    assert count.counts == {"fwd": LAYERS, "fwd_kvcache": (NEW - 1) * LAYERS}


def test_beam_search_agrees_with_no_cache():
    model = hf.configure(tiny_model(), topk=4)
    ids, mask = pad_batch([tokens(9), tokens(6)], "left")
    beams = dict(num_beams=3, num_return_sequences=2, **GREEDY)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, attention_mask=mask, **beams), expected)


def test_assisted_decoding_agrees_with_greedy():
    """Several draft tokens are checked in one call: its rows must be those of single decode steps."""
    model = hf.configure(tiny_model(), topk=4)
    draft = hf.configure(tiny_model(seed=1), topk=4)
    ids = tokens(1, 12)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=draft, **GREEDY), expected)


def test_sampling_with_several_sequences_runs():
    model = hf.configure(tiny_model(), topk=4)
    out = model.generate(
        tokens(1, 8), do_sample=True, num_return_sequences=3, max_new_tokens=5, pad_token_id=0
    )
    assert out.shape == (3, 13)


# ------------------------------------------------------------------------------------------------------------
# Continuous batching
# ------------------------------------------------------------------------------------------------------------


def generate_batch(model, rows, **config) -> list[list[int]]:
    results = model.generate_batch(
        [row.tolist() for row in rows],
        generation_config=GenerationConfig(
            max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=continuous_batching_config(**config),
        progress_bar=False,
    )
    by_prompt = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    assert len(by_prompt) == len(rows), "every request must come back"
    return [by_prompt[tuple(row.tolist())] for row in rows]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_continuous_batching_agrees_with_each_row_alone(kind, settings):
    model = hf.configure(tiny_model(kind), **settings)
    rows = [tokens(n, seed=n) for n in (17, 4, 9, 33)]
    with CountOperators() as main_thread:
        generated = generate_batch(model, rows)
    assert generated == [recompute(model, row) for row in rows]
    assert model.config._attn_implementation == "topk_attn", (
        "the implementation was switched and not restored"
    )
    del main_thread


def test_continuous_batching_with_prefill_in_chunks():
    """Batches of at most 16 tokens cut the long prompts; requests decode beside others that still prefill."""
    model = hf.configure(tiny_model(), ratio=0.25, min_keys=2)
    rows = [tokens(n, seed=n) for n in (41, 4, 37, 20)]
    assert generate_batch(model, rows, max_batch_tokens=16) == [recompute(model, row) for row in rows]


def test_continuous_batching_with_the_paged_name():
    model = hf.configure(tiny_model(), topk=4)
    model.set_attn_implementation("paged|topk_attn")
    rows = [tokens(9), tokens(5)]
    generated = generate_batch(model, rows)
    assert generated == [recompute(hf.configure(tiny_model(), topk=4), row) for row in rows]


def test_continuous_batching_refuses_without_settings():
    """A failing request must end in an error, not in tokens of dense attention."""
    model = tiny_model()
    model.set_attn_implementation("topk_attn")
    results = model.generate_batch(
        [tokens(5).tolist()],
        generation_config=GenerationConfig(
            max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=continuous_batching_config(),
        progress_bar=False,
    )
    assert not any(result.generated_tokens for result in results.values())


# ------------------------------------------------------------------------------------------------------------
# Dense prefill, sparse decode
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dense_prefill_by_hand(row: torch.Tensor, **settings) -> list[int]:
    """The prompt through an untouched model, the rest token by token through a sparse one, on one cache."""
    cache = DynamicCache()
    token = tiny_model()(row[None], past_key_values=cache).logits[:, -1:].argmax(-1)
    sparse = hf.configure(tiny_model(), **settings)
    out = [int(token)]
    while len(out) < NEW:
        token = sparse(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        out.append(int(token))
    return out


@pytest.mark.parametrize("settings", [dict(ratio=0.1), dict(topk=2)])
def test_dense_prefill_sparse_decode(settings):
    rows = [tokens(n, seed=n) for n in (23, 6, 14)]
    expected = [dense_prefill_by_hand(row, **settings) for row in rows]
    model = hf.configure(tiny_model(), prefill="dense", **settings)
    everywhere = hf.configure(tiny_model(), **settings)
    assert expected != [recompute(everywhere, row) for row in rows], "the switch would not show"
    for extra in (dict(), dict(cache_implementation="static")):
        for row, want in zip(rows, expected, strict=True):
            assert model.generate(row[None], **GREEDY, **extra)[0, len(row) :].tolist() == want
        ids, mask = pad_batch(rows, "left")
        out = model.generate(ids, attention_mask=mask, **GREEDY, **extra)[:, ids.shape[1] :]
        assert out.tolist() == expected
    assert generate_batch(model, rows) == expected


def test_dense_prefill_uses_the_operator_for_decode_only():
    model = hf.configure(tiny_model(), topk=2, prefill="dense")
    ids = tokens(2, 12)
    with torch.no_grad(), CountOperators() as count:
        logits = model(ids).logits
        assert count.attention == 0
        torch.testing.assert_close(logits, tiny_model()(ids).logits, rtol=1e-4, atol=1e-4)
    with CountOperators() as count:
        model.generate(ids, **GREEDY)
    assert count.attention == (NEW - 1) * LAYERS


def test_dense_prefill_cannot_train():
    model = hf.configure(tiny_model(), topk=2, prefill="dense").train()
    with pytest.raises(ValueError, match="prefill"):
        model(tokens(1, 6))


def test_compiled_decode_with_a_static_cache():
    model = hf.configure(tiny_model(), topk=4)
    ids, mask = pad_batch([tokens(9), tokens(6)], "left")
    cache = StaticCache(model.config, max_cache_len=32)
    with torch.no_grad():
        token = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
        decode = torch.compile(model, backend="aot_eager", fullgraph=True)
        eager_cache = StaticCache(model.config, max_cache_len=32)
        model(ids, attention_mask=mask, past_key_values=eager_cache)
        for _ in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            inputs = model.prepare_inputs_for_generation(
                token, past_key_values=cache, attention_mask=mask, position_ids=positions_of(mask)[:, -1:]
            )
            logits = decode(**inputs).logits
            expected = model(
                token,
                attention_mask=mask,
                position_ids=positions_of(mask)[:, -1:],
                past_key_values=eager_cache,
            ).logits
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            token = logits[:, -1:].argmax(-1)


def test_generate_with_compiled_decode():
    """What ``generate`` does by itself on a GPU: a static cache and a compiled decode step."""
    model = hf.configure(tiny_model(), topk=4)
    ids, mask = pad_batch([tokens(9), tokens(6)], "left")
    compile_config = CompileConfig(backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    compiled = model.generate(
        ids, attention_mask=mask, cache_implementation="static", compile_config=compile_config, **GREEDY
    )
    assert torch.equal(compiled, model.generate(ids, attention_mask=mask, **GREEDY))


def test_continuing_a_returned_cache():
    model = hf.configure(tiny_model(), topk=4)
    ids, mask = pad_batch([tokens(9), tokens(6)], "left")
    with torch.inference_mode():
        first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
        longer = torch.cat([first.sequences, tokens(2, 3)], dim=1)
        mask = torch.cat([mask, torch.ones(2, NEW + 3, dtype=torch.long)], dim=1)
        expected = model.generate(longer, attention_mask=mask, **GREEDY)
        continued = model.generate(
            longer, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
        )
    assert torch.equal(continued, expected)
