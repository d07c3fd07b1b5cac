"""Writes the file that `benchmarks/attention.py --real FILE` reads: essays and the first layers of
SmolLM2-135M.

    python benchmarks/gpu/capture_smollm2.py smollm2.safetensors            # about 38 MB, layers 0, 3, 8, 15
    python benchmarks/gpu/capture_smollm2.py FILE --layers 0 3 8 15 22      # 54 MB
    python benchmarks/gpu/capture_smollm2.py FILE --check                   # also compares with transformers

Run on a machine that has the demonstration's downloads (`make demo` fetches them); needs transformers.
real.py says what is in the file and how q, k and v come from it. The text is the essays in the order of their
names, cut into 8 documents of 8,192 tokens; essays are not kept apart. `--check` runs the whole model in
transformers on the first document and prints how far q, k, v of the file are from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu import real  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS, TOKENS = 8, 8192
NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def essays(folder: Path) -> str:
    from topk_attn.demo import download

    found = download.essays(folder)
    return "\n\n".join(found[name] for name in sorted(found))


def prefix_tensors(model, token_ids: torch.Tensor, last: int) -> dict[str, torch.Tensor]:
    """What real.Prefix reads. Of the last layer only the inputs of its attention are needed."""
    state = model.state_dict()
    used, tokens = token_ids.unique(return_inverse=True)
    embedding = state["model.embed_tokens.weight"][used].float()
    blocks = embedding.reshape(len(used), -1, real.BLOCK)
    scale = (blocks.abs().amax(-1) / 127).clamp(min=1e-20)
    tensors = {
        "tokens": tokens.to(torch.int32),
        "embedding.int8": (blocks / scale[..., None]).round().to(torch.int8).reshape(embedding.shape),
        "embedding.scale": scale.half(),
    }
    for layer in range(last + 1):
        source, at = f"model.layers.{layer}.", f"layers.{layer}."
        tensors[at + "attention.norm"] = state[source + "input_layernorm.weight"].float()
        tensors[at + "mlp.norm"] = state[source + "post_attention_layernorm.weight"].float()
        for name, long_name in NAMES.items():
            if layer < last or name in "qkv":
                weight = state[f"{source}{long_name}.weight"]
                tensors[f"{at}{name}.codes"], tensors[f"{at}{name}.ranges"] = real.pack(weight)
    return tensors


def check(path: Path, model, token_ids: torch.Tensor) -> None:
    """Relative distance of q, k, v (Frobenius) between the file's layers and the model in transformers."""
    prefix = real.Prefix(path, torch.device("cpu"))
    captured = prefix.capture(tokens=prefix.tokens[:1])
    seen = {}

    def hook(layer: int, name: str):
        return lambda module, arguments, output: seen.__setitem__((layer, name), output)

    for layer in prefix.layers:
        attention = model.model.layers[layer].self_attn
        for name in "qkv":
            getattr(attention, f"{name}_proj").register_forward_hook(hook(layer, name))
    with torch.no_grad():
        model.model(token_ids[:1])
        position = torch.arange(token_ids.shape[1])[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1), position)
    for layer in prefix.layers:
        line = []
        for name, ours in zip("qkv", captured[layer], strict=True):
            theirs = seen[layer, name].reshape(ours.shape).float()
            if name != "v":
                first, second = theirs.chunk(2, -1)
                theirs = theirs * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]
            line.append(f"{name} {float((ours.float() - theirs).norm() / theirs.norm()):.4f}")
        print(f"layer {layer}: relative distance to transformers {', '.join(line)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 8, 15])
    parser.add_argument("--model", type=Path, default=ROOT / "downloads" / "SmolLM2-135M-Instruct")
    parser.add_argument("--downloads", type=Path, default=ROOT / "downloads")
    parser.add_argument(
        "--check", action="store_true", help="compare with transformers (a minute of two cores)"
    )
    args = parser.parse_args()

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(args.model)(essays(args.downloads))["input_ids"]
    if len(ids) < DOCUMENTS * TOKENS:
        raise SystemExit(f"the essays have {len(ids)} tokens: {DOCUMENTS * TOKENS} are needed")
    token_ids = torch.tensor(ids[: DOCUMENTS * TOKENS]).reshape(DOCUMENTS, TOKENS)
    config = {
        name: getattr(model.config, name)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
    }
    config["rope_theta"] = json.loads((args.model / "config.json").read_text())["rope_theta"]
    metadata = {
        "config": json.dumps(config),
        "layers": json.dumps(sorted(args.layers)),
        "note": f"SmolLM2-135M-Instruct (4 bits a weight) on essays, {DOCUMENTS} x {TOKENS} tokens",
    }
    save_file(prefix_tensors(model, token_ids, max(args.layers)), args.file, metadata)
    print(f"{args.file}: {args.file.stat().st_size / 1e6:.1f} MB, layers {sorted(args.layers)}")
    if args.check:
        check(args.file, model, token_ids)


if __name__ == "__main__":
    main()
