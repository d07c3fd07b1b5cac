"""Does training with top-k attention pay when decoding will use it? One model, real text, three seeds.

    python benchmarks/study.py --output study             # everything; needs a GPU and a CUDA build
    python benchmarks/study.py --results results.json --plot docs/study.png    # show a finished one

SmolLM2-135M-Instruct is fine-tuned by recipes/study-smollm2-{topk,dense}.yaml from each seed, on dialogs
and on long texts of 8,192 tokens, with exact top-k attention at 1 % and with dense attention. The original
and every tuned model are then evaluated on held-out text under dense attention and under top-k attention at
several ratios (`topk-sft --evaluate`). Decoding keeps the keys that this forward pass keeps, so the
held-out loss under top-k attention is the loss of decoding with it. What is held out depends on the text
and SPLIT_SEED only and is settled before anything is trained; nothing is chosen after looking.

docs/study.md has the result. `make build` (or an installed package) and the packages of
requirements/demo.txt are needed; downloads are 93 MB, from PyPI, once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = ("dense", "topk")
KINDS = ("essays", "dialogs")
SPLIT_SEED = 42
HELD_OUT_ESSAYS, HELD_OUT_QUESTIONS = 8, 80
MODES = {
    "dense": "dense",
    "topk_0.01": "top-k 1 %",
    "topk_0.02": "2 %",
    "topk_0.05": "5 %",
    "topk_0.1": "10 %",
    "topk_1": "100 %",
}
NAMES = {"original": "original", "dense": "tuned dense", "topk": "tuned top-k 1 %"}


def prepare(options: argparse.Namespace) -> tuple[Path, dict]:
    """The model's folder, and the sizes of the token shards made in output/data."""
    from topk_attn.data.shards import read_shard
    from topk_attn.demo import corpus, download

    model = download.model(options.downloads)
    data = options.output / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    sides = corpus.split(
        corpus.read_dialogs(options.downloads),
        download.essays(options.downloads),
        HELD_OUT_QUESTIONS,
        HELD_OUT_ESSAYS,
        SPLIT_SEED,
    )
    sizes = {}
    for prefix, side in zip(("train", "eval"), sides, strict=True):
        # Most essays are shorter than a sequence: joined they fill it, as is usual for plain text. The
        # trainer splits the whole into sequences.
        texts = [{"text": "\n\n".join(side.essays.values())}]
        dialogs = [{"messages": dialog} for dialog in side.dialogs]
        shards = (
            {"train": dialogs + texts}
            if prefix == "train"
            else {"eval-essays": texts, "eval-dialogs": dialogs}
        )
        for name, records in shards.items():
            corpus.write_jsonl(data / f"{name}.jsonl", records)
            command = [sys.executable, "-m", "topk_attn.data", "prepare", str(data / f"{name}.jsonl")]
            command += ["--model", str(model), "--output", str(data), "--split", name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            shard = read_shard(data / f"{name}-00000.safetensors")
            sizes[name] = {
                "documents": len(shard),
                "tokens": len(shard.input_ids),
                "targets": int(shard.loss_mask.sum()),
            }
            print(f"{name}: {sizes[name]}", flush=True)
    return model, sizes


def topk_sft(recipe: Path, settings: dict, *flags: str) -> list[dict]:
    """Runs the trainer; what it printed goes beside its output folder. Returns the events it logged."""
    from topk_attn.demo import native

    output = Path(settings["checkpoint.output_dir"])
    last = "eval" if "--evaluate" in flags else "end"
    if (output / "train.jsonl").is_file():  # only with --continue
        events = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
        if any(event["event"] == last for event in events):
            return events
        shutil.rmtree(output)
    command = [native.program("topk-sft"), str(recipe), *flags]
    command += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    begin = time.perf_counter()
    log = output.with_name(output.name + ".log")
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=native.environment())
    if done.returncode:
        raise RuntimeError(f"{output.name}: topk-sft failed: {log.read_text()[-600:]}")
    print(f"{output.name}: {time.perf_counter() - begin:.1f} s", flush=True)
    return [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]


