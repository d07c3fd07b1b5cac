"""Counts, on given queries and keys, whether every path of the library keeps the same keys.

    python -m topk_attn.demo.parity [--tokens 512] [--layers 0,14,29]

The reference is `topk_select` on the whole sequence. Against it are held, key for key:

* the sets that the training forward and the training backward really used. They are read off the results:
  with V (or dO) made of unit vectors, each output channel is the probability of one key;
* the sets that prefill reports, in one call and in chunks, and that token-by-token decode reports with a
  growing cache, contiguous and in shuffled pages;
* the sets of the same document packed between two others.

Then the C++ functions run on the same tensors, in a program without Python (`topk-parity`), and what they
return is compared with Python's bit for bit. Queries and keys are those of a real model, or made so that
rounding alone decides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import topk_attn

from . import download, native
from .models import load_model, token_ids

# The scale never changes the order; so small a one keeps the probability of every kept key far from zero.
_FLAT_SCALE = 1e-6
_CHANNELS = 256  # unit vectors in one call: the largest head dim of V
_PAGE = 16
_CHUNK = 64

PATHS = (
    "training forward",
    "training backward",
    "prefill",
    "prefill in chunks",
    "decode, contiguous cache",
    "decode, paged cache",
    "packed with other documents",
)


@dataclass
class Counts:
    """Rows (one query of one head) whose set was compared with the reference, and rows where it differed,
    by path; bytes of C++ results compared with Python's, and bytes that differed.
    """

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PATHS, 0))
    different: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PATHS, 0))
    bytes: int = 0
    bytes_different: int = 0
    packed_difference: float = 0.0  # largest |out packed - out alone|, as a share of the largest |out|

    def add(self, other: Counts) -> None:
        for path in PATHS:
            self.rows[path] += other.rows[path]
            self.different[path] += other.different[path]
        self.bytes += other.bytes
        self.bytes_different += other.bytes_different
        self.packed_difference = max(self.packed_difference, other.packed_difference)

    @property
    def ok(self) -> bool:
        return not any(self.different.values()) and not self.bytes_different

    def as_dict(self) -> dict:
        return {
            "rows": self.rows,
            "rows_different": self.different,
            "cpp_bytes": self.bytes,
            "cpp_bytes_different": self.bytes_different,
            "packed_output_difference": self.packed_difference,
        }


# ----------------------------------------------------------------------------------------------------------
# Sets
# ----------------------------------------------------------------------------------------------------------


def _mask(indices: Tensor, keys: int) -> Tensor:
    """indices (..., W), -1 padded -> bool (..., keys)."""
    mask = torch.zeros(*indices.shape[:-1], keys + 1, dtype=torch.bool)
    return mask.scatter_(-1, (indices.long() + 1), True)[..., 1:]


def _unit_blocks(count: int, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(first, width, rows): rows (count, _CHANNELS) hold the unit vectors of elements first .. first +
    width - 1.
    """
    for first in range(0, count, _CHANNELS):
        width = min(_CHANNELS, count - first)
        rows = torch.zeros(count, _CHANNELS, dtype=dtype)
        rows[first : first + width, :width] = torch.eye(width, dtype=dtype)
        yield first, width, rows


def forward_sets(q: Tensor, k: Tensor, budget: dict) -> Tensor:
    """bool (H, T, T): the keys that have weight in the output of the training forward. q (1, T, H, D)."""
    tokens, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    used = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    # A leaf that requires a gradient, so that this is the forward of a training step.
    q = q.detach().requires_grad_()
    for first, width, rows in _unit_blocks(tokens, q.dtype):
        v = rows[None, :, None].expand(1, tokens, kv_heads, _CHANNELS)
        out = topk_attn.topk_attn_func(q, k, v, softmax_scale=_FLAT_SCALE, **budget).detach()
        used[:, :, first : first + width] = (out[0, ..., :width] != 0).transpose(0, 1)
    return used


