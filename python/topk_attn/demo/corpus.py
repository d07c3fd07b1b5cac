"""The demo's text as JSON lines, divided into a training and a held-out part before anything is trained.

Two kinds of documents: question/answer dialogs as `messages` (loss on the answer), and essays as long
`text` (loss on every token). What is held out depends on the seed and the content only: dialogs are ordered
by a hash of their question, so that all answers to one question are on the same side, essays by a hash of
their name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from . import download

# Essays shorter than this are not held out: their tokens would not fill one evaluation window.
_LONG_ESSAY = 8_000


@dataclass(frozen=True)
class Split:
    """One side of the split."""

    dialogs: list[list[dict]]  # each a list of messages
    essays: dict[str, str]  # name -> text


def read_dialogs(folder: Path) -> list[list[dict]]:
    """Question/answer pairs of the dialog files, each once.

    The corpus also has longer lists, which are turns of a conversation in some files and alternative
    answers in others; only lists of exactly two lines mean one thing, so only these are used.
    """
    pairs = {}
    for text in download.dialogs(folder).values():
        for conversation in yaml.safe_load(text)["conversations"]:
            if len(conversation) == 2:
                question, answer = (line.strip() for line in conversation)
                if question and answer:
                    pairs[question, answer] = None
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in pairs
    ]


def _rank(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()


def split(dialogs: list[list[dict]], essays: dict[str, str], questions: int, texts: int, seed: int):
    """(training, held out): `questions` distinct questions with all their answers and `texts` long essays
    held out.
    """

    def question_of(dialog: list[dict]) -> str:
        return " ".join(dialog[0]["content"].lower().split())

    ranked = sorted({question_of(dialog) for dialog in dialogs}, key=lambda q: _rank(seed, q))
    held_questions = set(ranked[:questions])
    long = sorted((name for name in essays if len(essays[name]) >= _LONG_ESSAY), key=lambda n: _rank(seed, n))
    held_essays = set(long[:texts])
    if len(ranked) <= questions or len(long) <= texts:
        raise ValueError(
            f"cannot hold out {questions} of {len(ranked)} questions and {texts} of {len(long)} essays"
        )
    parts = []
    for held in (False, True):
        parts.append(
            Split(
                [dialog for dialog in dialogs if (question_of(dialog) in held_questions) == held],
                {name: text for name, text in essays.items() if (name in held_essays) == held},
            )
        )
    return parts[0], parts[1]


def write_jsonl(path: Path, records: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