def study(options: argparse.Namespace) -> dict:
    model, sizes = prepare(options)
    data = options.output / "data"
    base = {
        "data.train_files": [str(data / "train-00000.safetensors")],
        "data.eval_files": [str(data / "eval-essays-00000.safetensors")],
        "model.device": options.device,
        "logging.tensorboard": False,
        "logging.progress": "plain",
    }
    if options.sequence_len:
        base["data.sequence_len"] = options.sequence_len
    recipes = {run: options.recipes / f"study-smollm2-{run}.yaml" for run in RUNS}
    names = [(run, seed) for seed in options.seeds for run in RUNS]

    def train(name: tuple[str, int]) -> list[dict]:
        run, seed = name
        folder = options.output / f"{run}-{seed}"
        settings = {**base, "model.base_model": str(model), "train.seed": seed}
        if options.max_steps:
            settings["train.max_steps"] = options.max_steps
        return topk_sft(recipes[run], {**settings, "checkpoint.output_dir": str(folder)})

    def evaluate(job: tuple[str, Path, str]) -> dict:
        name, folder, kind = job
        settings = {
            **base,
            "model.base_model": str(folder),
            "data.eval_files": [str(data / f"eval-{kind}-00000.safetensors")],
            "checkpoint.output_dir": str(options.output / f"eval-{kind}-{name}"),
        }
        [event] = [e for e in topk_sft(recipes["topk"], settings, "--evaluate") if e["event"] == "eval"]
        return event

    models = {"original": model}
    models |= {f"{run}-{seed}": options.output / f"{run}-{seed}" / "final" for run, seed in names}
    jobs = [(name, folder, kind) for name, folder in models.items() for kind in KINDS]
    with ThreadPoolExecutor(options.jobs) as pool:
        trained = list(pool.map(train, names))
        evaluated = list(pool.map(evaluate, jobs))
    losses: dict = {name: {} for name in models}
    for (name, _, kind), event in zip(jobs, evaluated, strict=True):
        losses[name][kind] = {mode: event[f"loss_{mode}"] for mode in MODES} | {"targets": event["targets"]}
    curves = {}
    for (run, seed), events in zip(names, trained, strict=True):
        steps = [event for event in events if event["event"] == "step"]
        evals = [event for event in events if event["event"] == "eval"]
        curves[f"{run}-{seed}"] = {
            "loss": [event["loss"] for event in steps],
            "tokens": sum(event["tokens"] for event in steps),
            "eval_step": [event["step"] for event in evals],
            "eval": {mode: [event[f"loss_{mode}"] for event in evals] for mode in MODES},
        }
    return {
        "model": "SmolLM2-135M-Instruct",
        "device": options.device,
        "seeds": options.seeds,
        "split_seed": SPLIT_SEED,
        "held_out": {"essays": HELD_OUT_ESSAYS, "questions": HELD_OUT_QUESTIONS},
        "data": sizes,
        "losses": losses,
        "curves": curves,
        "recipes": {run: path.read_text(encoding="utf-8") for run, path in recipes.items()},
    }


def table(result: dict, kind: str) -> str:
    """Markdown: models and seeds down, attention at evaluation across, nats per target."""
    losses = result["losses"]
    targets = losses["original"][kind]["targets"]
    lines = [f"Held-out {kind}, nats per target ({targets:,} of them):", ""]
    lines += ["| model | seed | " + " | ".join(MODES.values()) + " |", "|---|---|" + "---:|" * len(MODES)]

    def row(label: str, seed: str, values: dict) -> None:
        lines.append(f"| {label} | {seed} | " + " | ".join(f"{values[mode]:.4f}" for mode in MODES) + " |")

    row(NAMES["original"], "", losses["original"][kind])
    for run in RUNS:
        of_run = [losses[f"{run}-{seed}"][kind] for seed in result["seeds"]]
        for seed, values in zip(result["seeds"], of_run, strict=True):
            row(NAMES[run], str(seed), values)
        row(NAMES[run], "mean", {mode: sum(v[mode] for v in of_run) / len(of_run) for mode in MODES})
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Loss against the share of keys that evaluation keeps; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(KINDS), figsize=(9, 3.6), layout="constrained")
    colours = {"original": "0.35", "dense": "tab:blue", "topk": "tab:orange"}
    modes = [mode for mode in MODES if mode != "dense"]
    for axis, kind in zip(axes, KINDS, strict=True):
        for name, losses in result["losses"].items():
            run, _, seed = name.partition("-")
            first = seed in ("", str(result["seeds"][0]))
            values = [losses[kind][mode] for mode in modes]
            label = NAMES[run] if first else None
            axis.plot(range(len(modes)), values, ".-", color=colours[run], lw=1, label=label)
        axis.set_xticks(range(len(modes)), [MODES[mode].removeprefix("top-k ") for mode in modes])
        axis.set_title(f"held-out {kind}", fontsize=10)
        axis.set_xlabel("keys kept at evaluation (100 %: dense)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per target")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("study"), help="a new folder (3.5 GB)")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="keep the finished runs of an interrupted study"
    )
    parser.add_argument("--results", type=Path, help="show this finished result, compute nothing")
    parser.add_argument("--plot", type=Path, help="PNG file (default: OUTPUT/study.png)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; the results are the same")
    parser.add_argument("--downloads", type=Path, default=ROOT / "downloads")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes")
    parser.add_argument("--sequence-len", type=int, help="in place of the recipes', to try the script")
    parser.add_argument("--max-steps", type=int, help="in place of the recipes' epochs, to try the script")
    options = parser.parse_args()
    if options.results:
        result = json.loads(options.results.read_text(encoding="utf-8"))
    else:
        if options.output.exists() and not options.go_on:
            parser.error(f"--output {options.output} exists already; --continue goes on with it")
        begin = time.perf_counter()
        result = study(options)
        result["seconds"] = time.perf_counter() - begin
        text = json.dumps(result, indent=1) + "\n"
        (options.output / "results.json").write_text(text, encoding="utf-8")
    for kind in KINDS:
        print("\n" + table(result, kind))
    if options.plot or not options.results:
        plot(result, options.plot or options.output / "study.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
