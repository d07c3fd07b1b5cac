"""Native ids to text against the tokenizers library, on random ids of every kind of tokenizer."""

import numpy as np
import pytest
from data_helpers import byte_fallback_tokenizer, byte_level_tokenizer, metaspace_tokenizer, tokenizers
from generate_helpers import generate_json, model_folder, prompt_file


def no_decoder():
    tokenizer = byte_fallback_tokenizer()
    tokenizer.decoder = None
    return tokenizer


def metaspace_never():
    tokenizer = metaspace_tokenizer()
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
    return tokenizer


def strips():
    tokenizer = byte_fallback_tokenizer()
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", "  "), d.Strip(" ", 1, 1), d.ByteFallback(), d.Fuse()])
    return tokenizer


def replace_after_fuse():
    tokenizer = byte_fallback_tokenizer()
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence(
        [d.ByteFallback(), d.Fuse(), d.Replace("▁the", "THE"), d.Replace("ab", "b")]
    )
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        byte_level_tokenizer, byte_fallback_tokenizer, metaspace_tokenizer, metaspace_never, no_decoder,
        strips, replace_after_fuse,
    ],
)  # fmt: skip
def test_text_equals_the_tokenizers_library(tmp_path, make):
    tokenizer = make()
    size = max(tokenizer.get_vocab().values()) + 2
    model_folder(tmp_path, tokenizer=tokenizer, vocab_size=size + 8, hidden_size=16, intermediate_size=8,
                 num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)  # fmt: skip
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    random = np.random.default_rng(3)
    # Ids without a token among them; runs of bytes, whole characters among them.
    prompts = [random.integers(0, size + 8, random.integers(1, 60)).tolist() for _ in range(250)]
    for text in ("naïve café, 東京 😀", "the inner  spaces ", "a" * 9, " lead", "ab▁the ab"):
        ids = tokenizer.encode(text).ids
        for _ in range(10):
            begin = int(random.integers(0, len(ids)))
            prompts.append(ids[begin:] + random.integers(0, size, 3).tolist())
    path = prompt_file(tmp_path, prompts, tmp_path / "p.safetensors")
    for skip, extra in ((True, []), (False, ["--keep-special-tokens"])):
        options = ["--model", tmp_path, "--prompts", path, "--max-new-tokens", 1, "--batch-size", 64, *extra]
        results = generate_json(*options)["results"]
        for prompt, result in zip(prompts, results, strict=True):
            assert result["prompt_text"] == tokenizer.decode(prompt, skip_special_tokens=skip)
            assert result["text"] == tokenizer.decode(result["ids"], skip_special_tokens=skip)
