"""Real queries, keys and values: SmolLM2-135M-Instruct reading essays.

Captured tensors of 65,536 tokens take 126 MB a layer, so the file that capture_smollm2.py writes holds what
they come from instead: the token ids and the first layers of the model, in the 4 bits a weight that the model
was published with here (under 40 MB). The benchmark runs those layers on the card, with dense attention, and
takes q, k (after RoPE) and v of the chosen layers. Needs torch alone.

Labels: `8x8192` is 8 documents of 8,192 tokens, the model's own context. `2x32768 stretched` are the same
tokens as two documents of 32,768 with positions divided by 4, so that RoPE stays in the range that the model
knows.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "F16": torch.float16,
    "F32": torch.float32,
}
BLOCK = 32  # weights that share a scale


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the host) and metadata of a safetensors file."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + length]))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + x for x in entry["data_offsets"])
        flat = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=begin).clone()
        tensors[name] = flat.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns / 2) uint8, two 4-bit codes a byte, and the range (rows, columns / 32, 2) float16
    of each block of 32 weights of a row: w = low + code * (high - low) / 15. Exact up to rounding for a
    weight that had this form before.
    """
    blocks = weight.float().reshape(len(weight), -1, BLOCK)
    low, high = blocks.amin(-1), blocks.amax(-1)
    step = ((high - low) / 15).clamp(min=1e-20)
    codes = ((blocks - low[..., None]) / step[..., None]).round().to(torch.uint8)
    pairs = codes.reshape(len(weight), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, torch.stack((low, high), -1).half()


def unpack(codes: Tensor, ranges: Tensor) -> Tensor:
    values = torch.stack((codes & 15, codes >> 4), -1).reshape(*ranges.shape[:2], BLOCK).float()
    low, high = ranges.float()[..., :1], ranges.float()[..., 1:]
    return (low + values * ((high - low) / 15)).reshape(len(codes), -1)


class Prefix:
    """The first layers of a Llama-architecture model."""

    def __init__(self, path: Path, device: torch.device) -> None:
        tensors, metadata = read_safetensors(path)
        self.config = json.loads(metadata["config"])
        self.layers: list[int] = json.loads(metadata["layers"])
        self.note = metadata["note"]
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.tokens = (
            tensors.pop("tokens").long().to(device)
        )  # (documents, tokens), rows of the embedding table
        self._weights: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name.endswith(".codes"):
                base = name.removesuffix(".codes")
                tensor = unpack(tensor.to(device), tensors[base + ".ranges"].to(device))
                self._weights[base] = tensor.to(self.dtype)
            elif name.endswith(".norm"):
                self._weights[name] = tensor.to(device)
        scale = tensors["embedding.scale"].to(device).float()
        self._weights["embedding"] = tensors["embedding.int8"].to(device).float() * scale.repeat_interleave(
            BLOCK, 1
        )

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x.to(self.dtype), self._weights[name])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self.config["rms_norm_eps"]) * self._weights[name].float()

    def _rope(self, tokens: int, stretch: int) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.config["head_dim"], 2, device=self.device, dtype=torch.float64)
        frequency = self.config["rope_theta"] ** (-half / self.config["head_dim"])
        angle = torch.arange(tokens, device=self.device, dtype=torch.float64)[:, None] / stretch * frequency
        angle = torch.cat((angle, angle), -1)[:, None]
        return angle.cos().float(), angle.sin().float()

    @torch.no_grad()
    def capture(
        self, stretch: int = 1, tokens: Tensor | None = None
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """layer -> bfloat16 q (B, T, H, D), k, v (B, T, Hkv, D). `stretch` joins that many documents into one
        and divides its positions by it.
        """
        tokens = self.tokens if tokens is None else tokens
        tokens = tokens.reshape(len(tokens) // stretch, -1)
        batch, length = tokens.shape
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        head_dim = self.config["head_dim"]
        cos, sin = self._rope(length, stretch)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, -1)
            return x.float() * cos + torch.cat((-second, first), -1) * sin

        captured = {}
        hidden = self._weights["embedding"][tokens]  # the residual stream stays in float32
        for layer in range(max(self.layers) + 1):
            at = f"layers.{layer}."
            x = self._norm(hidden, at + "attention.norm")
            q, k, v = (self._linear(x, at + name).reshape(batch, length, -1, head_dim) for name in "qkv")
            q, k = rotate(q), rotate(k)
            if layer in self.layers:
                captured[layer] = tuple(y.bfloat16().contiguous() for y in (q, k, v))
            if layer == max(self.layers):
                break
            q, k, v = (y.to(self.dtype).transpose(1, 2) for y in (q, k, v))
            k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            hidden = hidden + self._linear(mixed.reshape(batch, length, -1), at + "o").float()
            x = self._norm(hidden, at + "mlp.norm")
            gate = F.silu(self._linear(x, at + "gate")) * self._linear(x, at + "up")
            hidden = hidden + self._linear(gate, at + "down").float()
        return captured
