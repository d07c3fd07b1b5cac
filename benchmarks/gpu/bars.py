"""The cases and rows of the attention benchmark, and the bars they are held to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import data, measure, real
from .data import Budget, Inputs, Shape
from .report import Row

CUDNN, FLASH = "dense cuDNN", "dense flash"
FLEX_TOKENS = 33_000  # score slabs and FlexAttention up to here: 8 to 10 times dense
ONES_TOKENS = 33_000  # ratio = 1 up to here
EAGER_TOKENS = 4096


@dataclass(frozen=True)
class Budgets:
    small: Budget  # 1 %
    large: Budget  # 5 %
    fixed: Budget  # W = 2,048

    @staticmethod
    def of(small: float, large: float, fixed: int) -> Budgets:
        ratios = (Budget(f"{100 * r:g}%", {"ratio": r}) for r in (small, large))
        return Budgets(*ratios, Budget(f"W={fixed}", {"topk": fixed}))


@dataclass
class Case:
    name: str
    kind: str  # random, real-like, real, stretched, eager
    tokens: int
    make: Callable[[], Inputs]


# ------------------------------------------------------------------------------------------------------------
# Rows and bars
# ------------------------------------------------------------------------------------------------------------


def rows_of(case: Case, budgets: Budgets) -> list[Row]:
    small, large, fixed = (f"top-k {b.label}" for b in (budgets.small, budgets.large, budgets.fixed))
    rows: list[Row] = []

    def against(
        subject: str, peer: str, must: dict | None = None, go_for: dict | None = None, parts=measure.PARTS
    ):
        for part in parts:
            rows.append(Row(case.name, subject, peer, part, (must or {}).get(part), (go_for or {}).get(part)))

    def bars(smallest: int, forward: float | None, backward: float | None, both: float) -> dict:
        values = {"forward": forward, "backward": backward, "both": both}
        return values if case.tokens >= smallest else {}

    if case.kind == "eager":
        against(small, f"eager {budgets.small.label}")
        against(f"eager {budgets.small.label}", CUDNN)
        return rows
    if case.kind in ("real", "stretched"):
        bar = case.kind == "real"
        against(small, CUDNN, {"both": 0.9} if bar else {}, {"both": 0.5} if bar else {})
        against(large, CUDNN)
        return rows

    random = case.kind == "random"
    if random:
        against(small, CUDNN, bars(16_000, 2.0, 1.35, 1.5), bars(16_000, 1.6, 1.05, 1.2))
        against(fixed, CUDNN, bars(32_000, None, None, 1.65), bars(32_000, None, None, 1.25))
    else:
        against(small, CUDNN, bars(32_000, 0.95, 0.30, 0.50), bars(32_000, 0.65, 0.18, 0.30))
        against(large, CUDNN, bars(32_000, None, None, 0.9), bars(32_000, None, None, 0.6))
    against(f"{small} deterministic", small, {"backward": 1.3}, {"backward": 1.1}, parts=("backward",))
    portable = {"both": 1.5 if random else 0.8}, {"both": 1.2 if random else 0.4}
    against(f"{small} portable", FLASH, *portable, parts=("both",))
    if case.tokens <= FLEX_TOKENS:
        wanted = [budgets.small, budgets.fixed] if random else [budgets.small]
        for budget in wanted:
            barred = case.tokens >= 32_000 and budget is budgets.small
            row = Row(case.name, f"top-k {budget.label}", f"slab+flex {budget.label}", "both", faster=True)
            if barred:
                row.must, row.go_for = (5.5, 7.0) if random else (16.0, 28.0)
            rows.append(row)
            against(f"slab+flex {budget.label}", CUDNN, parts=("both",))
    if random and case.tokens <= ONES_TOKENS:
        against("top-k ratio=1", "top-k dense path", {"both": 1.05}, parts=("both",))
        against("top-k ratio=1", CUDNN)
    return rows


def workspace_rows(case: Case, shape: Shape, budgets: Budgets, quick: bool) -> list[Row]:
    """Must: dQ in float32 and 256 MiB."""
    must = case.tokens * shape.heads * shape.head_dim * 4 / 2**20 + 256
    variants = ("", " portable") if quick else ("", " deterministic", " portable")
    names = [f"top-k {budgets.small.label}{variant}" for variant in variants]
    return [Row(case.name, name, "workspace", "both", must, 320.0, unit="MiB") for name in names]


def sums_over_layers(rows: list[Row]) -> list[Row]:
    """The real cases with all layers added up, as a model runs them."""
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.case.startswith("real layer"):
            label = row.case.split(" ", 3)[3]
            grouped.setdefault((label, row.subject, row.peer, row.part), []).append(row)
    sums = []
    for (label, subject, peer, part), parts in grouped.items():
        if len(parts) < 2:
            continue
        total = Row(f"real all layers {label}", subject, peer, part, parts[0].must, parts[0].go_for)
        bad = [row for row in parts if row.state != "ok"]
        if bad:
            total.leave(bad[0].state, bad[0].message)
        else:
            total.settle(sum(r.subject_value for r in parts), sum(r.peer_value for r in parts))
        sums.append(total)
    return sums


# ------------------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------------------


MAKERS = {"real-like": data.real_like, "random": data.random, "eager": data.random}


def generated(kind: str, tokens: int, seed: int, shape: Shape, device: torch.device) -> Case:
    """A case of generated data; every kind and length has a seed of its own."""

    def make() -> Inputs:
        salt = list(MAKERS).index(kind) * 997 + tokens
        generator = torch.Generator(device=device).manual_seed(seed * 1_000_003 + salt)
        return MAKERS[kind](tokens, shape, generator)

    return Case(f"{kind} S={tokens}", kind, tokens, make)


def timed_cases(args: argparse.Namespace, shape: Shape, device: torch.device) -> list[Case]:
    wanted = [(kind, tokens) for tokens in args.sizes for kind in ("real-like", "random")]
    if not args.quick:
        wanted.append(("eager", min(EAGER_TOKENS, max(args.sizes))))
    return [generated(kind, tokens, args.seed, shape, device) for kind, tokens in wanted]


def workspace_cases(args: argparse.Namespace, shape: Shape, device: torch.device) -> list[Case]:
    kinds = ("real-like",) if args.quick else ("real-like", "random")
    return [generated(kind, args.workspace, args.seed, shape, device) for kind in kinds]


def real_cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """A case for each captured layer: the documents as they are, then stretched."""
    prefix = real.Prefix(args.real, device)
    documents = prefix.tokens if device.type == "cuda" else prefix.tokens[:2, :256]
    print(f"real: {prefix.note}; layers {prefix.layers}")
    cases = []
    for stretch in (1, 4) if device.type == "cuda" else (1, 2):
        captured = prefix.capture(stretch, documents)
        for layer in prefix.layers if not args.quick else prefix.layers[1:2]:
            q, k, v = captured[layer]
            label = f"{q.shape[0]}x{q.shape[1]}"
            kind = "real" if stretch == 1 else "stretched"
            name = f"real layer {layer} {label}" + (" stretched" if stretch > 1 else "")

            def make(q=q, k=k, v=v, layer=layer) -> Inputs:
                generator = torch.Generator(device=device).manual_seed(args.seed + layer)
                dout = torch.randn(q.shape, generator=generator, device=device).bfloat16()
                return Inputs(q, k, v, dout)

            cases.append(Case(name, kind, q.shape[1], make))
        if args.quick:
            break
    return cases
