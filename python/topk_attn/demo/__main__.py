"""`python -m topk_attn.demo`: the whole path on one real model, from download to report.

Fetches SmolLM2-135M-Instruct and real text, shows that all paths keep the same keys, fine-tunes natively
twice from the same weights and seed (exact top-k attention, and its dense twin), and reports the held-out
loss of the three models under dense and under top-k attention. Nothing is chosen after looking: what is
held out, the settings (recipes/demo-*.yaml) and the seeds are fixed.

On a GPU, with more steps and longer sequences:

    python -m topk_attn.demo --device cuda --steps 400 --sequence-len 8192
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from . import corpus, download, evaluate, generate, native, parity, report
from .models import load_model
from .stages import Stages, duration

RUNS = ("topk", "dense")
_RESULTS = ("data", "topk", "dense", "curves.png", "report.json", "report.md")
_MARK = "topk-attn-demo"  # a file that says: this folder is a demo's, the results in it may be replaced


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the demo starts. Sizes in tokens, documents, steps."""

    output: Path
    downloads: Path
    recipes: Path
    device: str
    steps: int
    sequence_len: int
    eval_essays: int
    eval_questions: int
    seed: int
    parity_tokens: int
    parity_layers: tuple[int, ...]
    new_tokens: int

    def expected_seconds(self) -> dict[str, float]:
        """Rough durations on two CPU cores; see Stages."""
        trained = self.steps * self.sequence_len / 1024
        held_out = (self.eval_essays * self.sequence_len + self.eval_questions * 90) / 1024
        native_eval = 2 * self.eval_essays * self.sequence_len / 1024
        run = 10 + 6.5 * trained + 1.8 * native_eval
        return {
            "Model and text from PyPI": 5,
            "Held-out split and token shards": 8,
            "The same keys on every path": 0.09 * self.parity_tokens,
            "Fine-tuning with top-k attention": run,
            "Fine-tuning its dense twin": run,
            "Held-out loss of three models": 10 + 9 * 2.5 * held_out,
            "Generations": 30,
            "Report": 2,
        }


def recipe_of(plan: Plan, run: str) -> Path:
    return plan.recipes / f"demo-{run}.yaml"


