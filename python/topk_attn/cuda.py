"""Which CUDA kernels serve a call, and how to ask for others.

Every choice computes the same sets; they differ in speed and in the GPUs that they run on. The rules are
those of csrc/kernels/cuda/plan.h:

- build: "plain" (float32), "portable" (bf16 and fp16, every GPU since compute capability 8.0), "sm90" (H100,
  H200);
- selection: "slab" (scores of a few query tiles in a reused buffer) or "fused" (inside the product);
- largest_share: a query tile whose union of kept keys is at most this share of the keys that it sees is
  served by the gathered kernels, the others by masked dense ones. 0: no tile is gathered.

Decoding has a choice of its own (csrc/kernels/cuda/decode/plan.h):

- scan: "exact" reads K; "certified" reads key codes, an int8 copy of K that the caller keeps beside the cache
  (`new_key_codes`), half the bytes, and proves for every row that the set is the same. docs/decode.md has the
  proof, and what it needs.
"""

import contextlib
from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """What serves a call."""

    build: str
    selection: str
    forward_share: float
    backward_share: float


def available() -> bool:
    """Whether this build of the library has CUDA kernels."""
    return hasattr(torch.ops.topk_attn, "_cuda_plan")


def _operators():
    if not available():
        raise RuntimeError("topk_attn was built without CUDA kernels (TOPK_CUDA): see docs/install.md")
    return torch.ops.topk_attn


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    causal: bool = True,
    topk: int | None = None,
    ratio: float | None = None,
    min_keys: int = 1,
    max_keys: int | None = None,
    select: str = "head",
    sink: int = 0,
    recent: int = 0,
    deterministic: bool = False,
) -> Plan:
    """The plan of `topk_attn_func` (or, without v, `topk_select`) for these CUDA tensors, under the current
    override.

    q (B, Tq, H, D), k (B, Tk, Hkv, D), v (B, Tk, Hkv, Dv). Raises RuntimeError with the reason where an
    override asks for what cannot be done.
    """
    return Plan(
        *_operators()._cuda_plan(
            q,
            k,
            v,
            causal=causal,
            topk=topk,
            ratio=ratio,
            min_keys=min_keys,
            max_keys=max_keys,
            select=select,
            sink=sink,
            recent=recent,
            deterministic=deterministic,
        )
    )


_current = ("", "", -1.0)
_current_decode = ("", 0)


@contextlib.contextmanager
def override(
    build: str | None = None,
    selection: str | None = None,
    largest_share: float | None = None,
    *,
    scan: str | None = None,
    list_room: int | None = None,
):
    """Asks for kernels, process-wide, until the block ends; None leaves a choice to the library.

    `scan` and `list_room` are of decoding alone. list_room limits the lists of the certified scan, so that
    rows take its fallback: for tests.

    A call that the wish cannot serve raises RuntimeError with the reason: nothing is replaced silently.
    """
    global _current, _current_decode
    before, before_decode = _current, _current_decode
    wish = (build or "", selection or "", -1.0 if largest_share is None else float(largest_share))
    if wish[2] > 1.0 or (largest_share is not None and not wish[2] >= 0.0):
        raise ValueError(f"largest_share must be between 0 and 1, got {largest_share}")
    if list_room is not None and list_room < 1:
        raise ValueError(f"list_room must be at least 1, got {list_room}")
    decode_wish = (scan or "", list_room or 0)
    _operators()._cuda_override(*wish)
    _operators()._cuda_override_decode(*decode_wish)
    _current, _current_decode = wish, decode_wish
    try:
        yield
    finally:
        _operators()._cuda_override(*before)
        _operators()._cuda_override_decode(*before_decode)
        _current, _current_decode = before, before_decode


def last_plan() -> Plan:
    """The plan of the last forward or selection that ran on CUDA in this process."""
    return Plan(*_operators()._cuda_last_plan())


# ------------------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------------------


class DecodePlan(NamedTuple):
    """Which scan serves a call of `topk_attn_with_kvcache`, and why."""

    scan: str
    reason: str


