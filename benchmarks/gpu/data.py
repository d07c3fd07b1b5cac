"""Inputs of the attention benchmark: random, real-like, and statistics of what a selection keeps.

All generators take a seed and produce bfloat16 q (B, S, H, D), k, v (B, S, Hkv, D) and dout (B, S, H, D) on
the device. Nothing is ever zero: a card draws less power, and so runs faster, on zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Inputs:
    q: Tensor  # (B, S, H, D)
    k: Tensor  # (B, S, Hkv, D)
    v: Tensor  # (B, S, Hkv, D)
    dout: Tensor  # (B, S, H, D)

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    def first(self, tokens: int) -> Inputs:
        """The first `tokens` tokens of every sequence, as a copy."""
        return Inputs(*(x[:, :tokens].contiguous() for x in (self.q, self.k, self.v, self.dout)))


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def random(tokens: int, shape: Shape, generator: torch.Generator) -> Inputs:
    """Standard normal q, k, v: every row's selection is spread evenly over the keys, the worst case."""
    b, h, hkv, d = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    sizes = (h, hkv, hkv, h)
    return Inputs(*(_normal(generator, b, tokens, n, d).bfloat16() for n in sizes))


# The real-like generator: queries and keys drift along the sequence, so neighbouring rows keep much the same
# keys.
QUERY_TIME, KEY_TIME = 400.0, 50.0  # correlation times in tokens
QUERY_NOISE, KEY_DRIFT = 0.35, 0.8


def real_like(tokens: int, shape: Shape, generator: torch.Generator) -> Inputs:
    """q = (a + 0.35 w) / sqrt(1 + 0.35^2), a an AR(1) process of unit variance per query head; k = sqrt(0.8)
    b + sqrt(0.2) w, b an AR(1) process per KV head; w white. The unions of kept keys come out as in
    SmolLM2-135M.
    """
    b, h, hkv, d = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    drift = autoregressive(_normal(generator, b, tokens, h, d), QUERY_TIME)
    drift += QUERY_NOISE * _normal(generator, b, tokens, h, d)
    q = (drift / math.sqrt(1 + QUERY_NOISE**2)).bfloat16()
    drift = autoregressive(_normal(generator, b, tokens, hkv, d), KEY_TIME)
    noise = _normal(generator, b, tokens, hkv, d)
    k = (math.sqrt(KEY_DRIFT) * drift + math.sqrt(1 - KEY_DRIFT) * noise).bfloat16()
    v = _normal(generator, b, tokens, hkv, d).bfloat16()
    return Inputs(q, k, v, _normal(generator, b, tokens, h, d).bfloat16())


def autoregressive(white: Tensor, time: float) -> Tensor:
    """x_t = rho x_(t-1) + sqrt(1 - rho^2) w_t along dimension 1, x_0 = w_0, rho = exp(-1 / time)."""
    rho = math.exp(-1.0 / time)
    driven = white * math.sqrt(1 - rho * rho)
    driven[:, 0] = white[:, 0]
    return _decaying_sum(driven, rho)


def _decaying_sum(x: Tensor, rho: float, block: int = 128) -> Tensor:
    """y_t = rho y_(t-1) + x_t along dimension 1: a triangular product per block; the ends of the blocks are
    such a sum themselves, of decay rho^block.
    """
    batch, tokens = x.shape[:2]
    steps = torch.arange(block, device=x.device)
    lag = steps[:, None] - steps[None, :]
    weights = torch.where(lag >= 0, rho ** lag.clamp(min=0), 0.0).to(x.dtype)
    blocks = -(-tokens // block)
    padded = x.new_zeros(batch, blocks * block, *x.shape[2:])
    padded[:, :tokens] = x
    rows = padded.reshape(batch, blocks, block, -1)
    rows = weights @ rows
    if blocks > 1:
        ends = _decaying_sum(rows[:, :, -1], rho**block, block)
        decay = (rho ** (steps + 1)).to(x.dtype)
        rows[:, 1:] += decay[:, None] * ends[:, :-1, None]
    return rows.reshape(batch, blocks * block, *x.shape[2:])[:, :tokens]


# ------------------------------------------------------------------------------------------------------------
# What a selection keeps
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How many keys a row keeps, as the operators' keyword arguments and as numbers per row."""

    label: str
    arguments: dict

    def widths(self, tokens: int) -> Tensor:
        """W of every row of a causal sequence (int64, on the host)."""
        seen = torch.arange(1, tokens + 1, dtype=torch.float64)
        if "ratio" in self.arguments:
            kept = (self.arguments["ratio"] * seen - 1e-6).ceil()
        else:
            kept = torch.full_like(seen, self.arguments["topk"])
        return torch.minimum(kept.clamp(min=1), seen).long()


def union_shares(inputs: Inputs, budget: Budget, seed: int) -> dict[str, float]:
    """Distinct keys kept by at least one of 64 (128) neighbouring rows, and runs of 16 consecutive keys
    touched by 64 rows, each as a share of what the last of those rows sees. From exact scores (float32) of a
    sample: up to 8 heads and 16 tiles of 128 rows each, in the second half of the context.
    """
    picks = torch.Generator().manual_seed(seed)
    batch, tokens, heads, _ = inputs.q.shape
    tile = min(128, tokens // 2)
    half = min(64, tile)
    widths = budget.widths(tokens)
    shares: dict[str, list[float]] = {"rows_64": [], "rows_128": [], "chunks_16": []}
    for head in torch.randperm(heads, generator=picks)[:8].tolist():
        sequence = int(torch.randint(batch, (), generator=picks))
        keys = inputs.k[sequence, :, head // inputs.group].float()
        starts = torch.arange(tokens // 2, tokens - tile + 1, tile)
        for start in starts[torch.randperm(len(starts), generator=picks)[:16]].tolist():
            kept = _kept_of_rows(inputs.q[sequence, start : start + tile, head].float(), keys, start, widths)
            shares["rows_128"].append(kept.any(0).float().mean().item())
            part = kept[:half, : start + half].any(0)
            shares["rows_64"].append(part.float().mean().item())
            padded = torch.nn.functional.pad(part, (0, -len(part) % 16))
            shares["chunks_16"].append(padded.reshape(-1, 16).any(1).float().mean().item())
    return {name: sum(x) / len(x) for name, x in shares.items()}


def _kept_of_rows(q: Tensor, keys: Tensor, start: int, widths: Tensor) -> Tensor:
    """(rows, seen keys) bool: the W highest scores of each row; rows start, start + 1, ... of a sequence."""
    rows = len(q)
    seen = start + rows
    scores = q @ keys[:seen].T
    index = torch.arange(seen, device=q.device)
    scores.masked_fill_(index[None, :] > start + torch.arange(rows, device=q.device)[:, None], -math.inf)
    wanted = widths[start:seen].to(q.device)
    best = scores.topk(int(wanted.max()), dim=1).values
    return scores >= best.gather(1, wanted[:, None] - 1)
