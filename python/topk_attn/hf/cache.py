"""TopKCache: transformers' cache interface over KVCache, so that ``generate`` decodes from pages.

The keys of a step are written into their pages and read there: nothing is concatenated, beams and repeated
sequences share pages, and crop gives pages back. ``update`` returns the new rows with a note where they
belong (NewRows); the attention function does the rest through ``write`` and ``attend``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..kv_cache import KVCache
from .new_rows import NewRows


class TopKCache(Cache):
    """A cache of pages for models with ``attn_implementation="topk_attn"``::

        cache = topk_attn.hf.TopKCache(model.config, max_length=4096)
        model.generate(**inputs, past_key_values=cache)

    Sets and outputs are those of ``DynamicCache``. Decode steps and drafts of up to 16 tokens read the pages
    in place. Longer pieces that continue a cache, padding that is not on the left, and layers or calls that
    are configured dense read a copy of the rows (or a view, where the pages lie in a row).

    Args:
        config: the model's config; every layer must have full attention.
        max_length: most tokens of a sequence, prompt and new ones.
        page_size: tokens of a page.
        pages: room for all sequences; default: enough for ``max_length`` tokens of each sequence of the first
            call. Repeating the batch afterwards (``batch_repeat_interleave``) may need more.
        key_codes: keep the int8 copy of keys for the certified scan (CUDA, see ``topk_attn.KVCache``).

    Attributes:
        kv: the ``topk_attn.KVCache``, None before the first call.
        handles: its sequences, row by row.

    Raises:
        ValueError: layers of another kind, gradients, or another attention implementation that tries to read
            what ``update`` returned.
        RuntimeError: no room; the message says how many pages are missing.
    """

    def __init__(
        self,
        config: Any,
        max_length: int,
        *,
        page_size: int = 64,
        pages: int | None = None,
        key_codes: bool = False,
    ) -> None:
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        kinds = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
        if kinds:
            raise ValueError(
                f"config.layer_types has {', '.join(kinds)}: TopKCache takes full_attention layers only"
            )
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        super().__init__(layers=[_Layer(self) for _ in range(config.num_hidden_layers)])
        self.max_length, self.page_size, self.pages, self.key_codes = max_length, page_size, pages, key_codes
        self.kv: KVCache | None = None
        self.handles: list[int] = []
        self._past = 0
        self._rows = 0  # of the step in progress
        self._updated: set[int] = set()  # layers that brought rows in this step
        self._written: set[int] = set()  # layers whose rows are in the pages

    def __repr__(self) -> str:
        return f"TopKCache({self.kv!r}, {len(self.handles)} rows of {self._past} tokens)"

    # ----- what the model calls

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New rows (B, Hkv, T, .) of a layer. Returns them as they are; the attention writes and reads."""
        del args, kwargs
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "the keys require a gradient: TopKCache has none; call the model under torch.no_grad()"
            )
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"layer_idx is {layer_idx}: the cache was made for {len(self.layers)} layers")
        if not self._updated or layer_idx in self._updated:
            self._begin(key_states, value_states)
        if (key_states.shape[0], key_states.shape[2]) != (len(self.handles), self._rows):
            raise ValueError(
                f"layer {layer_idx} brings keys of sizes {tuple(key_states.shape)}: the layers before it "
                f"brought {self._rows} rows of {len(self.handles)} sequences"
            )
        self._updated.add(layer_idx)
        return NewRows.of(key_states, self, layer_idx), value_states

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        """A new step; one that was broken off is forgotten, its rows are written over."""
        self._updated, self._written, self._rows = set(), set(), 0
        self._allocate(keys, values)
        batch, _, rows, _ = keys.shape
        if batch != len(self.handles):
            raise ValueError(f"the call has {batch} sequences, but the cache holds {len(self.handles)}")
        self.kv.reserve(self.handles, rows)
        self._rows = rows

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        batch, kv_heads, _, head_dim = keys.shape
        if self.kv is None:
            pages = self.pages or batch * -(-self.max_length // self.page_size)
            self.kv = KVCache(
                len(self.layers),
                kv_heads,
                head_dim,
                values.shape[-1],
                pages=pages,
                page_size=self.page_size,
                max_length=self.max_length,
                dtype=keys.dtype,
                device=keys.device,
                key_codes=self.key_codes,
            )
        if not self.handles:
            self.handles = [self.kv.add() for _ in range(batch)]

    # ----- what the attention calls

    @property
    def past(self) -> int:
        """Tokens before the step in progress."""
        return self._past

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new rows (B, T, Hkv, .) and returns all rows of the layer, (B, past + T, Hkv, .)."""
        self.kv.append(layer, k, v)
        if self._past:
            k, v = self.kv.rows(layer, self._past + self._rows)
        self._finish(layer)
        return k, v

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, leftpad: Tensor | None, **settings: Any
    ) -> Tensor:
        """Writes the new rows and attends to all rows in their pages."""
        out = self.kv.append_and_attend(layer, q, k, v, cache_leftpad=leftpad, **settings)
        self._finish(layer)
        return out

    def _finish(self, layer: int) -> None:
        self._written.add(layer)
        if len(self._written) == len(self.layers):
            self.kv.advance(self._rows)
            self._past += self._rows
            self._updated, self._written, self._rows = set(), set(), 0

    # ----- what generate calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._past + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:  # the name in earlier releases
        return self.max_length

    @property
    def batch_size(self) -> int:
        return len(self.handles) or -1

    def early_initialization(self, batch_size, num_heads, head_dim, dtype, device) -> None:
        made = torch.empty(batch_size, num_heads, 0, head_dim, dtype=dtype, device=device)
        self._allocate(made, made)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was; pages are shared until they are written."""
        self.kv.reorder(self.handles, beam_idx.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens of every row; their pages are free again."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}: it must be 0 or negative, the number of tokens to "
                "forget"
            )
        if tokens_to_remove == 0 or not self.handles:
            return
        if -tokens_to_remove > self._past:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}, but the cache holds {self._past} tokens"
            )
        self._past += tokens_to_remove
        for handle in self.handles:
            self.kv.truncate(handle, self._past)

    def reset(self) -> None:
        """Empties the cache; the memory is kept for the next call."""
        if self.kv is not None:
            self.kv.clear()
        self.handles, self._past = [], 0
        self._updated, self._written, self._rows = set(), set(), 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, in pages that they share."""
        self.handles = [
            copy
            for handle in self.handles
            for copy in (handle, *(self.kv.fork(handle) for _ in range(repeats - 1)))
        ]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that ``indices`` (numbers or a bool mask) name."""
        rows = torch.arange(len(self.handles))[indices.cpu()].tolist()
        kept = [self.kv.fork(self.handles[row]) for row in rows]
        for handle in self.handles:
            self.kv.remove(handle)
        self.handles = kept


class _Layer(CacheLayerMixin):
    """A layer's view of the cache, for code that asks layer by layer. What changes the whole batch is done by
    the cache itself."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: TopKCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("TopKCache allocates all layers at once")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        index = next(i for i, layer in enumerate(self._cache.layers) if layer is self)
        return self._cache.update(key_states, value_states, index)

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self._cache.max_length

    def get_max_cache_shape(self) -> int:
        return self._cache.max_length
