"""Checking, timing and weighing a competitor of the attention benchmark."""

from __future__ import annotations

import gc
import statistics
import threading
import time

import torch
from torch import Tensor

from .competitors import Competitor
from .data import Inputs

PARTS = ("forward", "backward", "both")

# ------------------------------------------------------------------------------------------------------------
# Is what is timed right?
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check(competitor: Competitor, inputs: Inputs, out: Tensor, dq: Tensor, seed: int) -> float:
    """Largest relative error (Frobenius, over a head's sampled rows) of out and dq against float64; raises
    above the competitor's tolerance. 4 heads, 48 rows each from the last seven eighths of the sequence, so
    that one key that falls the other way by rounding does not decide.
    """
    picks = torch.Generator().manual_seed(seed)
    batch, tokens, heads, dim = inputs.q.shape
    scale = dim**-0.5
    out, dq = (competitor.token_major(x) for x in (out, dq))
    worst = 0.0
    for head in torch.randperm(heads, generator=picks)[:4].tolist():
        sequence = int(torch.randint(batch, (), generator=picks))
        rows = torch.randint(tokens // 8, tokens, (48,), generator=picks)
        rows[0] = tokens - 1
        on_device = rows.to(inputs.q.device)
        q, dout = (x[sequence, on_device, head].double() for x in (inputs.q, inputs.dout))
        k, v = (x[sequence, :, head // inputs.group].double() for x in (inputs.k, inputs.v))
        scores = q @ k.T
        scores.masked_fill_(torch.arange(tokens, device=q.device) > on_device[:, None], float("-inf"))
        if competitor.budget is not None:
            widths = competitor.budget.widths(tokens)[rows].to(q.device)
            best = scores.topk(int(widths.max()), dim=1).values.gather(1, widths[:, None] - 1)
            scores.masked_fill_(scores < best, float("-inf"))
        p = (scores * scale).softmax(1)
        expected = p @ v
        dp = dout @ v.T
        ds = p * (dp - (p * dp).sum(1, keepdim=True))
        expected_dq = scale * ds @ k
        # What bfloat16 costs dq where its terms cancel: out is rounded before it enters delta, ds before the
        # product with keys that may have a large common part.
        delta = dout.norm(dim=1) * expected.norm(dim=1) * (p @ k).norm(dim=1)
        rounding = 2**-7 * scale * (delta + ds.norm(dim=1) * k.norm(dim=1).max()).norm()
        for name, got, want, slack in (("out", out, expected, 0.0), ("dq", dq, expected_dq, float(rounding))):
            distance = float((got[sequence, on_device, head].double() - want).norm())
            error = distance / float(want.norm())
            if not distance <= competitor.tolerance * float(want.norm()) + slack:  # NaN fails too
                raise RuntimeError(f"wrong result: {name} of head {head} is off by {error:.3g} of its size")
            worst = max(worst, error)
    return worst


def step(competitor: Competitor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with competitor.context():
        out = competitor.forward()
        return out.detach(), torch.autograd.grad(out, competitor.leaves, competitor.dout)


# ------------------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------------------


class Clock:
    """Milliseconds of a step's parts; on a card by events, with the L2 cache flushed before every sample."""

    FLUSH_BYTES = 256 * 2**20  # several times the L2 cache
    HEAD_START = 1_000_000  # cycles the card waits, so that the host's launches run ahead of it

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(self.FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def sample(self, competitor: Competitor) -> dict[str, float]:
        if self.cuda:
            self._flush.random_(0, 255)
            torch.cuda._sleep(self.HEAD_START)
        with competitor.context():
            begin = self._now()
            out = competitor.forward()
            middle = self._now()
            torch.autograd.grad(out, competitor.leaves, competitor.dout)
            end = self._now()
        if self.cuda:
            torch.cuda.synchronize()
        pairs = {"forward": (begin, middle), "backward": (middle, end), "both": (begin, end)}
        return {part: self._between(*pair) for part, pair in pairs.items()}

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first, second) -> float:
        return first.elapsed_time(second) if self.cuda else (second - first) * 1e3

    def call(self, run) -> float:
        """Milliseconds of one call of `run`."""
        if self.cuda:
            self._flush.random_(0, 255)
            torch.cuda._sleep(self.HEAD_START)
        begin = self._now()
        run()
        end = self._now()
        if self.cuda:
            torch.cuda.synchronize()
        return self._between(begin, end)


def median(samples: list[dict[str, float]], part: str) -> float:
    return statistics.median(sample[part] for sample in samples)


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


class _OutsideTorch:
    """Peak of device memory in use that is not torch's caching allocator: other allocators of this process
    (and of others, so the card must be free), asked every millisecond.
    """

    def __init__(self) -> None:
        self.peak = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> int:
        reserved = torch.cuda.memory_reserved()
        free, total = torch.cuda.mem_get_info()
        # Reserved is read twice: while torch itself grows the difference means nothing.
        return total - free - reserved if torch.cuda.memory_reserved() == reserved else 0

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, self.now())

    def finish(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self.peak, self.now())


def workspace(make, small: Inputs, large: Inputs) -> dict[str, int]:
    """Bytes that one forward and one backward take beyond inputs, results and gradients.

    `make(inputs)` gives the competitor. A small call first: kernel code that the driver loads is not
    workspace. Then an unmeasured step at full size, so that torch's pool does not grow while it is watched.
    Counted at the peak: everything of torch's allocator, and everything outside it. Not counted: out (S x H x
    D), lse and the encoding (12 bytes a row and head), dq, dk, dv. What the forward keeps for the backward
    beyond that counts in both.
    """
    step(make(small))
    competitor = make(large)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    outside_before = _OutsideTorch.now()
    step(competitor)
    for _ in range(3):
        torch.cuda.synchronize()
        reserved = torch.cuda.memory_reserved()
        watch = _OutsideTorch()
        found = _inside_torch(competitor, large)
        outside = max(0, watch.finish() - outside_before)
        if torch.cuda.memory_reserved() == reserved:
            break
    total = max(found["forward_bytes"], found["backward_bytes"]) + outside
    return {"bytes": total, **found, "outside_torch_bytes": outside}


def _inside_torch(competitor: Competitor, inputs: Inputs) -> dict[str, int]:
    results = inputs.q.numel() * inputs.q.element_size() + 12 * inputs.q.numel() // inputs.q.shape[-1]
    gradients = sum(x.numel() * x.element_size() for x in competitor.leaves)
    before = torch.cuda.memory_allocated()
    with competitor.context():
        torch.cuda.reset_peak_memory_stats()
        out = competitor.forward()
        torch.cuda.synchronize()
        forward = torch.cuda.max_memory_allocated() - before - results
        kept = torch.cuda.memory_allocated() - before - results
        torch.cuda.reset_peak_memory_stats()
        found = torch.autograd.grad(out, competitor.leaves, competitor.dout)
        torch.cuda.synchronize()
        backward = torch.cuda.max_memory_allocated() - before - results - gradients
    del found
    return {"forward_bytes": forward, "kept_for_backward_bytes": kept, "backward_bytes": backward}
