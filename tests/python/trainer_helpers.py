"""Tiny Hugging Face models, packed batches and the native probe, for the tests of the trainer's model."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def native_program(name: str) -> str:
    """Path of a program of the newest build that has it; TOPK_BUILD_DIR names the build folder instead."""
    if "TOPK_BUILD_DIR" in os.environ:
        candidates = [Path(os.environ["TOPK_BUILD_DIR"])]
    else:
        candidates = list((ROOT / "build").glob("*"))
    found = [
        path
        for folder in candidates
        for path in folder.glob(f"trainer/**/{name}")
        if os.access(path, os.X_OK)
    ]
    if not found:
        pytest.skip(f"{name} is not built: cmake --build build/dev --target {name}")
    return str(max(found, key=lambda path: path.stat().st_mtime))


def tiny_model(family: str, seed: int = 0, **overrides):
    """A random model of two or so layers whose norms and biases are away from their initial values."""
    settings = dict(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "qwen3":
        settings["head_dim"] = 24
    settings.update(overrides)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model.train()


def save_model(model, folder: Path, **config_changes) -> Path:
    """save_pretrained, then edits of config.json (a value of ... removes the key)."""
    model.save_pretrained(folder)
    edit_config(folder, **config_changes)
    return folder


def load_model(folder: Path, dtype: torch.dtype, attention: str = "eager"):
    """from_pretrained, which, unlike model.to(dtype), keeps RoPE's frequencies in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    ).train()


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config, indent=2))


def packed_batch(lengths, vocab: int, seed: int = 0, ignored: float = 0.3):
    """Documents of the given lengths with shifted labels; a share of them carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    ids, positions, labels = [], [], []
    for length in lengths:
        tokens = torch.randint(0, vocab, (length,), generator=generator)
        target = torch.cat([tokens[1:], torch.tensor([-100])])
        target[torch.rand(length, generator=generator) < ignored] = -100
        ids.append(tokens)
        positions.append(torch.arange(length))
        labels.append(target)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat(ids),
        "position_ids": torch.cat(positions),
        "labels": torch.cat(labels),
        "cu_seqlens": bounds,
    }


def documents(batch):
    bounds = batch["cu_seqlens"].tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        yield {key: batch[key][begin:end] for key in ("input_ids", "position_ids", "labels")}


def run_probe(
    model_dir, inputs, tmp_path: Path, ok: bool = True, max_file_bytes: int | None = None, **options
):
    """Outputs of topk-model-probe, or its error text when `ok` is false.

    `max_file_bytes` makes every longer file fail to be written, as on a full disk.
    """
    source, target = tmp_path / "probe_in.safetensors", tmp_path / "probe_out.safetensors"
    save_file({key: value.clone().contiguous() for key, value in inputs.items()}, source)
    target.unlink(missing_ok=True)
    arguments = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()
    ]
    command = [native_program("topk-model-probe"), str(model_dir), str(source), str(target), *arguments]
    limit = None
    if max_file_bytes is not None:

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
        restore_signals=False,  # SIGXFSZ stays ignored: write() fails instead
    )
    if ok:
        assert done.returncode == 0, done.stderr
        return load_file(target)
    assert done.returncode == 1, f"expected an error, got {done.returncode}: {done.stderr}"
    assert not target.exists()
    message = done.stderr.removeprefix("topk-model-probe: error: ").rstrip("\n")
    assert "\n" not in message, message
    return message


def reference(model, batch):
    """Logits, summed loss and gradients of a transformers model that runs each document alone."""
    model.zero_grad()
    logits, loss = [], 0.0
    for document in documents(batch):
        out = model(input_ids=document["input_ids"][None], use_cache=False).logits[0]
        logits.append(out)
        wide = out if out.dtype == torch.float64 else out.float()
        loss = loss + F.cross_entropy(wide, document["labels"], ignore_index=-100, reduction="sum")
    loss.backward()
    result = {"logits": torch.cat(logits).detach(), "loss": loss.detach()}
    for name, parameter in model.named_parameters():
        result[f"grad.{name}"] = parameter.grad.clone()
    return result


def assert_close(got, want, rtol: float = 1e-5) -> None:
    """Every tensor of `want`, against the size of the tensor: |got - want| <= rtol * max |want|."""
    assert {key for key in got if key.startswith("grad.")} == {key for key in want if key.startswith("grad.")}
    for name, expected in want.items():
        actual = got[name].to(torch.float64)
        expected = expected.to(torch.float64)
        assert actual.shape == expected.shape, name
        error = (actual - expected).abs().max().item()
        bound = rtol * expected.abs().max().item()
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"
