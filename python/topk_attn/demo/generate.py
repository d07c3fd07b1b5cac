"""Greedy answers by the native `topk-generate`: the models of the demo, dense and with top-k attention."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import native
from .evaluate import MODES, Mode

# None of these questions is in the training text; the first two are held out from the dialogs.
PROMPTS = (
    "What is the largest planet in our solar system?",
    "what is thermodynamics",
    "What is the capital of France?",
)

# (model, mode, what the report calls it)
_ANSWERS = (
    ("original", MODES[0], "original, dense"),
    ("original", MODES[1], f"original, {MODES[1].label}"),
    ("dense", MODES[1], f"fine-tuned dense, {MODES[1].label}"),
    ("topk", MODES[1], f"fine-tuned top-k, {MODES[1].label}"),
)


def attention_options(mode: Mode) -> list[str]:
    """Options of topk-generate for a mode; they override what the model's config.json says."""
    if mode.budget is None:
        return ["--dense"]
    return [
        part for name, value in mode.budget.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def run(output: Path, models: dict[str, Path], new_tokens: int, device: str, dtype: str) -> list[dict]:
    """Answers of the models to PROMPTS: [{"prompt", "answers": [{"label", "text", "tokens_per_second"}]}]."""
    prompts = output / "prompts.safetensors"
    command = [sys.executable, "-m", "topk_attn.data", "tokens", "--model", str(models["original"])]
    native.run([*command, "--output", str(prompts), *(part for text in PROMPTS for part in ("--user", text))])
    entries = [{"prompt": text, "answers": []} for text in PROMPTS]
    for model, mode, label in _ANSWERS:
        command = [native.program("topk-generate"), "--model", str(models[model]), "--prompts", str(prompts)]
        command += [
            "--max-new-tokens",
            str(new_tokens),
            "--device",
            device,
            "--dtype",
            dtype,
            "--format",
            "json",
        ]
        made = json.loads(native.capture([*command, *attention_options(mode)]))
        for entry, result in zip(entries, made["results"], strict=True):
            entry["answers"].append(
                {
                    "label": label,
                    "text": result["text"],
                    "tokens_per_second": made["decode"]["tokens_per_second"],
                }
            )
    for entry in entries:
        print(f"  {entry['prompt']}")
        for answer in entry["answers"]:
            print(f"    {answer['label'] + ':':32s} {' '.join(answer['text'].split())}")
    return entries
