"""Exact top-k attention on one GPU against dense attention and against what PyTorch offers for it, with bars.

    python benchmarks/attention.py --real FILE --out attention.json   # everything, about 6 minutes
    python benchmarks/attention.py --quick                            # S = 32,768 and workspace, under 100 s
    python benchmarks/attention.py --sizes 16k 33000 --seed 7         # other sizes, other data
    python benchmarks/attention.py --rows "real-like 1% backward"     # rows whose name has all of these words

bfloat16, causal, one process, one card: H 32, Hkv 8, D 128, batch 1 unless the case says otherwise. In every
round all competitors of a case run once, each after a flush of the L2 cache; the figure is the median over
the rounds. The forward includes the selection. Before anything is timed, each competitor's output and dQ are
checked against float64 on sampled rows.

Exit status: 0; 1 when a "must" bar is missed; 2 when a row failed or one with a bar did not run. README.md
in this folder says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent / "python"))

from gpu import bars, report  # noqa: E402
from gpu.bars import Budgets  # noqa: E402
from gpu.data import Shape  # noqa: E402
from gpu.report import Row  # noqa: E402
from gpu.runner import Runner  # noqa: E402

WORKSPACE_TOKENS = 131072


def parse() -> argparse.Namespace:
    def size(text: str) -> int:
        return int(text[:-1]) * 1024 if text.endswith("k") else int(text)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="S = 32k, few rounds, no eager, one real layer")
    parser.add_argument(
        "--sizes", type=size, nargs="+", help="sequence lengths (default 8k 16k 32k 64k 128k)"
    )
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="WORDS",
        help="rows whose name has all words; repeatable",
    )
    parser.add_argument("--real", type=Path, metavar="FILE", help="what gpu/capture_smollm2.py wrote")
    parser.add_argument("--small", type=float, default=0.01, help="the ratio of the 1 %% rows")
    parser.add_argument("--large", type=float, default=0.05, help="the ratio of the 5 %% rows")
    parser.add_argument("--topk", type=int, default=2048, help="W of the W = 2,048 rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workspace", type=size, default=WORKSPACE_TOKENS, help="tokens of the workspace rows"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="start no case after this time; its rows say so (default with --quick: 75)",
    )
    parser.add_argument(
        "--device", default="cuda", help="cpu tries the program on tiny sizes; no bar counts there"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with every raw sample")
    args = parser.parse_args()
    default = [32768] if args.quick else [8192, 16384, 32768, 65536, 131072]
    if args.quick and args.seconds is None:
        args.seconds = 75.0
    args.sizes = args.sizes or (default if args.device != "cpu" else [256, 512])
    return args


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    began = time.perf_counter()
    budgets = Budgets.of(args.small, args.large, args.topk if device.type == "cuda" else min(args.topk, 32))
    shape = Shape() if device.type == "cuda" else Shape(heads=4, kv_heads=2, head_dim=64)
    env = report.environment(device)
    card = env.get("card", {}).get("name", env["device"])
    versions = f"torch {env['torch']}, cuDNN {env.get('cudnn')}, csrc {env['csrc_hash'][:12]}"
    print(f"{card}, {versions}, seed {args.seed}")
    runner = Runner(device, budgets, args.seed, 2.0 if args.quick else 8.0, 5 if args.quick else 15)

    rows: list[Row] = []
    stored: list[dict] = []

    def wanted(row: Row) -> bool:
        words = row.name.replace("|", " ").replace("/", " ").split()
        return not args.rows or any(all(w in words for w in pattern.split()) for pattern in args.rows)

    def choose(found: list[Row]) -> list[Row]:
        chosen = [row for row in found if wanted(row)]
        if device.type != "cuda":
            for row in chosen:
                row.must = row.go_for = None
        return chosen

    def save(finished: bool) -> None:
        if args.out is not None:
            options = {name: value for name, value in vars(args).items() if name != "out"}
            record = {"options": options, "environment": env, "finished": finished}
            record |= {"rows": [row.record() for row in rows], "cases": stored}
            report.write_atomically(args.out, record)

    def late() -> bool:
        return args.seconds is not None and time.perf_counter() - began > args.seconds

    cases = bars.timed_cases(args, shape, device)
    if args.real:
        try:
            cases = bars.real_cases(args, device) + cases
        except Exception as error:
            lost = Row("real", "capture", str(args.real), "both")
            lost.leave("failed", f"{type(error).__name__}: {error}")
            rows.append(lost)
            print(f"real: {lost.message}")
    for case in cases:
        chosen = choose(bars.rows_of(case, budgets))
        if not chosen:
            continue
        rows += chosen
        if late():
            for row in chosen:
                row.leave("not run", f"{args.seconds:g} s were over")
        else:
            stored.append(runner.run(case, chosen))
            runner.tidy()
        save(False)

    for case in bars.workspace_cases(args, shape, device):
        chosen = choose(bars.workspace_rows(case, shape, budgets, args.quick))
        if device.type != "cuda" or late():
            reason = "CUDA only" if device.type != "cuda" else f"{args.seconds:g} s were over"
            for row in chosen:
                row.leave("not run", reason)
        elif chosen:
            stored.append(runner.workspace(case, chosen))
        rows += chosen
        save(False)

    sums = bars.sums_over_layers(rows)
    if sums:
        print("\nreal, all layers")
    for row in sums:
        print(report.row_line(row))
    rows += sums
    save(True)
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
