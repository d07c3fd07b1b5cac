"""topk-data tokens: prompts to a token file for topk-generate and for sample generations of the trainer.

The file is a token shard whose documents are the prompts; no token of it carries loss.
"""

import os
from collections.abc import Sequence

import numpy as np

from topk_attn.data.errors import DataError
from topk_attn.data.records import parse_json, parse_messages, read_text_file
from topk_attn.data.shards import write_shard_atomic
from topk_attn.data.tokenizer import Tokenizer

SPLIT = "prompts"


def text_prompt(tokenizer: Tokenizer, text: str, where: str = "prompt") -> list[int]:
    """Token ids of plain text, with the BOS (if any) that the tokenizer puts in front and no EOS behind."""
    if not text:
        raise DataError(f"{where}: the text is empty")
    ids, offsets = tokenizer.encode(text, special=True)
    if len(ids) > 1 and ids[-1] == tokenizer.hf.eos_token_id and offsets[-1][0] == offsets[-1][1]:
        ids = ids[:-1]
    return ids


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[dict], where: str = "chat") -> list[int]:
    """Token ids of a conversation up to where the assistant answers; the last message must be another's."""
    parse_messages(messages, where)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's; a prompt must end before its answer")
    try:
        text = tokenizer.render(messages, generation_prompt=True)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return tokenizer.encode(text, special=False)[0]


def read_chats(path: str | os.PathLike) -> list[tuple[str, list[dict]]]:
    """(where, messages) of a file: a JSON array of messages, {"messages": [...]}, or JSON lines of these."""
    path = os.fspath(path)
    text = read_text_file(path)
    try:
        items = [(path, parse_json(text, path))]
    except DataError:
        lines = [
            (f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        if len(lines) < 2:
            raise
        items = [(where, parse_json(line, where)) for where, line in lines]
    chats = []
    for where, item in items:
        messages = item.get("messages") if isinstance(item, dict) else item
        chats.append((where, parse_messages(messages, where)))
    return chats


def write_prompts(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], path: str | os.PathLike) -> None:
    """Writes the token file (atomically). Prompts are lists of ids, none empty."""
    if not prompts:
        raise DataError("no prompts to write")
    for number, ids in enumerate(prompts):
        if not ids:
            raise DataError(f"prompt {number}: no tokens")
        tokenizer.check_ids(ids, f"prompt {number}")
    write_shard_atomic(
        path,
        [(np.asarray(ids, np.int32), np.zeros(len(ids), np.uint8)) for ids in prompts],
        {"tokenizer_sha256": tokenizer.sha256, "vocab_size": str(tokenizer.vocab_size), "split": SPLIT},
    )
