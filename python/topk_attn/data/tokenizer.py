"""The Hugging Face tokenizer of a model folder, as the data tools use it."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from topk_attn.data.errors import DataError
from topk_attn.data.records import parse_json, read_text_file


@dataclass
class Tokenizer:
    """A fast tokenizer with what the shards record about it.

    hf: transformers' PreTrainedTokenizerFast.
    sha256: of tokenizer.json, hexadecimal; the trainer and topk-generate compare it with the model folder's.
    vocab_size: largest token id plus one.
    model_vocab_size: rows of the model's embedding (config.json), or None if there is no model.
    chat_template: Jinja source, or None.
    specials: matches the text of any special token; special_ids: their ids.
    """

    hf: Any
    directory: str
    sha256: str
    vocab_size: int
    model_vocab_size: int | None
    chat_template: str | None
    specials: re.Pattern = field(repr=False)
    special_ids: frozenset[int] = field(repr=False)

    @property
    def has_generation_tags(self) -> bool:
        """Whether the chat template marks the assistant's text itself, by {% generation %}."""
        return bool(self.chat_template and re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template))

    def encode(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and their character spans in `text`. special: with BOS and such."""
        encoded = self.hf(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    def render(self, messages: Sequence[dict], generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it; DataError if the template refuses it."""
        if not self.chat_template:
            raise DataError(
                f"the tokenizer in {self.directory} has no chat template; give one by --chat-template FILE, "
                "or use --render plain"
            )
        try:
            return self.hf.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:  # Jinja and the template raise whatever they like.
            raise DataError(f"the chat template refuses the conversation: {error}") from None

    def encode_with_generation_tags(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """Token ids of the conversation and the mask (0, 1) of the template's {% generation %} blocks."""
        try:
            encoded = self.hf.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception as error:  # Jinja and the template raise whatever they like.
            raise DataError(f"the chat template refuses the conversation: {error}") from None
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def check_ids(self, ids: Sequence[int], where: str) -> None:
        """Every id must be a row of the embedding (or, without a model, an id of the tokenizer)."""
        limit = self.vocab_size if self.model_vocab_size is None else self.model_vocab_size
        for place, token in enumerate(ids):
            if not 0 <= token < limit:
                raise DataError(
                    f"{where}: token {place} has id {token}, not in [0, {limit}) of the vocabulary"
                )


def load_tokenizer(directory: str | os.PathLike, chat_template: str | os.PathLike | None = None) -> Tokenizer:
    """Loads the tokenizer of a local folder that holds tokenizer.json; nothing is downloaded.

    chat_template: a file with a Jinja template to use instead of the folder's own.
    Raises DataError if the folder has no fast tokenizer.
    """
    directory = os.fspath(directory)
    if not os.path.isdir(directory):
        raise DataError(f"{directory}: not a folder; it must be a Hugging Face model or tokenizer folder")
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
        raise DataError(
            f"{directory}: no tokenizer.json; save a fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(directory, local_files_only=True, use_fast=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{directory}: transformers cannot load the tokenizer: {first}") from None
    if not hf.is_fast:
        raise DataError(
            f"{directory}: {type(hf).__name__} is not a fast tokenizer; masks need character offsets"
        )
    hf.model_max_length = int(1e30)  # lengths are ours to judge; no warning per document
    template = read_text_file(chat_template) if chat_template is not None else hf.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    ids = hf.get_vocab().values()
    if not ids:
        raise DataError(f"{path}: the vocabulary is empty")
    return Tokenizer(
        hf=hf,
        directory=directory,
        sha256=file_sha256(path),
        vocab_size=max(ids) + 1,
        model_vocab_size=_model_vocab_size(os.path.join(directory, "config.json")),
        chat_template=template,
        specials=_special_pattern(hf),
        special_ids=frozenset(
            [number for number, token in hf.added_tokens_decoder.items() if token.special]
            + hf.all_special_ids
        ),
    )


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _special_pattern(hf: Any) -> re.Pattern:
    """Matches the text of any special token, the longest first."""
    names = {token.content for token in hf.added_tokens_decoder.values() if token.special}
    names |= set(hf.all_special_tokens)
    names.discard("")
    if not names:
        return re.compile(r"(?!)")
    return re.compile(
        "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name)))
    )


def _model_vocab_size(path: str) -> int | None:
    if not os.path.isfile(path):
        return None
    config = parse_json(read_text_file(path), path)
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if size is not None and (type(size) is not int or size < 1):
        raise DataError(f"{path}: vocab_size must be a positive integer, got {size!r}")
    return size
