"""Exact top-k decoding on one GPU against dense attention over the same cache, with bars.

    python benchmarks/decode.py --out decode.json        # everything, about 2 minutes
    python benchmarks/decode.py --quick                  # few rounds, random keys
    python benchmarks/decode.py --rows "B8 W=2048"       # rows whose name has all of these words

One new token a sequence, bfloat16, H 32, Hkv 8, D 128, one process, one card. In every round all competitors
of a case run once, each after a flush of the L2 cache; the figure is the median over the rounds. "fastest
dense" is the best of cuDNN's and flash SDPA, called directly and with q viewed as (B, Hkv, group, D), each on
the cache as it lies and on a copy with heads first. Before anything is timed, outputs are checked against
float64 on sampled heads.

"certified" rows are the same call with key codes, an int8 copy of K, over the same cache; how many of its
query rows the certificate served, and how many keys it looked at exactly, is printed and stored.

Keys: random normal, and "real-like": an eighth of the channels 8 times larger, and an offset a channel.

Exit status: 0; 1 when a "must" bar is missed; 2 when a row failed or one with a bar did not run.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent / "python"))

from gpu import measure, report  # noqa: E402
from gpu.report import Row  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PAGE = 64
DENSE = "fastest dense"
TOLERANCE = 0.02  # of out, relative to float64 (Frobenius)
EAGER_TOLERANCE = 0.5  # its scores are rounded to bfloat16 before they are compared: not exact


@dataclass(frozen=True)
class Budget:
    label: str
    arguments: dict

    def width(self, n: int) -> int:
        if "topk" in self.arguments:
            return min(self.arguments["topk"], n)
        return max(1, math.ceil(self.arguments["ratio"] * n - 1e-6))


ONE_PERCENT = Budget("1%", {"ratio": 0.01})
FIXED = Budget("W=2048", {"topk": 2048})
ALL_BUDGETS = (ONE_PERCENT, FIXED)


@dataclass(frozen=True)
class Case:
    batch: int
    keys: int
    kind: str  # random, real-like
    bars: dict = field(default_factory=dict)  # budget label -> (must, go for)
    certified: dict = field(default_factory=dict)  # likewise, of the certified scan
    graph: bool = False

    @property
    def name(self) -> str:
        return f"B{self.batch} n={self.keys} {self.kind}{' graph' if self.graph else ''}"


def cases(quick: bool) -> list[Case]:
    found = []
    for kind in ("random",) if quick else ("random", "real-like"):
        found += [
            Case(
                8,
                131072,
                kind,
                {"1%": (0.65, 0.56), "W=2048": (0.65, 0.56)},
                {"1%": (0.42, 0.34), "W=2048": (0.45, 0.37)},
            ),
            Case(1, 131072, kind, {"1%": (0.80, 0.58), "W=2048": (0.80, 0.58)}, {"1%": (0.60, 0.42)}),
            Case(32, 32768, kind, {"1%": (0.80, 0.60), "W=2048": (0.80, 0.68)}, {"1%": (0.60, 0.42)}),
            Case(1, 4096, kind, {"1%": (1.2, 1.0), "W=2048": (1.2, 1.0)}, graph=True),
            Case(1, 1024, kind, {"1%": (1.2, 1.0)}, graph=True),
        ]
        found.append(Case(1, 1048576, kind, certified={"1%": (0.42, 0.34)}))
        if not quick:
            found.append(Case(1, 32768, kind))
    return found


# ------------------------------------------------------------------------------------------------------------
# Competitors
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    q: Tensor  # (B, 1, H, D)
    k: Tensor  # (B, n, Hkv, D)
    v: Tensor
    lengths: Tensor  # int32 (B)


def make_inputs(case: Case, seed: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + case.batch * 7 + case.keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    q = normal(case.batch, 1, HEADS, HEAD_DIM)
    k, v = (normal(case.batch, case.keys, KV_HEADS, HEAD_DIM) for _ in "kv")
    if case.kind == "real-like":
        k[..., : HEAD_DIM // 8] *= 8
        k += normal(KV_HEADS, HEAD_DIM)
    lengths = torch.full((case.batch,), case.keys, dtype=torch.int32, device=device)
    return Inputs(q, k, v, lengths)


@dataclass
class Competitor:
    name: str
    run: Callable[[], Tensor]  # (B, H, D) in any view of it
    budget: Budget | None = None  # None: dense
    tolerance: float = TOLERANCE
    stats: Callable[[], tuple] | None = None  # topk_attn.cuda.CertifiedStats so far


def dense_forms(inputs: Inputs) -> list[Competitor]:
    b, h, d = inputs.q.shape[0], HEADS, HEAD_DIM
    direct = inputs.q.transpose(1, 2)
    grouped = inputs.q.view(b, KV_HEADS, h // KV_HEADS, d)
    found = []
    views = [x.transpose(1, 2) for x in (inputs.k, inputs.v)]
    copies = [x.contiguous() for x in views]
    for layout, (k, v) in (("as it lies", views), ("heads first", copies)):
        for name, backend in (
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
        ):
            for form, q in (("direct", direct), ("group view", grouped)):

                def run(q=q, k=k, v=v, backend=backend, gqa=form == "direct"):
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

                found.append(Competitor(f"dense {name} {form}, {layout}", run))
    return found


def eager(inputs: Inputs, budget: Budget) -> Competitor:
    """Scores by one batched product, torch.topk, a gather of V."""
    b, n = inputs.k.shape[:2]
    group = HEADS // KV_HEADS
    q = inputs.q.view(b, KV_HEADS, group, HEAD_DIM)
    width = budget.width(n)
    v = inputs.v.permute(0, 2, 1, 3)
    at = torch.arange(b, device=q.device)[:, None, None, None]
    head = torch.arange(KV_HEADS, device=q.device)[None, :, None, None]

    def run() -> Tensor:
        scores = q @ inputs.k.permute(0, 2, 3, 1)
        best = scores.float().topk(width, dim=-1)
        p = (best.values * HEAD_DIM**-0.5).softmax(-1).to(v.dtype)
        rows = v[at, head, best.indices]  # (B, Hkv, g, W, D)
        return (p[..., None, :] @ rows)[..., 0, :]

    return Competitor(f"eager {budget.label}", run, budget, EAGER_TOLERANCE)


def topk(inputs: Inputs, budget: Budget) -> Competitor:
    import topk_attn

    def run() -> Tensor:
        return topk_attn.topk_attn_with_kvcache(
            inputs.q, inputs.k, inputs.v, cache_seqlens=inputs.lengths, **budget.arguments
        )

    return Competitor(f"top-k {budget.label}", run, budget)


class Declined(Exception):
    """The library's plan does not take this competitor."""


