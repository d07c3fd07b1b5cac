"""Held-out loss of a model under dense and under top-k attention, by transformers with the drop-in attention.

Documents of a token shard are packed into rows; they never see each other, positions restart in each, and the
loss is the mean over all target tokens (those with loss_mask 1), in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import topk_attn
from topk_attn.data.shards import read_shard


@dataclass(frozen=True)
class Mode:
    """One way to attend: dense, or top-k with the given budget."""

    name: str
    label: str
    budget: dict | None  # arguments of topk_attn.hf.configure; None: dense


# The first top-k mode is the one that demo-topk.yaml trains with.
MODES = (
    Mode("dense", "dense", None),
    Mode("topk_1_percent", "top-k 1 %", {"ratio": 0.01, "min_keys": 8}),
    Mode("topk_5_percent", "top-k 5 %", {"ratio": 0.05, "min_keys": 8}),
)


@dataclass
class Row:
    """Packed documents: input_ids (1, T), position_ids (1, T), targets (T), -100 where there is no loss."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor

    @property
    def loss_tokens(self) -> int:
        return int((self.targets != -100).sum())


def rows_of(shard: Path, row_len: int) -> list[Row]:
    """The shard's documents in order, as many to a row as fit; none may be longer than a row."""
    documents = read_shard(shard)
    rows: list[list[int]] = []
    room = 0
    for number in range(len(documents)):
        length = len(documents.document(number)[0])
        if length > row_len:
            raise ValueError(f"{shard}: document {number} has {length} tokens, more than a row of {row_len}")
        if length > room:
            rows.append([])
            room = row_len
        rows[-1].append(number)
        room -= length
    return [_pack([documents.document(number) for number in row]) for row in rows]


def _pack(documents: list[tuple[np.ndarray, np.ndarray]]) -> Row:
    ids, positions, targets = [], [], []
    for tokens, loss in documents:
        # A token's target is the next token of its document, if that one carries loss.
        following = np.where(loss[1:] == 1, tokens[1:], -100)
        ids.append(tokens)
        positions.append(np.arange(len(tokens)))
        targets.append(np.append(following, -100))

    def tensor(parts):
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return Row(tensor(ids)[None], tensor(positions)[None], tensor(targets))


def set_mode(model, mode: Mode) -> None:
    """Makes the model attend as `mode` says, and fails if it would not."""
    if mode.budget is None:
        topk_attn.hf.unconfigure(model)
    else:
        topk_attn.hf.configure(model, **mode.budget)
        topk_attn.hf.check(model)


@torch.no_grad()
def loss(model, rows: list[Row], on_row: Callable[[], None] = lambda: None) -> float:
    """Mean cross-entropy over the target tokens of all rows, in nats."""
    total, tokens = 0.0, 0
    for row in rows:
        at = (row.targets != -100).nonzero()[:, 0]
        hidden = model.model(
            input_ids=row.input_ids.to(model.device),
            position_ids=row.position_ids.to(model.device),
            use_cache=False,
        ).last_hidden_state[0]
        # Logits of the target positions only.
        logits = model.lm_head(hidden[at.to(hidden.device)]).float()
        targets = row.targets[at].to(logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        tokens += len(at)
        on_row()
    return total / tokens
