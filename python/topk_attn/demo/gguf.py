"""Turns a llama-architecture GGUF file into a Hugging Face model folder, with numpy alone.

GGUF keeps tensors quantised in blocks of 32 weights; the three types that occur here are dequantised
exactly as their definition says (F32 as it is, Q8_0 `d * q`, Q4_1 `d * q + m`, with `d` and `m` stored as
float16), then rounded once to bfloat16. GGUF's llama converter also interleaves the rows of the query and
key projections, because its RoPE rotates neighbouring pairs; Hugging Face's rotates halves, so the
interleaving is undone here.

Layout of a GGUF file (version 2 and 3, little endian): magic, version, tensor count, key count, the key/value
pairs, the tensor table (name, dims fastest first, type, offset), padding to `general.alignment`, tensor data.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# GGUF value types that are plain numbers: type id -> struct code.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Tensor types: type id -> (name, weights per block, bytes per block).
_TYPES = {0: ("F32", 1, 4), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}

_CONTROL_TOKEN = 3


class Gguf:
    """A parsed GGUF file: `fields` (the key/value pairs) and `tensors` (name -> (shape, type id, offset))."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self._data = memoryview(data)
        self._at = 0
        if bytes(self._data[:4]) != b"GGUF":
            raise ValueError(f"{name}: not a GGUF file (it starts with {bytes(self._data[:4])!r})")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{name}: GGUF version must be 2 or 3, got {version}")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        self.fields = {}
        for _ in range(field_count):
            key = self._string()
            self.fields[key] = self._value(self._scalar("I"))
        self.tensors = {}
        for _ in range(tensor_count):
            tensor = self._string()
            dims = [self._scalar("Q") for _ in range(self._scalar("I"))]
            self.tensors[tensor] = (tuple(reversed(dims)), self._scalar("I"), self._scalar("Q"))
        alignment = self.fields.get("general.alignment", 32)
        self._base = -(-self._at // alignment) * alignment

    def tensor(self, name: str) -> np.ndarray:
        """The tensor `name`, dequantised to float32, in its row-major shape."""
        if name not in self.tensors:
            raise KeyError(f"{self.name}: no tensor named {name!r}")
        shape, kind, offset = self.tensors[name]
        if kind not in _TYPES:
            known = ", ".join(t[0] for t in _TYPES.values())
            raise ValueError(f"{self.name}: tensor {name} has GGUF type {kind}; supported are {known}")
        label, block, size = _TYPES[kind]
        count = int(np.prod(shape))
        if count % block:
            raise ValueError(f"{self.name}: tensor {name} has {count} weights, not a multiple of {block}")
        begin, length = self._base + offset, count // block * size
        self._need(begin + length)
        raw = np.frombuffer(self._data, np.uint8, length, begin)
        return _dequantise(raw.reshape(-1, size), label).reshape(shape)

    def _need(self, end: int) -> None:
        if end > len(self._data):
            raise ValueError(f"{self.name}: ends early, after {len(self._data)} of at least {end} bytes")

    def _scalar(self, code: str):
        self._need(self._at + struct.calcsize("<" + code))
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self._need(self._at + length)
        text = bytes(self._data[self._at : self._at + length]).decode("utf-8")
        self._at += length
        return text

    def _value(self, kind: int):
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, length = self._scalar("I"), self._scalar("Q")
            return [self._value(element) for _ in range(length)]
        raise ValueError(f"{self.name}: unknown GGUF value type {kind}")


def _dequantise(blocks: np.ndarray, kind: str) -> np.ndarray:
    """uint8 blocks (blocks, bytes per block) -> float32 weights (blocks, weights per block)."""
    if kind == "F32":
        return blocks.copy().view("<f4")
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == "Q8_0":
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    minimum = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    packed = blocks[:, 4:]
    # Low nibbles hold the first 16 weights of the block, high nibbles the last 16.
    quants = np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)
    return scale * quants + minimum


def _uninterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q/k projection from neighbouring rotary pairs back to rotary halves, head by head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _weights(gguf: Gguf, layers: int, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    names = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
    for i in range(layers):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        names |= {
            layer + "input_layernorm.weight": block + "attn_norm",
            layer + "self_attn.q_proj.weight": block + "attn_q",
            layer + "self_attn.k_proj.weight": block + "attn_k",
            layer + "self_attn.v_proj.weight": block + "attn_v",
            layer + "self_attn.o_proj.weight": block + "attn_output",
            layer + "post_attention_layernorm.weight": block + "ffn_norm",
            layer + "mlp.gate_proj.weight": block + "ffn_gate",
            layer + "mlp.up_proj.weight": block + "ffn_up",
            layer + "mlp.down_proj.weight": block + "ffn_down",
        }
    if "output.weight" in gguf.tensors:
        names["lm_head.weight"] = "output"
    left_over = set(gguf.tensors) - {source + ".weight" for source in names.values()}
    if left_over:
        raise ValueError(f"{gguf.name}: tensors a Llama model does not have: {sorted(left_over)[:4]}")
    weights = {}
    for target, source in names.items():
        weight = gguf.tensor(source + ".weight")
        if target.endswith("q_proj.weight"):
            weight = _uninterleave(weight, heads)
        elif target.endswith("k_proj.weight"):
            weight = _uninterleave(weight, kv_heads)
        weights[target] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    return weights


def _tokenizer(fields: dict) -> dict:
    """tokenizer.json of the file's byte-level BPE. `smollm` splits digits one by one before the usual GPT-2
    split.
    """
    if fields["tokenizer.ggml.model"] != "gpt2" or fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(
            "the tokenizer must be gpt2 / smollm, got "
            f"{fields['tokenizer.ggml.model']} / {fields['tokenizer.ggml.pre']}"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    special = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, kind in enumerate(fields["tokenizer.ggml.token_type"])
        if kind == _CONTROL_TOKEN
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def convert(data: bytes, name: str, folder: Path) -> None:
    """Writes `folder` (which exists and is empty) as a Hugging Face model folder, weights in bfloat16.

    Args:
        data: the bytes of a GGUF file of architecture `llama` with a `gpt2`/`smollm` tokenizer.
        name: what to call the file in error messages.
        folder: where config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
            chat_template.jinja and model.safetensors go.

    Raises:
        ValueError: the file is not GGUF, or holds something other than the above.
    """
    gguf = Gguf(data, name)
    fields = gguf.fields
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{name}: architecture must be llama, got {fields['general.architecture']}")
    layers, heads = fields["llama.block_count"], fields["llama.attention.head_count"]
    kv_heads, hidden = fields["llama.attention.head_count_kv"], fields["llama.embedding_length"]
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    pad, unknown = fields["tokenizer.ggml.padding_token_id"], fields["tokenizer.ggml.unknown_token_id"]
    tokens = fields["tokenizer.ggml.tokens"]
    weights = _weights(gguf, layers, heads, kv_heads)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        # Stored as float32: 9.999999747378752e-06 there is 1e-05 here.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(tokens),
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[pad],
        "unk_token": tokens[unknown],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
    generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    files = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
        "tokenizer.json": _tokenizer(fields),
    }
    for file, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / file).write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
