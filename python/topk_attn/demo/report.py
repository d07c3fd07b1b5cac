"""What the demo leaves behind: report.json, report.md and the curves as a PNG."""

from __future__ import annotations

import json
from pathlib import Path

from .evaluate import MODES
from .parity import PATHS

_MODELS = {"original": "original", "dense": "fine-tuned dense", "topk": "fine-tuned top-k"}


def read_log(path: Path) -> list[dict]:
    """The records of a train.jsonl, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def loss_table(losses: dict, kind: str) -> list[str]:
    """Markdown lines of one kind of held-out text: models down, attention across."""
    lines = [
        "| model | " + " | ".join(mode.label for mode in MODES) + " |",
        "|---|" + "---:|" * len(MODES),
    ]
    for model, label in _MODELS.items():
        values = (f"{losses[model][mode.name][kind]:.4f}" for mode in MODES)
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    return lines


def parity_table(parity: dict) -> list[str]:
    lines = ["| queries and keys | rows a path | " + " | ".join(PATHS) + " | C++ and Python |"]
    lines.append("|---|---:|" + "---:|" * len(PATHS) + "---:|")
    for name, counts in parity.items():
        rows = counts["rows"][PATHS[0]]
        cells = " | ".join(f"{counts['rows_different'][path]}" for path in PATHS)
        cpp = f"{counts['cpp_bytes_different']} of {counts['cpp_bytes']:,} bytes"
        lines.append(f"| {name} | {rows:,} | {cells} | {cpp} |")
    return lines


def _setting(result: dict) -> str:
    settings = result["settings"]
    return (
        f"Model: {settings['model']}, {settings['steps']} steps of {settings['sequence_len']} tokens from "
        f"seed {settings['seed']}, on {settings['device']} in {settings['dtype']}. "
        f"Total time: {result['seconds']['total']:.0f} s."
    )


def _comparison(result: dict) -> str:
    """The one comparison that the demo is for, in words: same attention at evaluation, other attention in
    training.
    """
    mode = MODES[1]
    dense, topk = (result["losses"][model][mode.name]["essays"] for model in ("dense", "topk"))
    original = result["losses"]["original"]
    lost = original[mode.name]["essays"] - original["dense"]["essays"]
    return (
        f"On the essays, {mode.label} costs the original model {lost:+.3f} nats. Fine-tuned with dense "
        f"attention it is at {dense:.3f} under {mode.label}, and with {mode.label} at {topk:.3f} "
        f"({topk - dense:+.3f})."
    )


def _data(result: dict) -> str:
    data, settings, trained = result["data"], result["settings"], MODES[1]
    essays, dialogs, train = data["eval-essays"], data["eval-dialogs"], data["train"]
    seen = settings["steps"] * settings["sequence_len"]
    return (
        f"Held out before training: the openings of {essays['documents']} essays with "
        f"{essays['loss_tokens']:,} target tokens, and {dialogs['documents']} dialogs with "
        f"{dialogs['loss_tokens']:,} (answers only). Training text: {train['tokens']:,} tokens in "
        f"{train['documents']:,} documents, of which {settings['steps']} steps see at most {seen:,} tokens. "
        f"The top-k model was trained with {trained.label} and at least {trained.budget['min_keys']} keys."
    )


def write_markdown(path: Path, result: dict) -> None:
    lines = ["# Demonstration: exact top-k attention, trained and measured", ""]
    lines += [_setting(result), "", "## Held-out loss (nats per target token)", "", _data(result), ""]
    lines += ["Essays:", "", *loss_table(result["losses"], "essays"), ""]
    lines += ["Dialogs (so short that the floor decides and 1 % and 5 % keep nearly the same):", ""]
    lines += [*loss_table(result["losses"], "dialogs"), "", _comparison(result), ""]
    apart = max(abs(pair["native"] - pair["transformers"]) for pair in result["agreement"])
    lines += [
        "Measured by transformers with the drop-in attention. The native trainer measured the essays itself,",
        f"before and after each run; the largest difference between the two is {apart:.1e} nats.",
        "",
    ]
    lines += ["![curves](curves.png)", "", "## Same keys on every path", ""]
    lines += [
        "Rows (one query of one head) whose set of kept keys differs from `topk_select`'s, and bytes in",
        "which the C++ functions' results differ from Python's:",
        "",
        *parity_table(result["parity"]),
        "",
    ]
    lines += ["## Generations (greedy, native `topk-generate`)", ""]
    for entry in result["generations"]:
        lines += [f"**{entry['prompt']}**", ""]
        lines += [f"- {a['label']}: {' '.join(a['text'].split())}" for a in entry["answers"]]
        lines.append("")
    lines += ["## Time", ""]
    lines += [f"- {stage}: {seconds:.0f} s" for stage, seconds in result["seconds"].items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(path: Path, result: dict) -> None:
    """Training loss of both runs, their held-out loss while training, and the final held-out losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"dense": "tab:blue", "topk": "tab:orange", "original": "tab:gray"}
    figure, (curves, essays, dialogs) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for run in ("dense", "topk"):
        steps = result["curves"][run]
        curves.plot(steps["step"], steps["loss"], color=colours[run], label=f"training, {_MODELS[run]}")
        if steps["eval_step"]:
            curves.plot(
                steps["eval_step"],
                steps["eval_loss"],
                color=colours[run],
                linestyle="--",
                marker="o",
                label=f"held-out, {_MODELS[run]}",
            )
    curves.set(
        xlabel="step", ylabel="loss (nats per token)", title="Fine-tuning, each under its own attention"
    )
    curves.legend(fontsize=8)
    width = 0.27
    for axis, kind in ((essays, "essays"), (dialogs, "dialogs")):
        for number, (model, label) in enumerate(_MODELS.items()):
            values = [result["losses"][model][mode.name][kind] for mode in MODES]
            places = [place + (number - 1) * width for place in range(len(MODES))]
            bars = axis.bar(places, values, width, color=colours[model], label=label)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        every = [result["losses"][model][mode.name][kind] for model in _MODELS for mode in MODES]
        axis.set_ylim(0.8 * min(every), 1.08 * max(every))
        axis.set_xticks(range(len(MODES)), [mode.label for mode in MODES])
        axis.set(
            xlabel="attention at evaluation", ylabel="nats per token (axis cut)", title=f"Held-out {kind}"
        )
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