def certified(inputs: Inputs, budget: Budget) -> Competitor:
    """The same call with key codes, where the library's plan takes them."""
    import topk_attn

    codes = topk_attn.cuda.new_key_codes(inputs.k)
    topk_attn.cuda.rebuild_key_codes(codes, inputs.k, inputs.lengths)
    plan = topk_attn.cuda.decode_plan(inputs.q, inputs.k, inputs.v, key_codes=codes, **budget.arguments)
    if plan.scan != "certified":
        raise Declined(f"the exact scan serves: {plan.reason}")

    def run() -> Tensor:
        return topk_attn.topk_attn_with_kvcache(
            inputs.q,
            inputs.k,
            inputs.v,
            cache_seqlens=inputs.lengths,
            key_codes=codes,
            **budget.arguments,
        )

    return Competitor(
        f"certified {budget.label}", run, budget, stats=lambda: topk_attn.cuda.certified_stats(codes)
    )


def paged(inputs: Inputs, budget: Budget, seed: int) -> Competitor:
    """The same rows in shuffled pages."""
    import topk_attn

    b, n = inputs.k.shape[:2]
    pages = b * n // PAGE
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).to(inputs.k.device)
    k, v = (x.view(pages, PAGE, KV_HEADS, HEAD_DIM)[order] for x in (inputs.k, inputs.v))
    table = torch.empty_like(order)
    table[order] = torch.arange(pages, device=order.device)
    table = table.to(torch.int32).view(b, n // PAGE)

    def run() -> Tensor:
        return topk_attn.topk_attn_with_kvcache(
            inputs.q, k, v, cache_seqlens=inputs.lengths, block_table=table, **budget.arguments
        )

    return Competitor(f"top-k {budget.label} pages", run, budget)


def as_graph(competitor: Competitor) -> Competitor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        competitor.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = competitor.run()

    def replay(inputs=competitor.run) -> Tensor:  # which the graph reads: they must stay
        graph.replay()
        return out

    return replace(competitor, run=replay)


@torch.no_grad()
def check(competitor: Competitor, inputs: Inputs, seed: int) -> float:
    """Largest relative error of sampled heads against float64; raises above its tolerance. With a budget the
    reference keeps the keys of the W greatest float64 scores: one that falls the other way by rounding has
    the weight of the last."""
    picks = torch.Generator().manual_seed(seed)
    b, n = inputs.k.shape[:2]
    out = competitor.run().reshape(b, HEADS, HEAD_DIM)
    worst = 0.0
    for head in torch.randperm(HEADS, generator=picks)[:4].tolist():
        sequence = int(torch.randint(b, (), generator=picks))
        kv = head // (HEADS // KV_HEADS)
        scores = inputs.k[sequence, :, kv].double() @ inputs.q[sequence, 0, head].double()
        if competitor.budget is not None:
            best = scores.topk(competitor.budget.width(n)).values[-1]
            scores = scores.masked_fill(scores < best, -math.inf)
        want = (scores * HEAD_DIM**-0.5).softmax(0) @ inputs.v[sequence, :, kv].double()
        error = float((out[sequence, head].double() - want).norm() / want.norm())
        if not error <= competitor.tolerance:  # NaN fails too
            raise RuntimeError(f"wrong result: out of head {head} is off by {error:.3g} of its size")
        worst = max(worst, error)
    return worst


# ------------------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------------------


def rows_of(case: Case) -> list[Row]:
    rows = []
    for budget in ALL_BUDGETS:
        if budget is FIXED and case.keys < 2 * FIXED.width(case.keys):
            continue
        must, go_for = case.bars.get(budget.label, (None, None))
        rows.append(Row(case.name, f"top-k {budget.label}", DENSE, "decode", must, go_for))
        if not case.graph:
            must, go_for = case.certified.get(budget.label, (None, None))
            rows.append(Row(case.name, f"certified {budget.label}", DENSE, "decode", must, go_for))
        if not case.graph:
            rows.append(Row(case.name, f"top-k {budget.label} pages", DENSE, "decode"))
            rows.append(Row(case.name, f"eager {budget.label}", DENSE, "decode"))
    return rows


class Runner:
    def __init__(self, device: torch.device, seed: int, rounds: int) -> None:
        self.device, self.seed, self.rounds = device, seed, rounds
        self.clock = measure.Clock(device)

    def run(self, case: Case, rows: list[Row]) -> dict:
        print(f"\n{case.name}", flush=True)
        running: dict[str, Competitor] = {}
        failures: dict[str, str] = {}
        declined: dict[str, str] = {}
        checks: dict[str, float] = {}
        try:
            inputs = make_inputs(case, self.seed, self.device)
        except Exception as error:
            for row in rows:
                row.leave("failed", f"inputs: {type(error).__name__}: {error}")
            return {"case": case.name, "failures": {"inputs": str(error)}}
        makers: list[tuple[str, Callable[[], list[Competitor]]]] = [("dense", lambda: dense_forms(inputs))]
        for row in rows:
            budget = next(b for b in ALL_BUDGETS if b.label in row.subject.split())
            maker = {"eager": eager, "certified": certified}.get(row.subject.split()[0], topk)
            if row.subject.endswith("pages"):
                makers.append((row.subject, lambda budget=budget: [paged(inputs, budget, self.seed)]))
            else:
                makers.append((row.subject, lambda budget=budget, maker=maker: [maker(inputs, budget)]))
        for name, make in makers:
            try:
                for competitor in make():
                    try:
                        checks[competitor.name] = check(competitor, inputs, self.seed)
                        running[competitor.name] = as_graph(competitor) if case.graph else competitor
                    except Exception as error:
                        failures[competitor.name] = f"{type(error).__name__}: {error}"
            except Declined as reason:
                declined[name] = str(reason)
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"
            self.tidy()
        samples = self._sample(running, failures)
        stats = {name: x.stats()._asdict() for name, x in running.items() if x.stats is not None}
        medians = {name: statistics.median(x) for name, x in samples.items()}
        dense = {name: x for name, x in medians.items() if name.startswith("dense")}
        for row in rows:
            if row.subject in declined:
                row.leave("not run", declined[row.subject])
            elif row.subject in failures:
                row.leave("failed", failures[row.subject])
            elif not dense:
                row.leave("failed", f"no dense form runs: {failures}")
            elif row.subject in medians:
                row.settle(medians[row.subject], min(dense.values()))
            print(report.row_line(row), flush=True)
        for name, x in stats.items():
            looked = x["survivors"] / max(1, x["kept"])
            print(f"  {name}: {x['certified']} of {x['rows']} rows certified, survivors {looked:.3f} W")
        if dense:
            best = min(dense, key=dense.get)
            moved = 2 * inputs.k.numel() * 2 / (dense[best] * 1e-3) / 1e9
            print(f"  {DENSE}: {best}, {dense[best]:.4f} ms, {moved:.0f} GB/s of K and V")
        return {
            "case": case.name,
            "samples_ms": samples,
            "medians_ms": medians,
            "relative_error": checks,
            "certified": stats,
            "failures": failures,
            "card_after": report.card_state() if self.device.type == "cuda" else {},
        }

    def _sample(self, running: dict[str, Competitor], failures: dict[str, str]) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {name: [] for name in running}
        for number in range(self.rounds + 1):  # the first one is not counted
            for name in [n for n in running if n not in failures]:
                try:
                    time_ms = self.clock.call(running[name].run)
                    if number:
                        samples[name].append(time_ms)
                except Exception as error:
                    failures[name] = f"{type(error).__name__}: {error}"
        return {name: found for name, found in samples.items() if name not in failures}

    def tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="random keys, 7 rounds")
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="WORDS",
        help="rows whose name has all words; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="default 21, with --quick 7")
    parser.add_argument("--seconds", type=float, help="start no case after this time; its rows say so")
    parser.add_argument(
        "--device", default="cuda", help="cpu tries the program on tiny sizes; no bar counts there"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with every raw sample")
    return parser.parse_args()


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    began = time.perf_counter()
    env = report.environment(device)
    card = env.get("card", {}).get("name", env["device"])
    print(f"{card}, torch {env['torch']}, cuDNN {env.get('cudnn')}, csrc {env['csrc_hash'][:12]}")
    runner = Runner(device, args.seed, args.rounds or (7 if args.quick else 21))
    rows: list[Row] = []
    stored: list[dict] = []
    wanted_cases = cases(args.quick)
    if device.type != "cuda":
        wanted_cases = [Case(2, 1024, "random"), Case(1, 512, "real-like")]
    for case in wanted_cases:
        chosen = [
            row
            for row in rows_of(case)
            if not args.rows
            or any(
                all(w in row.name.replace("|", " ").replace("/", " ").split() for w in words.split())
                for words in args.rows
            )
        ]
        rows += chosen
        if not chosen:
            continue
        if args.seconds is not None and time.perf_counter() - began > args.seconds:
            for row in chosen:
                row.leave("not run", f"{args.seconds:g} s were over")
        else:
            stored.append(runner.run(case, chosen))
            runner.tidy()
        if args.out is not None:
            options = {name: value for name, value in vars(args).items() if name != "out"}
            record = {"options": options, "environment": env, "finished": case is wanted_cases[-1]}
            record |= {"rows": [row.record() for row in rows], "cases": stored}
            report.write_atomically(args.out, record)
    return summary(rows, time.perf_counter() - began)


def summary(rows: list[Row], seconds: float) -> int:
    failed = [row for row in rows if row.state == "failed"]
    missed = [row for row in rows if row.met is False]
    barred = [row for row in rows if row.must is not None]
    left = [row for row in barred if row.state == "not run"]
    met = sum(row.met is True for row in barred)
    print(f"\n{len(rows)} rows in {seconds:.0f} s; must: {met} of {len(barred)} met", end="")
    print(f"; go for: {sum(row.reached is True for row in rows)} reached")
    for title, some in (("FAILED", failed), ("MISSED", missed), ("not run, with a bar", left)):
        if some:
            print(f"{title}:")
        for row in some:
            print(f"  {row.name}: {row.message if row.value is None else f'{row.value:.4g}'}")
    return 2 if failed or left else 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
