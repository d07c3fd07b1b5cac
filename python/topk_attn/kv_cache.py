"""KVCache: keys and values of all layers of a model in pages, for decoding with ``topk_attn_with_kvcache``.

The object itself is C++ (csrc/include/topk_attn/kv_cache.h), the one that topk-generate uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """What a cache holds. Bytes are those of the tensors, used or not."""

    k_bytes: int
    v_bytes: int
    code_bytes: int  # int8 copy of K
    table_bytes: int  # block tables and lengths on the device
    pages: int
    used_pages: int
    shared_pages: int  # of these, in more than one sequence
    free_pages: int
    sequences: int
    tokens: int  # of all sequences; shared ones count for each


class KVCache:
    """Pages of keys and values that sequences share where they agree.

    A sequence is a handle (an int). Its pages and its length are the same in every layer. ``fork`` and
    ``reorder`` share pages; one that is shared is copied, all layers at once, when one of the sharers writes
    to it. A step of a model that brings T new tokens to each of some sequences, the batch::

        cache.reserve(sequences, T)
        for layer in range(layers):
            out = cache.append_and_attend(layer, q, k, v, ratio=0.01)
        cache.advance(T)

    Nothing is written outside the pages that ``reserve`` gave to the batch, and no call waits for the device.
    ``cache.lengths`` before ``advance`` are the positions of the new tokens. Errors are raised before
    anything changes. Not thread-safe; no gradients.

    CUDA graphs: ``block_table`` and ``lengths`` of a batch size and the pages never move. Reserve room for
    many steps, capture ``append_and_attend`` of all layers together with ``advance(T)``, and after every
    replay but the first (the capture counted that one) call ``advance(T, on_device=False)``. ``reserve``,
    ``fork`` and the like are for between replays; the batch must stay the same.

    Args:
        layers: number of layers.
        kv_heads, head_dim, v_dim: of each layer; v_dim defaults to head_dim. Multiples of 8 up to 256.
        pages: room for all sequences together, in pages of ``page_size`` tokens.
        page_size: 16 to 256 are fast, any is right.
        max_length: most tokens of a sequence; default all pages. Decides the width of the block table, and
            with it the width of index lists and the split of the work: do not ask for more than is needed.
        dtype, device: of the pages.
        key_codes: keep an int8 copy of the keys, with which the certified scan reads half as much and keeps
            the same sets (docs/decode.md). CUDA, bfloat16 and float16, head_dim up to 128. The copy is fitted
            to the keys by the first ``advance``.
        k_pages, v_pages: instead of layers to page_size, dtype and device: memory to use, (layers, pages,
            page_size, kv_heads, head_dim) and likewise with v_dim; the pages of a layer contiguous.

    Raises:
        ValueError: a bad argument, which the message names.
        RuntimeError: key codes where there are none (CPU, other dtypes).
    """

    def __init__(
        self,
        layers: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        v_dim: int | None = None,
        *,
        pages: int | None = None,
        page_size: int = 64,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        key_codes: bool = False,
        k_pages: Tensor | None = None,
        v_pages: Tensor | None = None,
    ) -> None:
        if (k_pages is None) != (v_pages is None):
            raise ValueError("k_pages and v_pages: give both or neither")
        if k_pages is None:
            sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "pages": pages}
            for name, value in {**sizes, "page_size": page_size}.items():
                if value is None or value < 1:
                    raise ValueError(f"{name} must be at least 1, got {value}")
            v_dim = head_dim if v_dim is None else v_dim
            for name, value in (("head_dim", head_dim), ("v_dim", v_dim)):
                if value % 8 or not 8 <= value <= 256:
                    raise ValueError(f"{name} must be a multiple of 8 from 8 to 256, got {value}")
            k_pages, v_pages = (
                torch.empty(layers, pages, page_size, kv_heads, dim, dtype=dtype, device=device)
                for dim in (head_dim, v_dim)
            )
        elif any(x is not None for x in (layers, kv_heads, head_dim, v_dim, pages)):
            raise ValueError(
                "k_pages and v_pages are given: layers, kv_heads, head_dim, v_dim and pages are theirs"
            )
        for name, value in (("k_pages", k_pages), ("v_pages", v_pages)):
            if value.dim() != 5:
                raise ValueError(
                    f"{name} must be (layers, pages, page_size, kv_heads, head dim), got {tuple(value.shape)}"
                )
        self.layers, self.pages, self.page_size, self.kv_heads, self.head_dim = k_pages.shape
        self.v_dim = v_pages.shape[-1]
        self.dtype, self.device = k_pages.dtype, k_pages.device
        self._cache = torch.classes.topk_attn.KVCache(k_pages, v_pages, max_length or 0, key_codes)
        self.max_length: int = self._cache.max_length()
        self.has_key_codes = key_codes

    def __repr__(self) -> str:
        memory = self.memory()
        return (
            f"KVCache({memory.sequences} sequences, {memory.used_pages} of {self.pages} pages of "
            f"{self.page_size} tokens, {self.layers} layers, {self.dtype}, {self.device})"
        )

    # ----- sequences

    def add(self) -> int:
        """A new, empty sequence. Handles are never used twice."""
        return self._cache.add()

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that starts with the first ``length`` tokens (default: all) of another. Takes no
        page until it is written to."""
        return self._cache.fork(sequence, self.length(sequence) if length is None else length)

    def truncate(self, sequence: int, length: int) -> None:
        """Keeps the first ``length`` tokens; pages beyond them are free again."""
        self._cache.truncate(sequence, length)

    def remove(self, sequence: int) -> None:
        """Forgets a sequence; pages that nobody else has are free again."""
        self._cache.remove(sequence)

    def clear(self) -> None:
        """Forgets all sequences."""
        self._cache.clear()

    def reorder(self, sequences: Sequence[int], order: Sequence[int]) -> None:
        """Beam search: ``sequences[i]`` becomes what ``sequences[order[i]]`` was. The handles stay; an entry
        of ``order`` may appear several times, and what no entry names is gone."""
        self._cache.reorder(list(sequences), list(order))

    def length(self, sequence: int) -> int:
        """Tokens of a sequence; those of a step count from ``advance`` on."""
        return self._cache.length(sequence)

    def pages_of(self, sequence: int) -> list[int]:
        """Page numbers of a sequence, reserved ones included."""
        return self._cache.pages_of(sequence)

    @property
    def sequences(self) -> list[int]:
        """Handles of all sequences, ascending."""
        return self._cache.sequences()

    # ----- a step

    def reserve(self, sequences: Sequence[int], rows: int) -> None:
        """Makes ``sequences`` (all different) the batch and finds room for ``rows`` more tokens of each.

        Raises:
            RuntimeError: not enough free pages; the message says how many are missing.
            ValueError: a handle that is unknown or given twice, or a sequence beyond ``max_length``.
        """
        self._cache.reserve(list(sequences), rows)

    @property
    def batch(self) -> list[int]:
        """The sequences of the last ``reserve``."""
        return self._cache.batch()

    @property
    def reserved_rows(self) -> int:
        """Rows that each sequence of the batch may still get before the next ``reserve``."""
        return self._cache.reserved_rows()

    @property
    def block_table(self) -> Tensor:
        """Of the batch, int32 (B, max_length / page_size); unused entries are 0."""
        return self._cache.block_table()

    @property
    def lengths(self) -> Tensor:
        """Of the batch, int32 (B), without the rows of the present step. Do not write to it."""
        return self._cache.lengths()

    def append_and_attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cache_leftpad: Tensor | None = None,
        causal: bool = True,
        topk: int | None = None,
        ratio: float | None = None,
        min_keys: int = 1,
        max_keys: int | None = None,
        select: str = "head",
        sink: int = 0,
        recent: int = 0,
        softmax_scale: float | None = None,
        deterministic: bool = False,
        return_lse: bool = False,
        return_indices: bool = False,
        return_slots: bool = False,
        return_encoding: bool = False,
    ) -> Tensor | tuple:
        """Writes the new rows at the end of the batch's sequences and attends to all their tokens.

        Args:
            layer: 0 to layers - 1.
            q: (B, Tq, H, D), the last Tq tokens of each sequence.
            k, v: (B, T, Hkv, D or Dv), new rows; ``reserve`` must have found room for them.
            cache_leftpad: int32 (B), leading tokens that are padding.

        Returns:
            As ``topk_attn_with_kvcache``: out (B, Tq, H, Dv), or a tuple with what was asked for.

        Raises:
            ValueError: a bad layer, rows of another shape or dtype than the cache, or rows without room.
            RuntimeError: what ``topk_attn_with_kvcache`` refuses.
        """
        del deterministic
        settings = (topk, ratio, min_keys, max_keys, select, sink, recent, softmax_scale, causal)
        lists = return_indices or return_slots
        results = self._cache.append_and_attend(layer, q, k, v, cache_leftpad, lists, *settings)
        return _wanted(results, return_lse, return_indices, return_slots, return_encoding)

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        cache_leftpad: Tensor | None = None,
        causal: bool = True,
        topk: int | None = None,
        ratio: float | None = None,
        min_keys: int = 1,
        max_keys: int | None = None,
        select: str = "head",
        sink: int = 0,
        recent: int = 0,
        softmax_scale: float | None = None,
        deterministic: bool = False,
        return_lse: bool = False,
        return_indices: bool = False,
        return_slots: bool = False,
        return_encoding: bool = False,
    ) -> Tensor | tuple:
        """As ``append_and_attend``, with the tokens that are there and no new ones."""
        del deterministic
        settings = (topk, ratio, min_keys, max_keys, select, sink, recent, softmax_scale, causal)
        lists = return_indices or return_slots
        results = self._cache.attend(layer, q, cache_leftpad, lists, *settings)
        return _wanted(results, return_lse, return_indices, return_slots, return_encoding)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes new rows (B, T, Hkv, .) without attending, for a prefill by ``topk_attn_func``."""
        self._cache.append(layer, k, v)

    def advance(self, rows: int, on_device: bool = True) -> None:
        """Counts ``rows`` tokens of each sequence of the batch, after all layers have written them.

        ``on_device=False``: a replayed CUDA graph counted them on the device.
        """
        self._cache.advance(rows, on_device)

    # ----- contents

    def k_pages(self, layer: int) -> Tensor:
        """(pages, page_size, Hkv, D), the memory itself."""
        return self._cache.k_pages(layer)

    def v_pages(self, layer: int) -> Tensor:
        """(pages, page_size, Hkv, Dv), the memory itself."""
        return self._cache.v_pages(layer)

    def rows(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` rows of every sequence of the batch, k (B, length, Hkv, D) and v: views where
        the pages lie in a row, else copies. What is beyond a sequence's end is not initialised."""
        return self._cache.rows(layer, length)

    def key_codes(self, layer: int) -> Tensor:
        """The buffer of a layer's int8 copy (``topk_attn.cuda.key_codes_views``)."""
        return self._cache.key_codes(layer)

    def calibrate(self) -> None:
        """Fits the int8 copy to the keys that are there and makes that of all sequences again. The first
        ``advance`` does it by itself."""
        self._cache.calibrate()

    def memory(self) -> Memory:
        """Bytes and pages, in use and in all."""
        return Memory(*self._cache.memory())

    def check(self) -> None:
        """Raises RuntimeError if the page accounting contradicts itself; for tests."""
        self._cache.check()


def _wanted(results: tuple, lse: bool, indices: bool, slots: bool, encoding: bool) -> Tensor | tuple:
    out, *rest = results
    offered = ((lse, rest[0]), (indices, rest[1]), (slots, rest[2]), (encoding, (rest[3], rest[4])))
    extra = tuple(value for asked, value in offered if asked)
    return (out, *extra) if extra else out
