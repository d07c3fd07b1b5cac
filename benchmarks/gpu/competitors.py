"""What the attention benchmark runs: this library's operators, and what PyTorch offers.

A competitor is a forward over leaves that require a gradient. Its inputs have the layout that suits it best,
made before the clock starts; its output and dQ are checked (measure.check) before it is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import Budget, Inputs


class NotAvailable(Exception):
    """This competitor does not exist on this device: its rows are left out, not failed."""


@dataclass
class Competitor:
    name: str
    forward: Callable[[], Tensor]
    leaves: list[Tensor]  # q, k, v in the competitor's layout
    dout: Tensor
    heads_first: bool = False  # the layout of out and of the leaves: (B, H, S, D) instead of (B, S, H, D)
    budget: Budget | None = None  # None: dense
    tolerance: float = 0.02  # of out and dq, relative to float64 (Frobenius)
    context: Callable = contextlib.nullcontext
    note: str = ""

    def token_major(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.heads_first else x


# ------------------------------------------------------------------------------------------------------------
# This library
# ------------------------------------------------------------------------------------------------------------


def overridden(device: torch.device, settings: dict) -> Callable:
    """A factory of contexts in which the CUDA operators take the given build, selection or regime."""
    if not settings:
        return contextlib.nullcontext
    if device.type != "cuda":
        raise NotAvailable("builds and regimes are of the CUDA operators")
    import topk_attn.cuda

    return lambda: topk_attn.cuda.override(**settings)


def topk(name: str, inputs: Inputs, budget: Budget, deterministic: bool = False, **settings) -> Competitor:
    import topk_attn

    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def forward() -> Tensor:
        return topk_attn.topk_attn_func(*leaves, **budget.arguments, deterministic=deterministic)

    context = overridden(inputs.q.device, settings)
    return Competitor(name, forward, leaves, inputs.dout, budget=budget, context=context)


# ------------------------------------------------------------------------------------------------------------
# Dense attention
# ------------------------------------------------------------------------------------------------------------


def _dense(name: str, inputs: Inputs, backend: SDPBackend | None, expanded: bool, copied: bool) -> Competitor:
    repeat = inputs.group if expanded else 1
    views = [inputs.q.transpose(1, 2)]
    views += [x.repeat_interleave(repeat, dim=2).transpose(1, 2) for x in (inputs.k, inputs.v)]
    if copied:
        views = [x.contiguous() for x in views]
    dout = inputs.dout.transpose(1, 2)
    leaves = [x.detach().requires_grad_() for x in views]

    def forward() -> Tensor:
        chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
        with chosen:
            grouped = leaves[0].shape[1] != leaves[1].shape[1]
            return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=grouped)

    note = "K and V repeated before the clock starts" if expanded else "enable_gqa"
    note += ", (B, H, S, D) copies" if copied else ", views of (B, S, H, D)"
    return Competitor(
        name, forward, leaves, dout.contiguous() if copied else dout, heads_first=True, note=note
    )


DENSE = {"dense cuDNN": SDPBackend.CUDNN_ATTENTION, "dense flash": SDPBackend.FLASH_ATTENTION}


def dense_forms(name: str, inputs: Inputs) -> list[Callable[[Inputs], Competitor]]:
    """The ways to call a dense backend; the caller takes the fastest that is correct."""
    backend = DENSE[name]
    if inputs.q.device.type != "cuda":
        if name != "dense cuDNN":
            raise NotAvailable("a CUDA backend of SDPA")
        backend = None  # stands in for it, so that the program can be tried without a card
    group_forms = (False, True) if inputs.group > 1 else (False,)
    return [
        lambda x, expanded=expanded, copied=copied: _dense(name, x, backend, expanded, copied)
        for expanded in group_forms
        for copied in (False, True)
    ]


# ------------------------------------------------------------------------------------------------------------
# Exact top-k with what PyTorch offers
# ------------------------------------------------------------------------------------------------------------

SLAB_ROWS = 512


def _grouped_scores(rows: Tensor, keys: Tensor) -> Tensor:
    """float32 scores (N, rows, keys) of bfloat16 operands."""
    if rows.device.type == "cuda":
        return torch.bmm(rows, keys, out_dtype=torch.float32)
    return torch.bmm(rows.float(), keys.float())


@torch.no_grad()
def slab_thresholds(q: Tensor, k: Tensor, widths: Tensor) -> Tensor:
    """A value between the W-th and the (W+1)-th score of every row, (B, H, S) float32, from slabs of 512
    rows. Between them, because the scores that it is compared with are rounded otherwise.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    by_head = k.permute(0, 2, 3, 1)  # (B, Hkv, D, S)
    thresholds = torch.empty(batch, kv_heads, heads // kv_heads, tokens, device=q.device)
    host_widths = widths.tolist()
    on_device = widths.to(q.device)
    future = torch.ones(SLAB_ROWS, SLAB_ROWS, dtype=torch.bool, device=q.device).triu(1)
    for start in range(0, tokens, SLAB_ROWS):
        end = min(start + SLAB_ROWS, tokens)
        rows = end - start
        slab = grouped[:, :, :, start:end].reshape(batch * kv_heads, -1, dim)
        scores = _grouped_scores(slab, by_head[..., :end].reshape(batch * kv_heads, dim, end))
        scores = scores.view(batch, kv_heads, -1, rows, end)
        scores[..., start:].masked_fill_(future[:rows, :rows], float("-inf"))
        width = max(host_widths[start:end])
        same = min(host_widths[start:end]) == width
        best = scores.topk(min(width + 1, end), dim=-1, sorted=not same).values
        if width == end:  # the last row keeps all it sees
            best = F.pad(best, (0, 1), value=float("-inf"))
        if same:
            found = best.topk(2, dim=-1, largest=False).values.mean(-1)
        else:
            index = on_device[start:end, None].expand(*best.shape[:-1], 1)
            found = best.gather(-1, torch.cat((index - 1, index), -1)).mean(-1)
        thresholds[..., start:end] = found
    return thresholds.view(batch, heads, tokens)


def _flex(q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, mask, softmax_scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def keep(score, batch, head, row, key):
        return torch.where(score >= threshold[batch, head, row], score * softmax_scale, float("-inf"))

    return flex_attention(q, k, v, score_mod=keep, block_mask=mask, scale=1.0, enable_gqa=True)


def _causal(batch, head, row, key):
    return key <= row


_compiled_flex = None


def slab_flex(name: str, inputs: Inputs, budget: Budget) -> Competitor:
    """Thresholds from score slabs, then FlexAttention with a threshold as score modifier, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask

    global _compiled_flex
    if inputs.q.device.type != "cuda":
        raise NotAvailable("compiled FlexAttention trains on CUDA only")
    if _compiled_flex is None:
        _compiled_flex = torch.compile(_flex, dynamic=False)
    tokens, device = inputs.tokens, inputs.q.device
    q, k = inputs.q, inputs.k
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    widths = budget.widths(tokens)
    scale = inputs.q.shape[-1] ** -0.5
    mask = create_block_mask(_causal, None, None, tokens, tokens, device=device)

    def forward() -> Tensor:
        return _compiled_flex(*leaves, slab_thresholds(q, k, widths), mask, scale)

    dout = inputs.dout.transpose(1, 2).contiguous()
    return Competitor(name, forward, leaves, dout, heads_first=True, budget=budget)


def eager(name: str, inputs: Inputs, budget: Budget) -> Competitor:
    """Scores, topk, mask and softmax over the whole square, in bfloat16 as a user would write it. Rounded
    scores tie, so it keeps a few keys more than W; hence the wide tolerance.
    """
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    tokens, device, group = inputs.tokens, inputs.q.device, inputs.group
    widths = budget.widths(tokens)
    index = (widths.to(device) - 1)[:, None]
    width = int(widths.max())
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)

    def forward() -> Tensor:
        q, k, v = leaves
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).masked_fill(future, float("-inf"))
        best = scores.detach().topk(width, dim=-1).values
        threshold = best.gather(-1, index.expand(*best.shape[:-1], 1))
        kept = scores.masked_fill(scores < threshold, float("-inf"))
        return (kept * q.shape[-1] ** -0.5).softmax(-1) @ v

    dout = inputs.dout.transpose(1, 2).contiguous()
    return Competitor(name, forward, leaves, dout, heads_first=True, budget=budget, tolerance=0.5)
