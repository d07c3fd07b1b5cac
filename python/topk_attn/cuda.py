"""Which CUDA kernels serve a call, and how to ask for others.

Every choice computes the same sets; they differ in speed and in the GPUs that they run on. The rules are
those of csrc/kernels/cuda/plan.h:

- build: "plain" (float32), "portable" (bf16 and fp16, every GPU since compute capability 8.0), "sm90" (H100,
  H200);
- selection: "slab" (scores of a few query tiles in a reused buffer) or "fused" (inside the product);
- largest_share: a query tile whose union of kept keys is at most this share of the keys that it sees is
  served by the gathered kernels, the others by masked dense ones. 0: no tile is gathered.
"""

import contextlib
from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """What serves a call."""

    build: str
    selection: str
    forward_share: float
    backward_share: float


def available() -> bool:
    """Whether this build of the library has CUDA kernels."""
    return hasattr(torch.ops.topk_attn, "_cuda_plan")


def _operators():
    if not available():
        raise RuntimeError("topk_attn was built without CUDA kernels (TOPK_CUDA): see docs/install.md")
    return torch.ops.topk_attn


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    causal: bool = True,
    topk: int | None = None,
    ratio: float | None = None,
    min_keys: int = 1,
    max_keys: int | None = None,
    select: str = "head",
    sink: int = 0,
    recent: int = 0,
    deterministic: bool = False,
) -> Plan:
    """The plan of `topk_attn_func` (or, without v, `topk_select`) for these CUDA tensors, under the current
    override.

    q (B, Tq, H, D), k (B, Tk, Hkv, D), v (B, Tk, Hkv, Dv). Raises RuntimeError with the reason where an
    override asks for what cannot be done.
    """
    return Plan(
        *_operators()._cuda_plan(
            q,
            k,
            v,
            causal=causal,
            topk=topk,
            ratio=ratio,
            min_keys=min_keys,
            max_keys=max_keys,
            select=select,
            sink=sink,
            recent=recent,
            deterministic=deterministic,
        )
    )


_current = ("", "", -1.0)


@contextlib.contextmanager
def override(build: str | None = None, selection: str | None = None, largest_share: float | None = None):
    """Asks for kernels, process-wide, until the block ends; None leaves a choice to the library.

    A call that the wish cannot serve raises RuntimeError with the reason: nothing is replaced silently.
    """
    global _current
    before = _current
    wish = (build or "", selection or "", -1.0 if largest_share is None else float(largest_share))
    if wish[2] > 1.0 or (largest_share is not None and not wish[2] >= 0.0):
        raise ValueError(f"largest_share must be between 0 and 1, got {largest_share}")
    _operators()._cuda_override(*wish)
    _current = wish
    try:
        yield
    finally:
        _operators()._cuda_override(*before)
        _current = before


def last_plan() -> Plan:
    """The plan of the last forward or selection that ran on CUDA in this process."""
    return Plan(*_operators()._cuda_last_plan())
