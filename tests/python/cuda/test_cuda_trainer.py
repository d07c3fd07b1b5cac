"""The native trainer on a CUDA device against the same program on the CPU, and itself after a resume.

Runs topk-model-probe and topk-sft from the folder that TOPK_TRAINER_BIN names, else from the newest build.
Needs neither transformers nor safetensors: models are written here, and tests/python/test_trainer_model*.py
compare the CPU with transformers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
TYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}

BASE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "dtype": "float32",
    "eos_token_id": 2,
}
CONFIGS = {
    # QK-norm, tied, a vocabulary in whole vectors.
    "qwen3": {
        **BASE,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "vocab_size": 1000,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    # Biases, an output head of its own, an odd vocabulary, a head_dim that is no power of two.
    "llama": {
        **BASE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 80,
        "vocab_size": 1001,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
}
# Layers enough for activations to leave the device.
CONFIGS["deep"] = {**CONFIGS["qwen3"], "num_hidden_layers": 6}
FAMILIES = ("qwen3", "llama")
LORA = {"r": 8, "alpha": 16.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}
BATCHES = {"one document": [1000], "several documents": [300, 1, 211, 512]}


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    header: dict = {"__metadata__": metadata or {}}
    parts, end = [], 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        end += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def load(path: Path) -> dict[str, torch.Tensor]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=TYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def program(name: str) -> str:
    if "TOPK_TRAINER_BIN" in os.environ:
        found = [Path(os.environ["TOPK_TRAINER_BIN"]) / name]
    else:
        found = list(ROOT.glob(f"build/*/trainer/**/{name}"))
    found = [path for path in found if os.access(path, os.X_OK)]
    if not found:
        pytest.skip(f"{name} is not built")
    return str(max(found, key=lambda path: path.stat().st_mtime))


def environment() -> dict[str, str]:
    torch_folder = Path(torch.__file__).parent
    folders = [torch_folder / "lib", *sorted(torch_folder.parent.glob("nvidia/*/lib"))]
    if "TOPK_LIB" in os.environ:
        folders.append(Path(os.environ["TOPK_LIB"]).parent)
    paths = [*map(str, folders), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path)}


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    if "was built without CUDA" in done.stderr:
        pytest.skip("the trainer is built without CUDA")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def write_model(folder: Path, config: dict) -> Path:
    """Random weights whose norms and biases are away from their initial values."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float, *shape: int) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    maps = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {
        "model.embed_tokens.weight": normal(0.05, config["vocab_size"], hidden),
        "model.norm.weight": 1 + normal(0.1, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in maps.items():
            tensors[f"{prefix}{name}.weight"] = normal(0.08, *shape)
            if config["attention_bias"]:
                tensors[f"{prefix}{name}.bias"] = normal(0.05, shape[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + normal(0.1, hidden)
        if config["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{prefix}self_attn.{name}.weight"] = 1 + normal(0.1, config["head_dim"])
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(0.05, config["vocab_size"], hidden)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / "model.safetensors", tensors)
    return folder


def write_batch(path: Path, lengths: list[int], vocabulary: int) -> Path:
    generator = torch.Generator().manual_seed(1)
    tokens = sum(lengths)
    labels = torch.randint(3, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = -100
    batch = {
        "input_ids": torch.randint(3, vocabulary, (tokens,), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "labels": labels,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
    }
    save(path, batch)
    return path


class Probe:
    """One model and batch; runs of the probe on it."""

    def __init__(self, folder: Path, family: str, lengths: list[int]):
        self.folder = folder
        self.model = write_model(folder / "model", CONFIGS[family])
        self.batch = write_batch(folder / "batch.safetensors", lengths, 1000)

    def adapt(self) -> None:
        """Values of LORA's A and B beside the batch, none of them zero."""
        generator = torch.Generator().manual_seed(2)
        tensors = load(self.batch)
        for name, weight in load(self.model / "model.safetensors").items():
            base = name.removesuffix(".weight")
            if base.split(".")[-1] in LORA["targets"]:
                rows, columns = weight.shape
                shapes = {"A": (LORA["r"], columns), "B": (rows, LORA["r"])}
                for letter, shape in shapes.items():
                    values = 0.05 * torch.randn(shape, generator=generator)
                    tensors[f"adapter.{base}.lora_{letter}.weight"] = values
        save(self.batch, tensors)

    def __call__(self, **options) -> dict[str, torch.Tensor]:
        out = self.folder / "out.safetensors"
        out.unlink(missing_ok=True)
        given = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in options.items()
        ]
        call([program("topk-model-probe"), str(self.model), str(self.batch), str(out), *given])
        return load(out)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_dense_equals_the_cpu(gpu, family, lengths, tmp_path):
    probe = Probe(tmp_path, family, lengths)
    want, got = probe(device="cpu"), probe(device="cuda")
    assert want.keys() == got.keys()
    for name in want:
        assert distance(got[name], want[name]) < 2e-5, name


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_dense_is_as_near_to_float32_as_the_cpu(gpu, family, lengths, tmp_path):
    probe = Probe(tmp_path, family, lengths)
    want = probe(device="cpu")
    cpu, got = (probe(device=device, dtype="bfloat16") for device in ("cpu", "cuda"))
    for name in want:
        assert distance(got[name], want[name]) < 1.3 * distance(cpu[name], want[name]) + 1e-3, name


@pytest.mark.parametrize("attention", ["dense", {"version": 1, "ratio": 0.05}], ids=["dense", "topk"])
@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
def test_checkpointing_changes_no_bit(gpu, recompute, attention, tmp_path):
    probe = Probe(tmp_path, "qwen3", [300, 211, 512])
    # Without it attention sums its gradients in whatever order the device takes.
    settings = {"device": "cuda", "dtype": "bfloat16", "attention": attention, "deterministic": 1}
    plain, again = probe(**settings), probe(**settings, recompute=recompute)
    for name in plain:
        assert plain[name].equal(again[name]), name


ATTENTIONS = pytest.mark.parametrize(
    "attention", ["dense", {"version": 1, "ratio": 0.05}], ids=["dense", "topk"]
)


@ATTENTIONS
@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
def test_offload_changes_no_bit(gpu, recompute, attention, tmp_path):
    """Tensors above 1 MiB of six layers, of which two are on the device at a time."""
    probe = Probe(tmp_path, "deep", [1500, 2596])
    settings = {"device": "cuda", "dtype": "bfloat16", "attention": attention, "deterministic": 1}
    plain = probe(**settings)
    again = probe(**settings, recompute=recompute, offload=1)
    for name in plain:
        assert plain[name].equal(again[name]), name


@pytest.mark.parametrize("lengths", [[4096], [1024] * 4, [1500, 2596]], ids=["one", "equal", "packed"])
@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
def test_chunks_and_separate_attention_lose_nothing(gpu, recompute, lengths, tmp_path):
    """Not deterministic, so that cuDNN serves where it can: as near to float32 as without checkpointing."""
    probe = Probe(tmp_path, "qwen3", lengths)
    settings = {"device": "cuda", "dtype": "bfloat16"}
    exact = probe(device="cuda")
    plain = probe(**settings)
    again = probe(**settings, recompute=recompute, chunk_tokens=1000, offload=1)
    for name in plain:
        assert distance(again[name], exact[name]) < 1.1 * distance(plain[name], exact[name]) + 1e-3, name


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_equal_the_cpu(gpu, family, lengths, tmp_path):
    """float32: the loss and the gradients of A and B, neither of which is zero."""
    probe = Probe(tmp_path, family, lengths)
    probe.adapt()
    want, got = (probe(device=device, lora=LORA) for device in ("cpu", "cuda"))
    assert want.keys() == got.keys() and sum("lora_A" in name for name in want) == 2 * len(LORA["targets"])
    for name in want:
        assert distance(got[name], want[name]) < 2e-5, name
    cpu, half = (probe(device=device, lora=LORA, dtype="bfloat16") for device in ("cpu", "cuda"))
    for name in want:
        assert distance(half[name], want[name]) < 1.3 * distance(cpu[name], want[name]) + 1e-3, name


@ATTENTIONS
def test_the_probe_equals_the_cpu(gpu, attention, tmp_path):
    probe = Probe(tmp_path, "qwen3", [300, 211, 512])
    budget = {"version": 1, "ratio": 0.05, "sink": 2, "recent": 3}
    want, got = (probe(device=device, attention=attention, probe=budget) for device in ("cpu", "cuda"))
    for name in ("probe.entropy", "probe.kept_mass"):
        assert distance(got[name], want[name]) < 1e-4, name


def write_shard(path: Path, documents: int, length: int, vocabulary: int, tokenizer: bytes) -> None:
    ids = np.random.default_rng(1).integers(3, vocabulary, documents * length).astype(np.int32)
    tensors = {
        "input_ids": torch.from_numpy(ids),
        "loss_mask": torch.ones(documents * length, dtype=torch.uint8),
        "doc_offsets": torch.arange(0, documents * length + 1, length),
    }
    metadata = {
        "format": "topk-data",
        "version": "1",
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "vocab_size": str(vocabulary),
        "num_documents": str(documents),
        "num_tokens": str(documents * length),
        "split": "train",
    }
    save(path, tensors, metadata)


@pytest.mark.parametrize(
    "attention", [{"mode": "dense"}, {"mode": "topk", "ratio": 0.05}], ids=["dense", "topk"]
)
def test_resume_continues_to_the_bit(gpu, attention, tmp_path):
    """Deterministic: six steps at once are three and, after a resume, three more; the loss falls."""
    model = write_model(tmp_path / "model", CONFIGS["qwen3"])
    vocabulary = {"version": "1.0", "added_tokens": [], "decoder": None}
    vocabulary["model"] = {"type": "WordLevel", "vocab": {"w0": 0, "w1": 1}, "unk_token": "w0"}
    tokenizer = json.dumps(vocabulary).encode()
    (model / "tokenizer.json").write_bytes(tokenizer)
    write_shard(tmp_path / "train.safetensors", 24, 500, 1000, tokenizer)
    recipe = {
        "model": {"base_model": str(model), "device": "cuda", "dtype": "bfloat16"},
        "data": {"train_files": [str(tmp_path / "train.safetensors")], "sequence_len": 1024},
        "attention": attention,
        "train": {
            "max_steps": 6,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "deterministic": True,
        },
        "optim": {"learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_steps": 0},
        "checkpoint": {"output_dir": "", "save_steps": 3, "export_model": False},
        "logging": {"peak_tflops": 100, "tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    once, twice = tmp_path / "once", tmp_path / "twice"
    sft = program("topk-sft")
    call([sft, str(path), f"checkpoint.output_dir={once}"])
    call([sft, str(path), f"checkpoint.output_dir={twice}"])
    for file in (twice / "step-6").iterdir():
        file.unlink()
    (twice / "step-6").rmdir()
    call([sft, str(path), f"checkpoint.output_dir={twice}", "--resume", "latest"])
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (once / "step-6" / name).read_bytes() == (twice / "step-6" / name).read_bytes(), name
    events = [json.loads(line) for line in (once / "train.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < losses[0]