def decode_plan(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    key_codes: torch.Tensor | None = None,
    causal: bool = True,
    topk: int | None = None,
    ratio: float | None = None,
    min_keys: int = 1,
    max_keys: int | None = None,
    select: str = "head",
    sink: int = 0,
    recent: int = 0,
) -> DecodePlan:
    """The plan of `topk_attn_with_kvcache` for these CUDA tensors, under the current override.

    Lengths are on the device, so it goes by what the cache has room for. Raises RuntimeError with the reason
    where an override asks for what cannot be done.
    """
    return DecodePlan(
        *_operators()._cuda_decode_plan(
            q,
            k_cache,
            v_cache,
            block_table,
            key_codes,
            causal=causal,
            topk=topk,
            ratio=ratio,
            min_keys=min_keys,
            max_keys=max_keys,
            select=select,
            sink=sink,
            recent=recent,
        )
    )


def new_key_codes(k_cache: torch.Tensor) -> torch.Tensor:
    """A flat int8 buffer for the codes of a cache (B, S, Hkv, D) or of pages (P, page, Hkv, D); bfloat16 or
    float16, D up to 128.

    It knows no key yet: keys that it does not know are looked at exactly. `topk_attn_with_kvcache` with
    `key_codes` encodes the rows that it writes; rows that are written by anything else must be encoded by
    `rebuild_key_codes` before the next call.
    """
    return torch.ops.topk_attn.key_codes_new(k_cache)


def rebuild_key_codes(
    key_codes: torch.Tensor,
    k_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    *,
    calibrate: bool = True,
) -> None:
    """Makes the codes of all valid rows of these sequences, from the cache.

    calibrate: first fits the buffer to the keys of the first sequence that has some, so that fewer keys have
    to be looked at exactly, and forgets the codes of all rows of other sequences. Worth it once, after the
    first prefill.
    """
    torch.ops.topk_attn.key_codes_rebuild(
        key_codes, k_cache, cache_seqlens, cache_leftpad, block_table, calibrate=calibrate
    )


class KeyCodes(NamedTuple):
    """Views of a buffer of key codes. A block is an entry of a contiguous cache, or a page: its parts of
    codes and words can be copied to another block together with its keys."""

    codes: torch.Tensor  # (blocks, Hkv, rows, 64 or 128) int8
    words: torch.Tensor  # (blocks, Hkv, rows) int32: scale and bound; 0: the key is not known
    center: torch.Tensor  # (Hkv, 64 or 128) float32
    exponent: torch.Tensor  # (Hkv, 64 or 128) int32
    stats: torch.Tensor  # (8) int64: CertifiedStats, then zeros


def key_codes_views(key_codes: torch.Tensor, k_cache: torch.Tensor) -> KeyCodes:
    words, center, exponent, stats, size = torch.ops.topk_attn.key_codes_layout(k_cache)
    if key_codes.dtype != torch.int8 or tuple(key_codes.shape) != (size,):
        raise ValueError(
            f"key_codes must be int8 of {size} bytes for a k_cache of shape {tuple(k_cache.shape)}, got "
            f"{key_codes.dtype} of shape {tuple(key_codes.shape)}"
        )
    blocks, rows, heads, dim = k_cache.shape
    keys, width = blocks * heads * rows, 64 if dim <= 64 else 128
    return KeyCodes(
        key_codes[: keys * width].view(blocks, heads, rows, width),
        key_codes[words : words + 4 * keys].view(torch.int32).view(blocks, heads, rows),
        key_codes[center:exponent].view(torch.float32).view(heads, width),
        key_codes[exponent:stats].view(torch.int32).view(heads, width),
        key_codes[stats:].view(torch.int64),
    )


class CertifiedStats(NamedTuple):
    """What the certified scan did with a buffer of key codes since it was made, or reset."""

    rows: int  # query rows that had to select
    certified: int  # of these, served by the certificate; the others read all keys
    kept: int  # keys that the certified rows kept
    survivors: int  # keys that they looked at exactly
    listed: int  # keys that passed their first bound


def certified_stats(key_codes: torch.Tensor) -> CertifiedStats:
    """Reads the statistics; waits for the device."""
    return CertifiedStats(*_stats(key_codes).tolist())


def reset_certified_stats(key_codes: torch.Tensor) -> None:
    _stats(key_codes).zero_()


def _stats(key_codes: torch.Tensor) -> torch.Tensor:
    if key_codes.dtype != torch.int8 or key_codes.dim() != 1 or key_codes.numel() < 64:
        raise ValueError(
            f"key_codes must be as new_key_codes made it, got {key_codes.dtype} of shape "
            f"{tuple(key_codes.shape)}"
        )
    return key_codes[-64:].view(torch.int64)[: len(CertifiedStats._fields)]
