"""Loss masks: what the model is trained to say, for templates of all kinds; errors where that is unknown."""

import numpy as np
import pytest
from data_helpers import (
    CHATML,
    GENERATION,
    GENERATION_WITHOUT_STOP,
    LLAMA3,
    MISTRAL,
    THINKING,
    byte_fallback_tokenizer,
    chat,
    save_tokenizer,
)

from topk_attn.data import DataError, EncodeOptions, Record, encode, load_tokenizer

STOP = {CHATML: "<|im_end|>", LLAMA3: "<|eot|>", THINKING: "<|im_end|>", GENERATION: "<|im_end|>"}


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    cache = {}

    def make(template, **options):
        key = (template, tuple(options))
        if key not in cache:
            cache[key] = load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tok"), template, **options))
        return cache[key]

    return make


@pytest.fixture(scope="module")
def llama2(tokenizer_of):
    return tokenizer_of(MISTRAL, tokenizer=byte_fallback_tokenizer(), bos_token="<s>", eos_token="</s>")


def trained(tokenizer, messages, **options):
    """ids, and the text of each stretch of tokens that carries loss."""
    [(ids, mask)] = encode(tokenizer, Record("f:1", "messages", messages), EncodeOptions(**options))
    return ids, stretches(tokenizer, ids, mask)


def stretches(tokenizer, ids, mask):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(int))).reshape(-1, 2)
    return [tokenizer.hf.decode(ids[begin:end], skip_special_tokens=False) for begin, end in edges]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GENERATION, GENERATION_WITHOUT_STOP])