def backward_sets(q: Tensor, k: Tensor, budget: dict) -> Tensor:
    """bool (H, T, T): the keys whose dV receives anything from a query, head by head. q (1, T, H, D)."""
    tokens, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    used = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    v = torch.ones(1, tokens, kv_heads, _CHANNELS, dtype=q.dtype, requires_grad=True)
    out = topk_attn.topk_attn_func(q, k, v, softmax_scale=_FLAT_SCALE, **budget)
    for first, width, rows in _unit_blocks(tokens, q.dtype):
        for head in range(heads):
            dout = torch.zeros_like(out)
            dout[0, :, head] = rows
            (dv,) = torch.autograd.grad(out, v, dout, retain_graph=True)
            kept = dv[0, :, head // (heads // kv_heads), :width] != 0  # (keys, queries)
            used[head, first : first + width] = kept.T
    return used


def prefill_sets(q: Tensor, k: Tensor, budget: dict, chunk: int) -> Tensor:
    """bool (H, T, T): the keys that calls of `chunk` new tokens each report, written into an empty cache."""
    tokens = q.shape[1]
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(k)
    parts = []
    for begin in range(0, tokens, chunk):
        new = slice(begin, min(begin + chunk, tokens))
        _, indices = topk_attn.topk_attn_with_kvcache(
            q[:, new],
            k_cache,
            v_cache,
            k[:, new],
            k[:, new],
            cache_seqlens=torch.tensor([begin], dtype=torch.int32),
            return_indices=True,
            **budget,
        )
        parts.append(_mask(indices[0], tokens))
    return torch.cat(parts, dim=1)


def paged_decode_sets(q: Tensor, k: Tensor, budget: dict) -> Tensor:
    """bool (H, T, T): token-by-token decode with the cache in pages of a shuffled order."""
    tokens = q.shape[1]
    pages = -(-tokens // _PAGE)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    k_pages = torch.zeros(pages, _PAGE, *k.shape[2:], dtype=k.dtype)
    v_pages = torch.zeros_like(k_pages)
    parts = []
    for t in range(tokens):
        _, indices = topk_attn.topk_attn_with_kvcache(
            q[:, t : t + 1],
            k_pages,
            v_pages,
            k[:, t : t + 1],
            k[:, t : t + 1],
            cache_seqlens=torch.tensor([t], dtype=torch.int32),
            block_table=order[None],
            return_indices=True,
            **budget,
        )
        parts.append(_mask(indices[0], tokens))
    return torch.cat(parts, dim=1)


def _pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (1, T, heads, D) between a half of itself and a third of itself, reversed: (total, heads, D),
    cu_seqlens.
    """
    tokens = x.shape[1]
    before, after = tokens // 2, tokens // 3
    packed = torch.cat([x[0].flip(0)[:before], x[0], x[0].flip(0)[:after]])
    bounds = torch.tensor([0, before, before + tokens, before + tokens + after], dtype=torch.int32)
    return packed, bounds


def packed_sets(q: Tensor, k: Tensor, budget: dict) -> Tensor:
    """bool (H, T, T): the document's sets when it is packed between two others."""
    tokens = q.shape[1]
    (packed_q, bounds), (packed_k, _) = _pack(q), _pack(k)
    *_, indices = topk_attn.topk_select(
        packed_q,
        packed_k,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=tokens,
        max_seqlen_k=tokens,
        return_indices=True,
        **budget,
    )
    return _mask(indices[:, bounds[1] : bounds[2]], tokens)


def packed_output_difference(q: Tensor, k: Tensor, v: Tensor, budget: dict) -> float:
    """Largest difference of the document's outputs packed and alone, as a share of the largest output."""
    tokens = q.shape[1]
    (packed_q, bounds), (packed_k, _), (packed_v, _) = _pack(q), _pack(k), _pack(v)
    packed = topk_attn.topk_attn_varlen_func(
        packed_q, packed_k, packed_v, bounds, bounds, tokens, tokens, **budget
    )[bounds[1] : bounds[2]]
    alone = topk_attn.topk_attn_func(q, k, v, **budget)[0]
    return float((packed.double() - alone.double()).abs().max() / alone.double().abs().max())


# ----------------------------------------------------------------------------------------------------------
# C++ and Python
# ----------------------------------------------------------------------------------------------------------


def python_results(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, budget: dict) -> dict[str, Tensor]:
    """What `topk-parity` computes, by the Python functions: same calls, same names."""
    tokens = q.shape[1]
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = topk_attn.topk_attn_func(q, k, v, return_lse=True, **budget)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    q, k, v = q.detach(), k.detach(), v.detach()
    threshold, tie_index, indices = topk_attn.topk_select(q, k, return_indices=True, **budget)
    bounds = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    longest = tokens - tokens // 3
    varlen_out, varlen_lse = topk_attn.topk_attn_varlen_func(
        q[0], k[0], v[0], bounds, bounds, longest, longest, return_lse=True, **budget
    )
    decoded = [
        topk_attn.topk_attn_with_kvcache(
            q[:, t : t + 1],
            k,
            v,
            cache_seqlens=torch.tensor([t + 1], dtype=torch.int32),
            return_lse=True,
            return_indices=True,
            **budget,
        )
        for t in range(tokens)
    ]
    return {
        "out": out.detach(),
        "lse": lse.detach(),
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "threshold": threshold,
        "tie_index": tie_index,
        "indices": indices,
        "varlen_out": varlen_out,
        "varlen_lse": varlen_lse,
        "decode_out": torch.cat([step[0] for step in decoded], dim=1),
        "decode_lse": torch.cat([step[1] for step in decoded], dim=2),
        "decode_indices": torch.cat([step[2] for step in decoded], dim=2),
    }


def cpp_results(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, budget: dict) -> dict[str, Tensor]:
    """The same by the C++ functions, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="topk-parity-") as folder:
        given, made = Path(folder) / "given.safetensors", Path(folder) / "made.safetensors"
        tensors = {"q": q, "k": k, "v": v, "dout": dout}
        save_file(
            {name: x.detach().contiguous().clone() for name, x in tensors.items()},
            given,
            metadata={name: str(value) for name, value in budget.items()},
        )
        command = [native.program("topk-parity"), str(given), str(made)]
        subprocess.run(command, env=native.environment(), check=True)
        return load_file(made)


def compare_bytes(python: dict[str, Tensor], cpp: dict[str, Tensor]) -> tuple[int, int]:
    """(bytes compared, bytes that differ) over all results; raises if names, dtypes or shapes are not the
    same.
    """
    if set(python) != set(cpp):
        raise ValueError(f"results of C++ {sorted(cpp)} and of Python {sorted(python)} have different names")
    total = different = 0
    for name, x in python.items():
        y = cpp[name]
        if x.dtype != y.dtype or x.shape != y.shape:
            raise ValueError(f"{name}: C++ {y.dtype} {tuple(y.shape)}, Python {x.dtype} {tuple(x.shape)}")
        x, y = (z.contiguous().view(-1).view(torch.uint8) for z in (x, y))
        total += x.numel()
        different += int((x != y).sum())
    return total, different


# ----------------------------------------------------------------------------------------------------------
# One sequence, all paths
# ----------------------------------------------------------------------------------------------------------


def count(q: Tensor, k: Tensor, v: Tensor, budget: dict, *, cpp: bool = True) -> Counts:
    """Compares all paths on one sequence: q (1, T, H, D), k (1, T, Hkv, D), v (1, T, Hkv, Dv).

    Args:
        budget: keyword arguments of the attention functions: `topk` or `ratio`, `min_keys`, `select`,
        `sink`, ... cpp: also compare C++ with Python (needs the program `topk-parity`).
    """
    tokens = q.shape[1]
    *_, indices = topk_attn.topk_select(q, k, return_indices=True, **budget)
    reference = _mask(indices[0], tokens)
    found: dict[str, Callable[[], Tensor]] = {
        "training forward": lambda: forward_sets(q, k, budget),
        "training backward": lambda: backward_sets(q, k, budget),
        "prefill": lambda: prefill_sets(q, k, budget, tokens),
        "prefill in chunks": lambda: prefill_sets(q, k, budget, _CHUNK),
        "decode, contiguous cache": lambda: prefill_sets(q, k, budget, 1),
        "decode, paged cache": lambda: paged_decode_sets(q, k, budget),
        "packed with other documents": lambda: packed_sets(q, k, budget),
    }
    counts = Counts()
    for path, sets in found.items():
        differs = (sets() != reference).any(dim=-1)
        counts.rows[path] = differs.numel()
        counts.different[path] = int(differs.sum())
    counts.packed_difference = packed_output_difference(q, k, v, budget)
    if cpp:
        dout = torch.randn(*q.shape[:3], v.shape[-1], generator=torch.Generator().manual_seed(0)).to(q.dtype)
        counts.bytes, counts.bytes_different = compare_bytes(
            python_results(q, k, v, dout, budget), cpp_results(q, k, v, dout, budget)
        )
    return counts


# ----------------------------------------------------------------------------------------------------------
# Queries and keys
# ----------------------------------------------------------------------------------------------------------


def capture(
    model_folder: Path, text: str, tokens: int, layers: list[int]
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """q (1, T, H, D), k, v (1, T, Hkv, D) after RoPE, float32, of the given layers on the first `tokens` of
    `text`.
    """
    from transformers import AttentionInterface, AutoConfig

    captured = {}

    def record(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module.layer_idx in layers:
            captured[module.layer_idx] = tuple(x.transpose(1, 2).contiguous() for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("record_qkv", record)
    config = AutoConfig.from_pretrained(model_folder)
    if not layers or min(layers) < 0 or max(layers) >= config.num_hidden_layers:
        raise ValueError(f"layers must be in [0, {config.num_hidden_layers}), got {layers}")
    # Later layers do not change the earlier ones.
    model = load_model(model_folder, torch.float32, "record_qkv", layers=max(layers) + 1)
    ids = token_ids(model_folder, text[: tokens * 12])
    if ids.shape[1] < tokens:
        raise ValueError(f"the text has {ids.shape[1]} tokens, fewer than {tokens}")
    with torch.no_grad():
        model.model(ids[:, :tokens])
    return {layer: captured[layer] for layer in layers}


def permuted(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A constant query against keys that are channel permutations of one vector: exact arithmetic would tie
    all scores, so the kept set is decided by the order of the additions alone.
    """
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(head_dim, generator=generator)
    order = torch.rand(tokens * kv_heads, head_dim, generator=generator).argsort(dim=1)
    k = vector[order].reshape(1, tokens, kv_heads, head_dim)
    q = torch.full((1, tokens, heads, head_dim), 0.7)
    v = torch.randn(1, tokens, kv_heads, head_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def mixed_exponents(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
    """Random q and k whose channels have exponents from 2^-6 to 2^6."""
    generator = torch.Generator().manual_seed(2)

    def draw(rows: int) -> Tensor:
        shape = (1, tokens, rows, head_dim)
        exponent = torch.randint(-6, 7, shape, generator=generator).float()
        return (torch.randn(shape, generator=generator) * exponent.exp2()).to(dtype)

    return (
        draw(heads),
        draw(kv_heads),
        torch.randn(1, tokens, kv_heads, head_dim, generator=generator).to(dtype),
    )


def run(
    model_folder: Path, text: str, tokens: int, layers: list[int], budgets: list[dict], report=print
) -> dict[str, Counts]:
    """All sources of queries and keys, one line each; name of the source -> counts summed over layers and
    budgets.
    """
    sources: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    activations = capture(model_folder, text, tokens, layers)
    heads, kv_heads = activations[layers[0]][0].shape[2], activations[layers[0]][1].shape[2]
    head_dim = activations[layers[0]][0].shape[3]
    shape = (tokens // 2, heads, kv_heads, head_dim)
    for dtype, label in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        sources[f"model activations, {label}"] = [
            tuple(x.to(dtype) for x in activations[layer]) for layer in layers
        ]
        sources[f"permuted channels, {label}"] = [permuted(*shape, dtype)]
    sources["mixed exponents, bfloat16"] = [mixed_exponents(*shape, torch.bfloat16)]
    results = {}
    for name, sequences in sources.items():
        total = Counts()
        for q, k, v in sequences:
            for budget in budgets:
                total.add(count(q, k, v, budget))
        results[name] = total
        rows, different = sum(total.rows.values()), sum(total.different.values())
        report(
            f"  {name + ':':30s} {rows:8,d} rows on {len(PATHS)} paths, {different} differ; "
            f"C++ and Python: {total.bytes:11,d} bytes, {total.bytes_different} differ"
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m topk_attn.demo.parity", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--tokens", type=int, default=512, help="tokens of the sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", default="0,14,29", help="layers whose activations are used (default: %(default)s)"
    )
    parser.add_argument(
        "--ratio", type=float, default=0.05, help="share of the keys kept (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument(
        "--downloads", type=Path, default=download.default_folder(), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    text = "\n".join(download.essays(options.downloads).values())
    layers = [int(layer) for layer in options.layers.split(",")]
    folder = download.model(options.downloads)
    results = run(folder, text, options.tokens, layers, [{"ratio": options.ratio}])
    if options.json:
        options.json.write_text(
            json.dumps({name: c.as_dict() for name, c in results.items()}, indent=2) + "\n"
        )
    return 0 if all(counts.ok for counts in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
