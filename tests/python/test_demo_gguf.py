"""Dequantisation and conversion of GGUF files, on files made here."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from topk_attn.demo import gguf


def half(x):
    return struct.pack("<e", x)


def test_q8_0_block():
    quants = np.arange(-16, 16, dtype=np.int8)
    block = np.frombuffer(half(0.5) + quants.tobytes(), np.uint8)[None]
    assert np.array_equal(gguf._dequantise(block, "Q8_0")[0], 0.5 * quants.astype(np.float32))


def test_q4_1_block():
    quants = np.arange(32) % 16
    quants[16:] = quants[16:][::-1]
    packed = (quants[:16] | (quants[16:] << 4)).astype(np.uint8)
    block = np.frombuffer(half(0.25) + half(-1.5) + packed.tobytes(), np.uint8)[None]
    assert np.array_equal(gguf._dequantise(block, "Q4_1")[0], 0.25 * quants.astype(np.float32) - 1.5)


def test_uninterleave_turns_pairs_into_halves():
    # Two heads of dim 4; rows named by (head, channel): GGUF order is channel 0, 2, 1, 3 of Hugging Face's.
    hf = np.arange(8, dtype=np.float32)[:, None]
    stored = hf[[0, 2, 1, 3, 4, 6, 5, 7]]
    assert np.array_equal(gguf._uninterleave(stored, 2), hf)


class Writer:
    """A GGUF file of float32 tensors."""

    def __init__(self):
        self.fields, self.tensors = [], []

    @staticmethod
    def string(text):
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    def field(self, key, kind, payload):
        self.fields.append(self.string(key) + struct.pack("<I", kind) + payload)

    def number(self, key, value):
        if isinstance(value, float):
            self.field(key, 6, struct.pack("<f", value))
        else:
            self.field(key, 4, struct.pack("<I", value))

    def text(self, key, value):
        self.field(key, 8, self.string(value))

    def texts(self, key, values):
        payload = struct.pack("<IQ", 8, len(values)) + b"".join(self.string(v) for v in values)
        self.field(key, 9, payload)

    def tensor(self, name, array):
        self.tensors.append((name, np.asarray(array, np.float32)))

    def bytes(self):
        table, data = b"", b""
        for name, array in self.tensors:
            dims = array.shape[::-1]
            table += self.string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
            table += struct.pack("<IQ", 0, len(data))
            data += array.tobytes() + b"\0" * (-array.nbytes % 32)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.fields))
        head += b"".join(self.fields) + table
        return head + b"\0" * (-len(head) % 32) + data


@pytest.fixture
def tiny():
    """One layer, 2 query heads and 1 KV head of dim 4; the values of q_proj say which row they are."""
    w = Writer()
    w.text("general.architecture", "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 12}
    for key, value in sizes.items():
        w.number(f"llama.{key}", value)
    w.number("llama.attention.head_count", 2)
    w.number("llama.attention.head_count_kv", 1)
    w.number("llama.attention.layer_norm_rms_epsilon", 1e-5)
    w.number("llama.rope.freq_base", 1e4)
    w.text("tokenizer.ggml.model", "gpt2")
    w.text("tokenizer.ggml.pre", "smollm")
    w.texts("tokenizer.ggml.tokens", ["<|end|>", "a", "b", "ab"])
    w.field("tokenizer.ggml.token_type", 9, struct.pack("<IQ4i", 5, 4, 3, 1, 1, 1))
    w.texts("tokenizer.ggml.merges", ["a b"])
    for key in ("bos", "eos", "padding", "unknown"):
        w.number(f"tokenizer.ggml.{key}_token_id", 0)
    w.text("tokenizer.chat_template", "{{ messages }}")
    rng = np.random.default_rng(0)
    for name, shape in {
        "token_embd": (4, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8),
        "blk.0.ffn_down": (8, 12),
    }.items():
        w.tensor(name + ".weight", rng.standard_normal(shape))
    w.tensor("blk.0.attn_q.weight", np.repeat(np.arange(8.0)[:, None], 8, axis=1))
    return w


def test_convert(tiny, tmp_path):
    gguf.convert(tiny.bytes(), "tiny", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    assert weights["model.layers.0.self_attn.q_proj.weight"][:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert weights["model.layers.0.mlp.gate_proj.weight"].shape == (12, 8)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 1e4 and config["tie_word_embeddings"]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"] == ["a b"]
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab<|end|>a")["input_ids"] == [3, 0, 1]


def test_what_cannot_be_converted_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="x: not a GGUF file"):
        gguf.convert(b"PK\3\4" + bytes(64), "x", tmp_path)
    with pytest.raises(ValueError, match="version must be 2 or 3, got 9"):
        gguf.convert(b"GGUF" + struct.pack("<I", 9) + bytes(64), "x", tmp_path)
    tiny.tensor("blk.0.attn_q.bias", np.zeros(8))
    with pytest.raises(ValueError, match="attn_q.bias"):
        gguf.convert(tiny.bytes(), "x", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_truncated_file_is_an_error(tiny, tmp_path):
    data = tiny.bytes()
    for size in (4, 20, 200, len(data) - 40):
        with pytest.raises(ValueError, match="x: ends early"):
            gguf.convert(data[:size], "x", tmp_path)
