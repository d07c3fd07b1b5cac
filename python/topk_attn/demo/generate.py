"""Greedy answers by the native `topk-generate`: the models of the demo, dense and with top-k attention."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import native
from .evaluate import MODES, Mode

# The first two are held out; the third is not in the training text either.
QUESTIONS = (
    "What is the largest planet in our solar system?",
    "Who is your father",
    "What is the capital of France?",
)
_OPENING = 2000  # at most so many characters of a held-out essay, to be continued

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


def run(
    output: Path, models: dict[str, Path], essays: dict[str, str], new_tokens: int, device: str, dtype: str
) -> list[dict]:
    """The models' continuations of the first of the held-out `essays` and their answers to QUESTIONS.

    Returns:
        For each prompt {"prompt", "answers": [{"label", "text", "tokens_per_second"}]}.
    """
    name, text = next(iter(essays.items()))
    opening, prompts = output / "data" / "opening.txt", output / "data" / "prompts.safetensors"
    # Whole sentences, so that no model has to guess the end of a word.
    text = text[: text.rindex(". ", 0, _OPENING) + 1]
    opening.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "topk_attn.data", "tokens", "--model", str(models["original"])]
    command += ["--output", str(prompts), "--prompt-file", str(opening)]
    native.run([*command, *(part for question in QUESTIONS for part in ("--user", question))])
    asked = [f"(continue the held-out essay {name!r} after {len(text):,} characters)", *QUESTIONS]
    entries = [{"prompt": prompt, "answers": []} for prompt in asked]
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
