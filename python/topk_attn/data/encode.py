"""Records to documents: token ids and, for each token, whether it is a target that carries loss.

What carries loss:
    messages  the turns of the roles to train (the assistant's by default) with their stop token; nothing of
              the template, of system or of user text
    pair      the completion, and the EOS that is appended to it
    text      everything
    tokens    what the record says
The first token of a document never carries loss: nothing comes before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from topk_attn.data.chat import trained_spans
from topk_attn.data.errors import DataError
from topk_attn.data.records import ROLES, Record
from topk_attn.data.tokenizer import Tokenizer

TURNS = ("all", "last", "split")
OVERFLOW = ("error", "split", "truncate", "drop")

Document = tuple[np.ndarray, np.ndarray]  # input_ids int32 (n), loss_mask uint8 (n)


@dataclass(frozen=True)
class EncodeOptions:
    """roles: whose turns carry loss.
    turns: "all" turns of a conversation at once; only the "last" one, the conversation ending there; or
        "split": a document per turn, each ending there (for templates that rewrite earlier turns).
    append_eos: EOS behind each document. None: for prompt_completion only; chat templates write their own.
    sequence_len: longest document in tokens, or None.
    overflow: what happens to a longer one: "error", "split" into documents of sequence_len, "truncate" or
        "drop". None: split for text, error for the rest.
    """

    roles: tuple[str, ...] = ("assistant",)
    turns: str = "all"
    append_eos: bool | None = None
    sequence_len: int | None = None
    overflow: str | None = None

    def __post_init__(self):
        if not self.roles:
            raise DataError("roles to train must name at least one role")
        for role in self.roles:
            if role not in ROLES:
                raise DataError(f"roles to train must be among {', '.join(ROLES)}, got {role!r}")
        if self.turns not in TURNS:
            raise DataError(f"turns must be one of {', '.join(TURNS)}, got {self.turns!r}")
        if self.overflow is not None and self.overflow not in OVERFLOW:
            raise DataError(f"overflow must be one of {', '.join(OVERFLOW)}, got {self.overflow!r}")
        if self.sequence_len is not None and self.sequence_len < 2:
            raise DataError(f"sequence_len must be at least 2, got {self.sequence_len}")
        if self.overflow is not None and self.sequence_len is None:
            raise DataError("overflow needs sequence_len")


def encode(tokenizer: Tokenizer, record: Record, options: EncodeOptions | None = None) -> list[Document]:
    """The documents of one record: usually one; several if it is split, none if it is too long and dropped.

    Raises DataError with the record's place if it cannot be used.
    """
    options = options or EncodeOptions()
    make = {"messages": _conversation, "pair": _pair, "text": _text, "tokens": _tokens}[record.kind]
    try:
        documents = make(tokenizer, record.payload, options)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    fitted = []
    for ids, mask in documents:
        tokenizer.check_ids(ids, record.where)
        ids, mask = np.asarray(ids, np.int32), np.asarray(mask, np.uint8)
        mask[:1] = 0
        if not mask.any():
            raise DataError(f"{record.where}: no token of the document carries loss ({len(ids)} tokens)")
        fitted += _fit(ids, mask, record, options)
    return fitted


def _conversation(
    tokenizer: Tokenizer, messages: list[dict], options: EncodeOptions
) -> list[tuple[list, list]]:
    turns = [number for number, message in enumerate(messages) if message["role"] in options.roles]
    if not turns:
        raise DataError(f"no message of a role to train ({', '.join(options.roles)})")
    if options.turns == "all":
        parts = [(messages, turns)]
    else:
        kept = turns if options.turns == "split" else turns[-1:]
        parts = [(messages[: turn + 1], [turn]) for turn in kept]
    if tokenizer.has_generation_tags and set(options.roles) == {"assistant"}:
        return [_by_generation_tags(tokenizer, part, len(chosen)) for part, chosen in parts]
    return [_by_spans(tokenizer, part, chosen) for part, chosen in parts]


def _by_spans(tokenizer: Tokenizer, messages: list[dict], turns: list[int]) -> tuple[list, list]:
    text, spans = trained_spans(tokenizer, messages, turns)
    ids, offsets = tokenizer.encode(text, special=False)
    mask = [0] * len(ids)
    for (begin, end), turn in zip(spans, turns, strict=True):
        last = _mark(mask, offsets, text, begin, end)
        if last is None or ids[last] not in tokenizer.special_ids:
            raise DataError(
                f"message {turn + 1} ({messages[turn]['role']}): its stop token is not a single token"
            )
    return ids, mask


def _by_generation_tags(tokenizer: Tokenizer, messages: list[dict], turns: int) -> tuple[list, list]:
    """The mask of {% generation %} blocks, the last `turns` of them, each closed at its stop token."""
    ids, mask = tokenizer.encode_with_generation_tags(messages)
    marked = np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2).tolist()  # [begin, end) of runs of ones
    spoken = sum(message["role"] == "assistant" for message in messages)
    if len(marked) != spoken:
        raise DataError(
            f"the template's generation blocks mark {len(marked)} places for {spoken} assistant turns"
        )
    final = [0] * len(ids)
    for begin, end in marked[spoken - turns :]:
        end = _stop_of_block(tokenizer, ids, begin, end)
        final[begin:end] = [1] * (end - begin)
    return ids, final


def _stop_of_block(tokenizer: Tokenizer, ids: list[int], begin: int, end: int) -> int:
    """Where the turn of a generation block [begin, end) ends: behind its stop token."""
    last = max((place for place in range(begin, end) if ids[place] in tokenizer.special_ids), default=None)
    if last is not None and not tokenizer.hf.decode(ids[last + 1 : end]).strip():
        return last + 1  # a line break of the template may follow it in the block
    if end < len(ids) and ids[end] in tokenizer.special_ids:
        return end + 1  # the block leaves the stop token out
    raise DataError(
        "no special token ends the template's generation block, so a model could not learn to stop"
    )


def _pair(tokenizer: Tokenizer, pair: Sequence[str], options: EncodeOptions) -> list[tuple[list, list]]:
    prompt, completion = pair
    text = prompt + completion
    ids, offsets = _plain(tokenizer, text)
    mask = [0] * len(ids)
    _mark(mask, offsets, text, len(prompt), len(text))
    return [_close(tokenizer, ids, mask, options.append_eos is not False)]


def _text(tokenizer: Tokenizer, text: str, options: EncodeOptions) -> list[tuple[list, list]]:
    ids, _ = _plain(tokenizer, text)
    return [_close(tokenizer, ids, [1] * len(ids), bool(options.append_eos))]


def _tokens(tokenizer: Tokenizer, payload: Sequence[list], options: EncodeOptions) -> list[tuple[list, list]]:
    ids, mask = payload
    return [_close(tokenizer, list(ids), list(mask), bool(options.append_eos))]


def _plain(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Text with the BOS (and such) that the tokenizer adds in front; an EOS behind it is left to _close."""
    ids, offsets = tokenizer.encode(text, special=True)
    eos = tokenizer.hf.eos_token_id
    if ids and ids[-1] == eos and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]
    return ids, offsets


