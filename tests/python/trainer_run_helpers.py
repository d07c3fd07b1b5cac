"""Runs of topk-sft on tiny models: data, recipes, the program, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file, save_file
from trainer_helpers import native_program, save_model, tiny_model

VOCAB = 131
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(VOCAB)}, "unk_token": "w0"},
    }
).encode()
TOKENIZER_SHA256 = hashlib.sha256(TOKENIZER).hexdigest()


def documents(count: int, seed: int = 0, longest: int = 60) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random (ids, loss mask); the first third of each document carries no loss."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        ids = rng.integers(3, VOCAB, int(rng.integers(3, longest))).astype(np.int32)
        out.append((ids, (np.arange(len(ids)) >= len(ids) // 3).astype(np.uint8)))
    return out


def write_shard(path: Path, docs, split: str, **metadata: str) -> None:
    offsets = np.cumsum([0] + [len(ids) for ids, _ in docs]).astype(np.int64)
    tensors = {
        "input_ids": np.concatenate([ids for ids, _ in docs]),
        "loss_mask": np.concatenate([mask for _, mask in docs]),
        "doc_offsets": offsets,
    }
    entries = {
        "format": "topk-data",
        "version": "1",
        "tokenizer_sha256": TOKENIZER_SHA256,
        "vocab_size": str(VOCAB),
        "num_documents": str(len(docs)),
        "num_tokens": str(int(offsets[-1])),
        "split": split,
    }
    save_file(tensors, path, {**entries, **metadata})


class Workbench:
    """A tiny model and data in a folder, and a recipe over them."""

    def __init__(self, folder: Path, family: str = "llama", train=None, model=None):
        self.folder = folder
        self.model_dir = folder / "model"
        self.train = documents(40, 1) if train is None else train
        self.validation = documents(8, 2)
        save_model(tiny_model(family, tie_word_embeddings=True) if model is None else model, self.model_dir)
        (self.model_dir / "tokenizer.json").write_bytes(TOKENIZER)
        (folder / "data").mkdir()
        write_shard(folder / "data" / "train-00000.safetensors", self.train, "train")
        write_shard(folder / "data" / "validation-00000.safetensors", self.validation, "validation")

    def recipe(self, output: str = "run", **sections: dict) -> Path:
        """Writes a recipe: dense, 10 steps of 2 x 2 sequences of 64 tokens, with `sections` put over it."""
        recipe = {
            "model": {"base_model": str(self.model_dir)},
            "data": {"dataset_prepared_path": str(self.folder / "data"), "sequence_len": 64},
            "attention": {"mode": "dense"},
            "train": {
                "max_steps": 10,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "num_threads": 1,
            },
            "optim": {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1},
            "checkpoint": {"output_dir": str(self.folder / output), "save_total_limit": 0},
            "logging": {"peak_tflops": 0.1},
        }
        for section, values in sections.items():
            recipe[section].update(values)
        path = self.folder / f"{output}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path


def poisoned(tmp_path, token: int):
    """A model in which one token overflows, and data of which document 7 holds it.

    Channel 0 of the residual stream is the token's own: nothing else writes or reads it but one neuron of
    the first MLP, which squares it with huge weights. Other documents neither see it nor train it.
    """
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[token, 0] = 5
        model.lm_head.weight[:, 0] = 0
        for layer in model.model.layers:
            for reads in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            ):
                layer.get_submodule(reads).weight[:, 0] = 0
            for writes in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(writes).weight[0] = 0
        for neuron in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            neuron.weight[0] = 0
            neuron.weight[0, 0] = 1e25
    train = documents(12, 4, longest=30)
    for ids, _ in train:
        ids[ids == token] = token + 1
    train[7][0][1] = token
    return Workbench(tmp_path, model=model, train=train)


def command(*arguments) -> list[str]:
    return [native_program("topk-sft"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments, status: int = 0, **options) -> subprocess.CompletedProcess:
    """Runs topk-sft, checks its exit status, and that an error is one clear line."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=300, env=environment(), **options
    )
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    if status == 1:
        assert done.stderr.startswith("topk-sft: error: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    return done


def events(folder: Path, kind: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [line for line in lines if kind is None or line["event"] == kind]


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; of a step done twice, the later one."""
    return {line["step"]: line["loss"] for line in events(folder, "step")}


def checkpoints(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("step-*")), key=lambda name: int(name[5:]))


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Weights, moments, random state and position are equal to the bit."""
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].tobytes() == right[key].tobytes(), f"{name}: {key} differs"
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (a, b)]
    for key in ("step", "updates", "epoch", "position", "tokens", "targets", "identity"):
        assert states[0][key] == states[1][key], key


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The packing that docs/trainer.md describes, in the slow and obvious way."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[item]]
        if fitting:
            b = min(fitting, key=lambda b: (room[b], b))
        else:
            b = len(bins)
            bins.append([])
            room.append(capacity)
        bins[b].append(item)
        room[b] -= lengths[item]
    return sorted(sorted(items) for items in bins)
