"""Tiny random transformers models and counters shared by the Hugging Face tests."""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 97
LAYERS = 3
FIRST_TOKEN = 3  # 0 is padding, 1 and 2 are special
MODELS = ("Llama", "Qwen2", "Qwen3", "Mistral")


def tiny_config(kind: str, **changes):
    """A 3-layer GQA config whose random attention is far from uniform, so that dropping keys shows."""
    values = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    if kind == "Mistral":
        values["sliding_window"] = None
    values.update(changes)
    return getattr(transformers, f"{kind}Config")(**values)


def tiny_model(kind: str = "Llama", seed: int = 0, **changes):
    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}ForCausalLM")(tiny_config(kind, **changes)).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, VOCAB, shape, generator=generator)


def pad_batch(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """1D token rows to input_ids and attention_mask (B, longest)."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, where] = row
        mask[i, where] = 1
    return ids, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """position_ids as ``generate`` makes them from a padding mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class CountOperators(TorchDispatchMode):
    """Counts calls of the operators: ``counts["fwd"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "topk_attn":
            name = func._schema.name.split("::")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> int:
        return self.counts.get("fwd", 0) + self.counts.get("fwd_kvcache", 0)


def continuous_batching_config(**changes):
    """A small paged cache, so that a test does not reserve most of the machine's memory."""
    fields = {field.name for field in dataclasses.fields(transformers.ContinuousBatchingConfig)}
    values = {"num_blocks": 16, "max_batch_tokens": 64, **changes}
    values["page_size" if "page_size" in fields else "block_size"] = 16
    return transformers.ContinuousBatchingConfig(**values)
