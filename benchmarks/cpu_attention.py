"""Top-k attention on the CPU against torch's dense SDPA: training (forward + backward) and decode, with bars.

    python benchmarks/cpu_attention.py                  # everything; writes results/cpu_attention.json
    python benchmarks/cpu_attention.py --quick          # S = 4,096 and decode, few rounds, writes nothing
    python benchmarks/cpu_attention.py --only decode    # cases whose name contains a word

Each case runs all competitors in one process, one after another in every round (so that a drift of the
machine meets all of them), and compares medians. Dense is the fastest of its forms. Exit status 1 when a
"must" bar is missed.
README.md in this folder says how to read the result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import topk_attn

HERE = Path(__file__).resolve().parent
BATCH, HEADS, KV_HEADS, HEAD_DIM = 1, 8, 2, 64
BUDGETS = {"1%": dict(ratio=0.01), "5%": dict(ratio=0.05), "256": dict(topk=256)}
# Time of top-k over time of dense, at most.
TRAIN_BARS = {4096: (0.70, 0.35), 16384: (0.45, 0.20)}
DECODE_BAR = (1.0, None)
DECODE_KEYS = 32768
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------
# Inputs and competitors
# ------------------------------------------------------------------------------------------------------------


def random(generator, *shape, dtype):
    return torch.randn(*shape, generator=generator).to(dtype)


def train_competitors(tokens: int, dtype: torch.dtype, seed: int) -> dict[str, Callable]:
    """name -> one forward + backward. Every competitor has its best layout before the clock starts."""
    g = torch.Generator().manual_seed(seed)
    q = random(g, BATCH, tokens, HEADS, HEAD_DIM, dtype=dtype)
    k, v = (random(g, BATCH, tokens, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    dout = random(g, BATCH, tokens, HEADS, HEAD_DIM, dtype=dtype)

    def dense(repeat: int) -> Callable:
        heads_first = [
            q.transpose(1, 2),
            *(x.transpose(1, 2).repeat_interleave(repeat, dim=1) for x in (k, v)),
        ]
        leaves = [x.contiguous().requires_grad_() for x in heads_first]
        weight = dout.transpose(1, 2).contiguous()

        def step():
            out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=repeat == 1)
            torch.autograd.grad(out, leaves, weight)

        return step

    def topk(budget: dict) -> Callable:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def step():
            out = topk_attn.topk_attn_func(*leaves, **budget)
            torch.autograd.grad(out, leaves, dout)

        return step

    competitors = {"dense, enable_gqa": dense(1), "dense, K and V repeated": dense(HEADS // KV_HEADS)}
    return {**competitors, **{f"top-k {name}": topk(budget) for name, budget in BUDGETS.items()}}


def decode_competitors(keys: int, dtype: torch.dtype, seed: int) -> dict[str, Callable]:
    """name -> attention of one new token over `keys` cached ones."""
    g = torch.Generator().manual_seed(seed)
    q = random(g, BATCH, 1, HEADS, HEAD_DIM, dtype=dtype)
    k, v = (random(g, BATCH, keys, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    lengths = torch.full((BATCH,), keys, dtype=torch.int32)
    group = HEADS // KV_HEADS
    direct = q.transpose(1, 2).contiguous()
    rows = q.reshape(BATCH, KV_HEADS, group, HEAD_DIM)
    by_token = [x.transpose(1, 2) for x in (k, v)]
    by_head = [x.contiguous() for x in by_token]

    competitors = {}
    for layout, (kk, vv) in (("token-major cache", by_token), ("head-major cache", by_head)):
        competitors[f"dense direct, {layout}"] = lambda kk=kk, vv=vv: F.scaled_dot_product_attention(
            direct, kk, vv, enable_gqa=True
        )
        competitors[f"dense group as rows, {layout}"] = lambda kk=kk, vv=vv: F.scaled_dot_product_attention(
            rows, kk, vv
        )
    for name, budget in BUDGETS.items():
        competitors[f"top-k {name}"] = lambda budget=budget: topk_attn.topk_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, **budget
        )
    return competitors


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def measure(
    competitors: dict[str, Callable], rounds: int, warm_up: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds per call: one sample a round and competitor, each the mean of `repeats` calls, interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(warm_up + rounds):
        for name, call in competitors.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds = (time.perf_counter() - start) / repeats
            if number >= warm_up:
                samples[name].append(seconds)
    return samples


def compare(samples: dict[str, list[float]], bar: tuple[float | None, float | None]) -> dict:
    medians = {name: statistics.median(x) for name, x in samples.items()}
    dense = min((name for name in medians if name.startswith("dense")), key=medians.get)
    rows = {}
    for name in medians:
        if not name.startswith("top-k"):
            continue
        ratio = medians[name] / medians[dense]
        must, aim = bar
        rows[name.removeprefix("top-k ")] = {
            "seconds": medians[name],
            "ratio": ratio,
            "must": must,
            "go_for": aim,
            "pass": None if must is None else ratio <= must,
            "reached": None if aim is None else ratio <= aim,
        }
    return {"dense": dense, "dense_seconds": medians[dense], "topk": rows, "samples_s": samples}


# Growth is the peak after the step over what is resident before it, in bytes; memory that the allocator holds
# free is handed back first, so that it cannot hide a part of the growth. VmHWM and not ru_maxrss: the latter
# begins with the size of the process that started this one.
MEMORY_SCRIPT = """
import ctypes, sys, torch
sys.path[:0] = {path!r}
import cpu_attention as c
torch.set_num_threads({threads})
c.train_competitors(64, torch.float32, 0)["top-k 256"]()
step = c.train_competitors({tokens}, getattr(torch, {dtype!r}), {seed})[{name!r}]
def status(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
step()
print(status("VmHWM") - before)
"""


def peak_memory(tokens: int, dtype: str, budget: str, seed: int) -> dict:
    """Peak resident memory that one forward + backward adds, in a process of its own.

    Allowed, linear in S*W: out, lse and gradients, twice (working copies in float32 included), 12 bytes a
    kept pair, and 64 MiB for threads and libraries.
    """
    script = MEMORY_SCRIPT.format(
        path=[str(HERE), *sys.path],
        threads=torch.get_num_threads(),
        tokens=tokens,
        dtype=dtype,
        seed=seed,
        name=f"top-k {budget}",
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    extra = int(done.stdout.split()[-1])
    width = topk_attn.budget(tokens, **BUDGETS[budget])
    # out, dq (H heads) and dk, dv (Hkv heads), in float32
    results = BATCH * tokens * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * 4
    limit = 2 * results + 12 * BATCH * HEADS * tokens * width + 64 * 2**20
    return {
        "extra_bytes": extra,
        "limit_bytes": limit,
        "kept_width": width,
        "square_bytes": BATCH * HEADS * tokens * tokens * 4,
        "pass": extra <= limit,
    }


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def environment() -> dict:
    def cpu_model() -> str:
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            return platform.processor()
        found = {n.strip(): v.strip() for n, _, v in (line.partition(":") for line in lines) if v}
        wanted = ("model name", "vendor_id", "cpu family", "model", "stepping")
        return ", ".join(f"{n} {found[n]}" for n in wanted if n in found)

    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "topk_attn": topk_attn.__version__,
        "build": topk_attn.build_info(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def print_case(name: str, case: dict) -> None:
    print(f"\n{name}: dense {case['dense_seconds'] * 1e3:.2f} ms ({case['dense']})", flush=True)
    for budget, row in case["topk"].items():
        bars = "no bar"
        if row["must"] is not None:
            bars = f"must {row['must']:.2f} {'pass' if row['pass'] else 'FAIL'}"
        if row["go_for"] is not None:
            bars += f", go for {row['go_for']:.2f} {'reached' if row['reached'] else 'missed'}"
        line = f"  W {budget:>4}  {row['seconds'] * 1e3:10.2f} ms   {row['ratio']:6.3f} x dense   {bars}"
        memory = row.get("memory")
        if memory:
            line += (
                f"   +{memory['extra_bytes'] / 2**20:.0f} MiB (limit {memory['limit_bytes'] / 2**20:.0f}, "
                f"S x S {memory['square_bytes'] / 2**20:.0f}) {'pass' if memory['pass'] else 'FAIL'}"
            )
        print(line, flush=True)


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def cases_of(quick: bool) -> dict[str, dict]:
    """name -> what to run. bfloat16 is reported without a bar."""
    found = {}
    for dtype in DTYPES:
        for tokens, bar in TRAIN_BARS.items():
            if quick and tokens > 4096:
                continue
            found[f"train {tokens} {dtype}"] = dict(
                kind="train",
                size=tokens,
                dtype=dtype,
                bar=bar if dtype == "float32" else (None, None),
                rounds=3 if quick else 9 if tokens <= 4096 else 5,
                repeats=1,
            )
        found[f"decode {DECODE_KEYS} {dtype}"] = dict(
            kind="decode",
            size=DECODE_KEYS,
            dtype=dtype,
            bar=DECODE_BAR if dtype == "float32" else (None, None),
            rounds=10 if quick else 50,
            repeats=10,
        )
    return found


def run_case(spec: dict, seed: int) -> dict:
    make = train_competitors if spec["kind"] == "train" else decode_competitors
    competitors = make(spec["size"], DTYPES[spec["dtype"]], seed)
    samples = measure(competitors, spec["rounds"], warm_up=2, repeats=spec["repeats"])
    case = compare(samples, spec["bar"])
    if spec["kind"] == "train":
        for budget, row in case["topk"].items():
            row["memory"] = peak_memory(spec["size"], spec["dtype"], budget, seed)
    return {**spec, **case}


def failed(case: dict) -> list[str]:
    bad = []
    for budget, row in case["topk"].items():
        if row["pass"] is False:
            bad.append(f"W {budget}: {row['ratio']:.3f} x dense, must be {row['must']:.2f}")
        if "memory" in row and not row["memory"]["pass"]:
            bad.append(f"W {budget}: {row['memory']['extra_bytes'] / 2**20:.0f} MiB of extra memory")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="S = 4,096 and decode with few rounds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random normal inputs (default 0)")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name contains every word")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default for a full run: results/cpu_attention.json)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    cases = {n: c for n, c in cases_of(args.quick).items() if all(w in n for w in args.only.split())}
    if not cases:
        parser.error(f"--only {args.only!r} matches none of: {', '.join(cases_of(args.quick))}")
    output = args.output
    if output is None and not args.quick and not args.only:
        output = HERE / "results" / "cpu_attention.json"

    env = environment()
    shape = f"B{BATCH} H{HEADS} Hkv{KV_HEADS} D{HEAD_DIM}, causal, random normal data, seed {args.seed}"
    print(f"{shape}\n{env['cpu']}, {env['threads']} threads, torch {env['torch']}, kernels {env['build']}")
    if env["load_average_at_start"][0] > 0.3 * os.cpu_count():
        load = env["load_average_at_start"][0]
        print(f"WARNING: load average {load:.1f}: the cores are not idle, do not quote these figures")

    results, misses = {}, []
    for name, spec in cases.items():
        results[name] = run_case(spec, args.seed)
        print_case(name, results[name])
        misses += [f"{name}, {miss}" for miss in failed(results[name])]
    env["load_average_at_end"] = os.getloadavg()
    if output is not None:
        record = {"shape": shape, "seed": args.seed, "environment": env, "cases": results, "missed": misses}
        write_atomically(output, json.dumps(record, indent=1, allow_nan=False) + "\n")
        print(f"\nwritten: {output}")
    print("\nall bars met" if not misses else "\nMISSED:\n  " + "\n  ".join(misses))
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