def test_assistant_turns_with_their_stop_token(tokenizer_of, template):
    tokenizer = tokenizer_of(template)
    stop = STOP.get(template, "<|im_end|>")
    messages = chat("Hi", "Hello 😀 there!", "And?", "the dog", system="Be brief.")
    ids, texts = trained(tokenizer, messages)
    assert texts == ["Hello 😀 there!" + stop, "the dog" + stop]
    # The tokens are those of transformers for the whole conversation.
    assert ids.tolist() == tokenizer.hf.apply_chat_template(messages, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", [GENERATION, GENERATION_WITHOUT_STOP])
@pytest.mark.parametrize("turns", ["all", "last", "split"])
def test_generation_tags_and_rendering_agree(tokenizer_of, template, turns):
    record = Record("f:1", "messages", chat("user", "assistant", "im_end", "user", "x", "a<|im_end|> y"))
    tagged = encode(tokenizer_of(template), record, EncodeOptions(turns=turns))
    rendered = encode(tokenizer_of(CHATML), record, EncodeOptions(turns=turns))
    for (a, b), (c, d) in zip(tagged, rendered, strict=True):
        assert a.tolist() == c.tolist() and b.tolist() == d.tolist()


def test_generation_tags_without_stop_are_refused(tokenizer_of):
    template = GENERATION.replace(
        "m['content'] + '<|im_end|>' }}{% endgeneration", "m['content'] }}{% endgeneration"
    )
    with pytest.raises(DataError, match="f:1: no special token ends the template's generation block"):
        trained(tokenizer_of(template), chat("a", "b"))
    silent = GENERATION.replace(
        "{% generation %}", "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    )
    silent = silent.replace("{% endgeneration %}{{", "{{")
    with pytest.raises(
        DataError, match="f:1: the template's generation blocks mark 0 places for 1 assistant"
    ):
        trained(tokenizer_of(silent), chat("a", "b"))


@pytest.mark.parametrize(
    "content",
    ["assistant", "user", "im_end", "end", "\n", "<|im_end|>", "a<|im_end|>b", "<|im_start|>user\nx"],
)
def test_contents_that_look_like_the_template(tokenizer_of, content):
    if not content.strip():
        content = "x" + content
    _, texts = trained(tokenizer_of(CHATML), chat(content, content, "then", content))
    assert texts == [content + "<|im_end|>"] * 2


def test_whitespace_that_merges_with_the_template_is_not_trained(tokenizer_of):
    """The prompt of a generation ends in a line break; a token of two would not be its continuation."""
    tokenizer = tokenizer_of(CHATML)
    merged = load_with_newlines(tokenizer_of)
    _, texts = trained(tokenizer, chat("Hi", "\nHello"))
    assert texts == ["\nHello<|im_end|>"]
    _, texts = trained(merged, chat("Hi", "\nHello"))
    assert texts == ["Hello<|im_end|>"]


def load_with_newlines(tokenizer_of):
    from data_helpers import byte_level_tokenizer, tokenizers

    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([tokenizers.AddedToken("\n\n", normalized=False)])
    return tokenizer_of(CHATML, tokenizer=tokenizer, bos_token="<s>", eos_token="<|im_end|>")


def test_templates_without_generation_prompt(llama2):
    messages = chat("a thing", "the inner", "b", "other")
    ids, texts = trained(llama2, messages)
    assert texts == ["the inner</s>", "other</s>"]
    # The space before the answer belongs to its first token, which is trained.
    assert llama2.hf.convert_ids_to_tokens(ids.tolist()).count("▁the") == 1
    assert ids.tolist() == llama2.hf.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_headers_without_generation_prompt_are_masked(tokenizer_of):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
    )
    _, texts = trained(tokenizer_of(template), chat("assistant", "assistant", "a", "b"))
    # The space belongs to the answer's first token.
    assert texts == [" assistant<|im_end|>", " b<|im_end|>"]


def test_history_without_thinking_block(tokenizer_of):
    tokenizer = tokenizer_of(THINKING)
    _, texts = trained(tokenizer, chat("a", "first", "b", "second"))
    assert texts == ["first<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"]
    # The same with the thoughts given, as long as they stay in the text.
    _, texts = trained(tokenizer, chat("a", "first", "b", "<think>\nhm\n</think>\n\nsecond"))
    assert texts == ["first<|im_end|>", "<think>\nhm\n</think>\n\nsecond<|im_end|>"]
    # Thoughts that the template drops from history cannot be trained there, but each turn can by itself.
    thoughtful = chat("a", "<think>\nhm\n</think>\n\nfirst", "b", "<think>\nso\n</think>\n\nsecond")
    with pytest.raises(
        DataError, match=r"f:1: message 2 \(assistant\): .* rewrites it once other messages follow"
    ):
        trained(tokenizer, thoughtful)
    documents = encode(tokenizer, Record("f:1", "messages", thoughtful), EncodeOptions(turns="split"))
    assert [stretches(tokenizer, *document) for document in documents] == [
        ["<think>\nhm\n</think>\n\nfirst<|im_end|>"],
        ["<think>\nso\n</think>\n\nsecond<|im_end|>"],
    ]
    [last] = encode(tokenizer, Record("f:1", "messages", thoughtful), EncodeOptions(turns="last"))
    assert stretches(tokenizer, *last) == ["<think>\nso\n</think>\n\nsecond<|im_end|>"]


@pytest.mark.parametrize(
    "template, why",
    [
        # History is dropped: the text before the second turn changes.
        ("{{ messages|length }}" + CHATML, "the text before it changes"),
        # Turns begin in another way than the generation prompt says.
        (CHATML.replace("<|im_start|>assistant", "<|im_start|>model"), "the text before it changes"),
        (CHATML.replace("m['content']", "m['content'] + m['content']"), "does not write its content once"),
        (CHATML.replace("m['content'] + '<|im_end|>'", "'<|im_end|>'"), "does not write its content once"),
        (CHATML.replace("'<|im_end|>' + ", ""), "no special token ends it"),
        (
            CHATML.replace(
                "m['content']", "(m['content']|upper if loop.index0 == 1 and not loop.last else m['content'])"
            ),
            "rewrites it",
        ),
    ],
)
def test_templates_that_allow_no_mask_are_refused(tokenizer_of, template, why):
    with pytest.raises(DataError, match=rf"^f:1: message \d \(assistant\): .*{why}"):
        trained(tokenizer_of(template), chat("a", "b", "c", "d"))


def test_refusals_of_the_template_say_where(llama2):
    messages = [{"role": "assistant", "content": "a"}]
    with pytest.raises(
        DataError, match="^f:1: the chat template refuses the conversation: roles must alternate"
    ):
        trained(llama2, messages)


def test_other_roles_can_be_trained(tokenizer_of):
    messages = chat("Hi", "Yo", system="Rules")
    _, texts = trained(tokenizer_of(CHATML), messages, roles=("user", "assistant"))
    assert texts == ["Hi<|im_end|>", "Yo<|im_end|>"]
    _, texts = trained(tokenizer_of(CHATML), messages, roles=("system",))
    assert texts == ["Rules<|im_end|>"]
    with pytest.raises(DataError, match="no message of a role to train"):
        trained(tokenizer_of(CHATML), messages[:2])
    with pytest.raises(DataError, match="roles to train must be among"):
        EncodeOptions(roles=("robot",))


def test_no_template_says_what_to_do(tokenizer_of):
    with pytest.raises(DataError, match="no chat template; give one by --chat-template"):
        trained(tokenizer_of(None), chat("a", "b"))


def encoded(tokenizer, kind, payload, **options):
    return encode(tokenizer, Record("f:1", kind, payload), EncodeOptions(**options))


def test_text_trains_everything_but_the_first_token(tokenizer_of, llama2):
    tokenizer = tokenizer_of(CHATML)
    [(ids, mask)] = encoded(tokenizer, "text", "The quick brown fox")
    assert tokenizer.hf.decode(ids) == "The quick brown fox"
    assert mask.tolist() == [0] + [1] * (len(ids) - 1)
    [(with_eos, mask)] = encoded(tokenizer, "text", "The quick brown fox", append_eos=True)
    assert with_eos.tolist() == [*ids.tolist(), tokenizer.hf.eos_token_id] and mask[-1] == 1
    [(ids, mask)] = encoded(llama2, "text", "the inner")
    assert ids[0] == llama2.hf.bos_token_id
    with pytest.raises(DataError, match="f:1: no token of the document carries loss"):
        encoded(tokenizer, "text", "a")


def test_completions_carry_loss_and_end(tokenizer_of, llama2):
    tokenizer = tokenizer_of(CHATML)
    [(ids, mask)] = encoded(tokenizer, "pair", ["The quick", " brown fox"])
    assert stretches(tokenizer, ids, mask) == [" brown fox<|im_end|>"]
    assert ids.tolist() == [*tokenizer.hf("The quick brown fox")["input_ids"], tokenizer.hf.eos_token_id]
    [(ids, mask)] = encoded(tokenizer, "pair", ["The quick", " brown fox"], append_eos=False)
    assert stretches(tokenizer, ids, mask) == [" brown fox"]
    [(ids, mask)] = encoded(llama2, "pair", ["the inner", " other"])
    assert stretches(llama2, ids, mask) == ["other</s>"]
    [(ids, mask)] = encoded(llama2, "pair", ["", "other"])
    assert mask.tolist() == [0] + [1] * (len(ids) - 1)


def test_long_documents(tokenizer_of):
    tokenizer = tokenizer_of(CHATML)
    text = "The quick brown fox jumps over the lazy dog. " * 5
    [(whole, _)] = encoded(tokenizer, "text", text, append_eos=True)
    parts = encoded(tokenizer, "text", text, append_eos=True, sequence_len=16)
    assert np.concatenate([ids for ids, _ in parts]).tolist() == whole.tolist()
    assert {len(ids) for ids, _ in parts[:-1]} == {16}
    assert all(mask.tolist() == [0] + [1] * (len(mask) - 1) for _, mask in parts)
    [(cut, mask)] = encoded(tokenizer, "text", text, sequence_len=16, overflow="truncate")
    assert cut.tolist() == whole[:16].tolist()
    assert encoded(tokenizer, "text", text, sequence_len=16, overflow="drop") == []
    with pytest.raises(DataError, match=r"f:1: the document has \d+ tokens, more than --sequence-len 16"):
        encoded(tokenizer, "messages", chat("a" * 50, "b"), sequence_len=16)
    # A part without a target is no document.
    parts = encoded(tokenizer, "messages", chat("a " * 50, "b"), sequence_len=16, overflow="split")
    assert all(mask.any() and mask[0] == 0 for _, mask in parts)
    # A last part of one token has none to predict.
    ids = list(range(10, 27))
    assert len(encoded(tokenizer, "tokens", [ids, [1] * 17], sequence_len=16, overflow="split")) == 1


def test_ids_outside_the_vocabulary_are_refused(tokenizer_of):
    tokenizer = tokenizer_of(CHATML)
    with pytest.raises(DataError, match=rf"f:1: token 1 has id {tokenizer.vocab_size}, not in \[0, "):
        encoded(tokenizer, "tokens", [[1, tokenizer.vocab_size], [1, 1]])
