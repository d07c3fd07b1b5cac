"""Small tokenizers and chat templates, made on the spot, for the tests of data preparation and generation."""

import json
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Paris is the capital of France; what is the capital of Italy?",
    "def add(a, b):\n    return a + b\n",
    "naïve café, 東京 and 😀 emoji; numbers 1234567890",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Header tokens, trimmed contents, BOS.
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start|>' + m['role'] + '<|end_header|>\n\n' + "
    "m['content'] | trim + '<|eot|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}"
    "{{ text }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end_header|>\n\n' }}"
    "{% endif %}"
)
# No generation prompt; the answer follows a space; EOS behind it.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user, assistant') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# The last answer is shown with an empty thinking block, earlier ones without.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% set t = '' %}"
    "{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + t + '\n</think>\n\n' + c + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}{% endif %}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same, but the block leaves the stop token out.
GENERATION_WITHOUT_STOP = GENERATION.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "<|start|>", "<|end_header|>", "<|eot|>"]


def byte_level_tokenizer():
    """A byte-level BPE as SmolLM2, Llama 3 and Qwen have it; every text can be encoded."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False), tokenizers.AddedToken("東京")])
    return tokenizer


def byte_fallback_tokenizer():
    """A BPE over characters with a marker for spaces and byte fallback, as Llama 2 and Mistral have it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({f"<0x{byte:02X}>": 3 + byte for byte in range(256)})
    pieces = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?[]/",
        "▁t",
        "▁th",
        "▁the",
        "in",
        "er",
        "▁a",
    ]
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("i", "n"), ("e", "r"), ("▁", "a")]
    model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace_tokenizer():
    """A Unigram with the Metaspace decoder, as T5 and XLM-R have it."""
    vocab = [("<unk>", 0.0), ("▁", -2.0)] + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab += [("▁the", -1.0), ("▁▁", -2.5), ("é", -4.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def save_tokenizer(folder: Path, template: str | None = CHATML, tokenizer=None, **special) -> Path:
    """A tokenizer folder as save_pretrained writes it."""
    special = special or {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or byte_level_tokenizer(), clean_up_tokenization_spaces=False, **special
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder


def chat(*contents: str, system: str | None = None) -> list[dict]:
    """Messages of user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def write_jsonl(path: Path, records) -> Path:
    lines = [
        record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
