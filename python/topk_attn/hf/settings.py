"""The block ``config.topk_attention``: how a checkpoint's attention is sparse.

    "topk_attention": {"version": 1, "ratio": 0.01, "min_keys": 64, "dense_layers": [0], "prefill": "topk"}

The keys are the argument names of the attention functions plus ``version``, ``dense_layers`` and ``prefill``.
The block is plain JSON, kept in the config and written to config.json by transformers itself.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

VERSION = 1
BLOCK = "topk_attention"
IMPLEMENTATION = "attn_implementation"
NAME = "topk_attn"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Checked settings of one model.

    Attributes:
        topk, ratio, min_keys, max_keys, select, sink, recent, deterministic: as in ``topk_attn_func``.
        dense_layers: indices of layers whose attention stays dense (torch's SDPA).
        prefill: ``"topk"``: every row is sparse, in training, prefill and decode. ``"dense"``: calls with
            more than one query row per sequence are dense and only decode steps are sparse (the paper's
            decoding experiment); training in that mode raises.
    """

    topk: int | None = None
    ratio: float | None = None
    min_keys: int = 1
    max_keys: int | None = None
    select: str = "head"
    sink: int = 0
    recent: int = 0
    deterministic: bool = False
    dense_layers: tuple[int, ...] = ()
    prefill: str = "topk"

    @staticmethod
    def parse(block: Any) -> Settings:
        """Settings from a config block. Raises ValueError that names the key, its value and what it must
        be."""
        if not isinstance(block, Mapping):
            raise ValueError(
                f"config.{BLOCK} is {block!r}: it must be a dict like {{'version': 1, 'ratio': 0.01}}"
            )
        for key in block:
            if key not in _CHECKS:
                near = difflib.get_close_matches(str(key), _CHECKS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"config.{BLOCK} has the unknown key {key!r}{hint} Known keys: {', '.join(_CHECKS)}"
                )
        if "version" not in block:
            raise ValueError(f"config.{BLOCK} has no 'version': it must be {VERSION}")
        for key, value in block.items():
            check, must = _CHECKS[key]
            if not check(value):
                raise ValueError(f"config.{BLOCK}[{key!r}] is {value!r}: it must be {must}")
        given = {key: value for key, value in block.items() if key != "version"}
        if (given.get("topk") is None) == (given.get("ratio") is None):
            raise ValueError(
                f"config.{BLOCK} has topk={given.get('topk')!r} and ratio={given.get('ratio')!r}: exactly "
                "one of them must be given"
            )
        given["dense_layers"] = tuple(given.get("dense_layers") or ())
        settings = Settings(**given)
        if settings.max_keys is not None and settings.min_keys > settings.max_keys:
            raise ValueError(
                f"config.{BLOCK} has min_keys={settings.min_keys} above max_keys={settings.max_keys}: "
                "min_keys must be at most max_keys"
            )
        return settings

    def to_block(self) -> dict[str, Any]:
        """The JSON block: ``version`` and every setting that is not the default."""
        block: dict[str, Any] = {"version": VERSION}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                block[field.name] = list(value) if isinstance(value, tuple) else value
        return block

    def selection(self) -> dict[str, Any]:
        """The arguments every attention function takes."""
        return {
            "topk": self.topk,
            "ratio": self.ratio,
            "min_keys": self.min_keys,
            "max_keys": self.max_keys,
            "select": self.select,
            "sink": self.sink,
            "recent": self.recent,
            "deterministic": self.deterministic,
        }


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at_least(low: int, none: bool = False):
    return lambda value: (none and value is None) or (_is_int(value) and value >= low)


def _is_ratio(value: Any) -> bool:
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
    )


def _is_layer_list(value: Any) -> bool:
    return value is None or (
        isinstance(value, (list, tuple))
        and all(_is_int(x) and x >= 0 for x in value)
        and len(set(value)) == len(value)
    )


_CHECKS = {
    "version": (
        lambda value: _is_int(value) and value == VERSION,
        f"{VERSION}, the version this release reads",
    ),
    "topk": (_at_least(1, none=True), "an integer >= 1"),
    "ratio": (_is_ratio, "a number above 0 and at most 1"),
    "min_keys": (_at_least(1), "an integer >= 1"),
    "max_keys": (_at_least(1, none=True), "an integer >= 1"),
    "select": (lambda value: value in ("head", "kv_group"), "'head' or 'kv_group'"),
    "sink": (_at_least(0), "an integer >= 0"),
    "recent": (_at_least(0), "an integer >= 0"),
    "deterministic": (lambda value: isinstance(value, bool), "true or false"),
    "dense_layers": (_is_layer_list, "a list of distinct layer indices >= 0"),
    "prefill": (lambda value: value in ("topk", "dense"), "'topk' or 'dense'"),
}


def read(config: Any) -> Settings:
    """Settings of a model config. Raises ValueError with what to do when the block is missing."""
    block = getattr(config, BLOCK, None)
    if block is None:
        raise ValueError(
            f"attn_implementation is 'topk_attn' but config.{BLOCK} is not set: call "
            f"topk_attn.hf.configure(model, ratio=0.01), or put {{'version': 1, 'ratio': 0.01}} in "
            f"config.{BLOCK} before the first forward"
        )
    settings = Settings.parse(block)
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and any(index >= layers for index in settings.dense_layers):
        raise ValueError(
            f"config.{BLOCK}['dense_layers'] is {list(settings.dense_layers)}: the model has {layers} "
            f"layers, so indices must be below {layers}"
        )
    return settings


def keep_in_saves(config: Any) -> None:
    """Makes every later ``save_pretrained``, also transformers' own, write the implementation beside the
    block.

    transformers drops the implementation when it saves, after which the model would load dense without a
    word; but it writes public attributes of the config. Called for each forward of a model with the block, so
    that a model that was merely loaded keeps it too.
    """
    if getattr(config, BLOCK, None) is not None and vars(config).get(IMPLEMENTATION) != NAME:
        setattr(config, IMPLEMENTATION, NAME)