def _short(path: Path) -> Path:
    """The path relative to the current folder if it lies in it: commands are shown with it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def make_plan(options: argparse.Namespace) -> Plan:
    recipe = options.recipes / "demo-topk.yaml"
    if not recipe.is_file():
        raise FileNotFoundError(f"{recipe} does not exist: run in the source tree, or give --recipes")
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    quick = options.quick
    return Plan(
        output=_short(options.output),
        downloads=_short(options.downloads),
        recipes=_short(options.recipes),
        device=options.device,
        steps=options.steps or (2 if quick else settings["train"]["max_steps"]),
        sequence_len=options.sequence_len or (128 if quick else settings["data"]["sequence_len"]),
        eval_essays=1 if quick else 3,
        eval_questions=4 if quick else 24,
        seed=settings["train"]["seed"],
        parity_tokens=96 if quick else 512,
        parity_layers=(0, 1) if quick else (0, 14, 29),
        new_tokens=8 if quick else 40,
    )


def prepare_output(folder: Path) -> None:
    """A folder for this run. What an earlier demo wrote there is removed; anything else is left alone."""
    mark = folder / _MARK
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        raise FileExistsError(f"{folder} exists and is not an earlier demo's: give another --output")
    for name in _RESULTS:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(f"python -m topk_attn.demo replaces here: {', '.join(_RESULTS)}\n", encoding="utf-8")


def prepare_data(plan: Plan, model: Path) -> tuple[dict, corpus.Split]:
    """Text to token shards. Returns name of the shard -> its sizes, and what is held out."""
    data = plan.output / "data"
    data.mkdir()
    train, held = corpus.split(
        corpus.read_dialogs(plan.downloads),
        download.essays(plan.downloads),
        plan.eval_questions,
        plan.eval_essays,
        plan.seed,
    )
    messages = [{"messages": dialog} for dialog in train.dialogs]
    corpus.write_jsonl(data / "train.jsonl", messages + [{"text": text} for text in train.essays.values()])
    corpus.write_jsonl(data / "eval-dialogs.jsonl", [{"messages": dialog} for dialog in held.dialogs])
    corpus.write_jsonl(data / "eval-essays.jsonl", [{"text": text} for text in held.essays.values()])
    sizes = {}
    for name in ("train", "eval-dialogs", "eval-essays"):
        command = [sys.executable, "-m", "topk_attn.data", "prepare", str(data / f"{name}.jsonl")]
        command += ["--model", str(model), "--output", str(data), "--split", name]
        if name != "train":
            # Held-out documents fit one evaluation window each: the opening of an essay.
            command += ["--sequence-len", str(plan.sequence_len), "--overflow", "truncate"]
        native.run(command)
        shard = evaluate.read_shard(data / f"{name}-00000.safetensors")
        sizes[name] = {
            "documents": len(shard),
            "tokens": len(shard.input_ids),
            "loss_tokens": int(shard.loss_mask.sum()),
        }
    for name, size in sizes.items():
        print(f"  {name}: {size['documents']:,} documents, {size['tokens']:,} tokens, ", end="")
        print(f"{size['loss_tokens']:,} of them targets")
    return sizes, held


def train(plan: Plan, model: Path, run: str) -> Path:
    """One native fine-tuning; the trained model's folder."""
    data = plan.output / "data"
    shards = {
        name: str(data / f"{name}-00000.safetensors") for name in ("train", "eval-essays", "eval-dialogs")
    }
    settings = {
        "model.base_model": str(model),
        "model.device": plan.device,
        "data.train_files": [shards["train"]],
        "data.eval_files": [shards["eval-essays"]],
        "data.sequence_len": plan.sequence_len,
        "train.max_steps": plan.steps,
        "train.eval_steps": plan.steps,  # before the first step and after the last
        "checkpoint.output_dir": str(plan.output / run),
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    native.run([native.program("topk-sft"), str(recipe_of(plan, run)), *overrides])
    trained = plan.output / run / "final"
    if not trained.is_dir():
        raise RuntimeError(f"topk-sft was stopped before the end of the run: {trained} is not there")
    return trained


def measure(plan: Plan, models: dict[str, Path], dtype) -> dict:
    """Held-out loss: model -> mode -> {"essays": nats, "dialogs": nats}."""
    from tqdm import tqdm

    rows = {
        kind: evaluate.rows_of(plan.output / "data" / f"eval-{kind}-00000.safetensors", plan.sequence_len)
        for kind in ("essays", "dialogs")
    }
    total = len(models) * len(evaluate.MODES) * sum(len(r) for r in rows.values())
    losses: dict = {}
    with tqdm(total=total, desc="  evaluating", unit=" rows", disable=not sys.stderr.isatty()) as bar:
        for name, folder in models.items():
            model = load_model(folder, dtype).to(plan.device)
            losses[name] = {}
            for mode in evaluate.MODES:
                evaluate.set_mode(model, mode)
                nats = {kind: evaluate.loss(model, of_kind, bar.update) for kind, of_kind in rows.items()}
                losses[name][mode.name] = nats
                found = ", ".join(f"{kind} {value:.4f}" for kind, value in nats.items())
                bar.write(f"  {name + ' model, ' + mode.label + ':':28s} {found}", file=sys.stdout)
    return losses


def curves(plan: Plan) -> dict:
    """Training and held-out loss of each run, step by step, from the trainer's train.jsonl."""
    result = {}
    for run in RUNS:
        records = report.read_log(plan.output / run / "train.jsonl")
        steps = [r for r in records if r["event"] == "step"]
        evals = [r for r in records if r["event"] == "eval"]
        result[run] = {
            "step": [r["step"] for r in steps],
            "loss": [r["loss"] for r in steps],
            "eval_step": [r["step"] for r in evals],
            "eval_loss": [r[f"loss_{run}"] for r in evals],
        }
    return result


def agreement(losses: dict, trained: dict) -> list[dict]:
    """Held-out essays as the native trainer measured them before and after each run, beside transformers'
    figures.
    """
    modes = {"dense": evaluate.MODES[0].name, "topk": evaluate.MODES[1].name}
    pairs = []
    for run_name, mode in modes.items():
        native_losses = trained[run_name]["eval_loss"]
        for model, loss in (("original", native_losses[0]), (run_name, native_losses[-1])):
            pairs.append(
                {"model": model, "mode": mode, "native": loss, "transformers": losses[model][mode]["essays"]}
            )
    return pairs


def show_losses(losses: dict) -> None:
    for kind in ("essays", "dialogs"):
        print(f"  held-out {kind}, nats per target token:")
        for line in report.loss_table(losses, kind):
            if not line.startswith("|---"):
                cells = [cell.strip() for cell in line.strip("|").split("|")]
                print("    " + f"{cells[0]:20s}" + "".join(f"{cell:>12s}" for cell in cells[1:]))


def run(plan: Plan) -> dict:
    import torch

    dtype = torch.float32 if plan.device == "cpu" else torch.bfloat16
    stages = Stages(plan.expected_seconds())
    names = iter(stages.expected)
    result: dict = {}
    with stages.stage(next(names)):
        original = download.model(plan.downloads)
        text = "\n".join(download.essays(plan.downloads).values())
        download.dialogs(plan.downloads)
    prepare_output(plan.output)
    with stages.stage(next(names)):
        result["data"], held = prepare_data(plan, original)
    with stages.stage(next(names)):
        budgets = [mode.budget for mode in evaluate.MODES if mode.budget]
        counts = parity.run(original, text, plan.parity_tokens, list(plan.parity_layers), budgets)
        result["parity"] = {name: count.as_dict() for name, count in counts.items()}
    models = {"original": original}
    for run_name in RUNS:
        with stages.stage(next(names)):
            models[run_name] = train(plan, original, run_name)
    models = {name: models[name] for name in ("original", "dense", "topk")}
    with stages.stage(next(names)):
        result["losses"] = measure(plan, models, dtype)
        show_losses(result["losses"])
    with stages.stage(next(names)):
        name = str(dtype).removeprefix("torch.")
        result["generations"] = generate.run(
            plan.output, models, held.essays, plan.new_tokens, plan.device, name
        )
    with stages.stage(next(names)):
        result["curves"] = curves(plan)
        result["agreement"] = agreement(result["losses"], result["curves"])
        result["settings"] = {
            **{key: value if isinstance(value, int) else str(value) for key, value in asdict(plan).items()},
            "model": download.MODEL_NAME,
            "dtype": str(dtype).removeprefix("torch."),
            "modes": {mode.name: mode.budget for mode in evaluate.MODES},
            "recipes": {run_name: recipe_of(plan, run_name).read_text(encoding="utf-8") for run_name in RUNS},
        }
        report.draw(plan.output / "curves.png", result)
    result["seconds"] = {**stages.seconds, "total": stages.gone}
    (plan.output / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report.write_markdown(plan.output / "report.md", result)
    print(f"\nDone in {duration(stages.gone)}: {plan.output / 'report.md'}, with report.json and curves.png")
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m topk_attn.demo",
        description=__doc__.split("\n", 1)[1].strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root, downloads = download.home(), download.default_folder()
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: the recipe's)")
    parser.add_argument("--sequence-len", type=int, help="tokens in a sequence (default: the recipe's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything, shows nothing")
    parser.add_argument("--output", type=Path, default=root / "demo_output", help="default: %(default)s")
    parser.add_argument("--downloads", type=Path, default=downloads, help="default: %(default)s")
    parser.add_argument("--recipes", type=Path, default=root / "recipes", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name in ("steps", "sequence_len"):
        value = getattr(options, name)
        if value is not None and value < 2:
            parser.error(f"--{name.replace('_', '-')} must be at least 2, got {value}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        result = run(make_plan(options))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    different = [name for name, count in result["parity"].items() if any(count["rows_different"].values())]
    different += [name for name, count in result["parity"].items() if count["cpp_bytes_different"]]
    if different:
        print(
            f"demo: error: not the same keys or bits on every path: {', '.join(different)}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