def _close(tokenizer: Tokenizer, ids: list[int], mask: list[int], append_eos: bool) -> tuple[list, list]:
    if append_eos:
        eos = tokenizer.hf.eos_token_id
        if eos is None:
            raise DataError("the tokenizer has no EOS token to append; use --no-append-eos")
        if not ids or ids[-1] != eos:
            return [*ids, eos], [*mask, 1]
    return ids, mask


def _mark(mask: list[int], offsets: Sequence[tuple[int, int]], text: str, begin: int, end: int) -> int | None:
    """Sets the mask of the tokens of text[begin:end]; returns the last one's number.

    A token that begins before the span carries loss only if it also carries text of the span: " answer" does,
    a line break that merged with the template's does not, as the prompt of a generation would contain it.
    """
    last = None
    for place, (left, right) in enumerate(offsets):
        inside = begin <= left < end
        crossing = left < begin < right and text[begin : min(right, end)].strip() != ""
        if inside or crossing:
            mask[place] = 1
            last = place
    return last


def _fit(ids: np.ndarray, mask: np.ndarray, record: Record, options: EncodeOptions) -> list[Document]:
    limit = options.sequence_len
    if limit is None or len(ids) <= limit:
        return [(ids, mask)]
    overflow = options.overflow or ("split" if record.kind == "text" else "error")
    if overflow == "error":
        raise DataError(
            f"{record.where}: the document has {len(ids)} tokens, more than --sequence-len {limit}; choose "
            "--overflow split, truncate or drop"
        )
    if overflow == "drop":
        return []
    stop = limit if overflow == "truncate" else len(ids)
    parts = [(ids[at : at + limit], mask[at : at + limit].copy()) for at in range(0, stop, limit)]
    for _, part_mask in parts:
        part_mask[0] = 0
    return [(part, part_mask) for part, part_mask in parts if part_mask.any()]
