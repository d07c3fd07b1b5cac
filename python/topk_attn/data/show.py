"""topk-data inspect: a shard's documents with the loss mask made visible."""

import itertools
from collections.abc import Iterator

import numpy as np

from topk_attn.data.errors import DataError
from topk_attn.data.shards import Shard
from topk_attn.data.tokenizer import Tokenizer

_GREEN, _GREY, _PLAIN = "\033[32m", "\033[90m", "\033[0m"


def runs(mask: np.ndarray) -> Iterator[tuple[bool, int, int]]:
    """(carries loss, begin, end) of the stretches of equal mask."""
    begin = 0
    for value, group in itertools.groupby(mask.tolist()):
        end = begin + len(list(group))
        yield bool(value), begin, end
        begin = end


def document_text(shard: Shard, number: int, tokenizer: Tokenizer | None, color: bool) -> str:
    """One document: text (or ids without a tokenizer); what carries loss green, or between [[ and ]]."""
    ids, mask = shard.document(number)
    parts = []
    for loss, begin, end in runs(mask):
        piece = ids[begin:end].tolist()
        text = (
            tokenizer.hf.decode(piece, skip_special_tokens=False) if tokenizer else " ".join(map(str, piece))
        )
        if color:
            parts.append((_GREEN if loss else _GREY) + text + _PLAIN)
        else:
            parts.append(f"[[{text}]]" if loss else text)
    return ("" if tokenizer else " ").join(parts)


def check_tokenizer(shard: Shard, path: str, tokenizer: Tokenizer) -> None:
    """The shard must have been made with this tokenizer, or its ids would be shown as other text."""
    made_with = shard.metadata.get("tokenizer_sha256")
    if made_with != tokenizer.sha256:
        raise DataError(
            f"{path}: made with another tokenizer: its tokenizer.json had sha256 {made_with}, the one in "
            f"{tokenizer.directory} has {tokenizer.sha256}"
        )
