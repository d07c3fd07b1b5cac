"""Whole-model helpers: switch a model to top-k attention, check that it is, and save it so that it stays
so."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from . import settings
from .registration import PAGED_NAME
from .settings import BLOCK, IMPLEMENTATION, NAME, Settings


def configure(model: Any, **arguments: Any) -> Any:
    """Switches a transformers model to top-k attention and returns it.

    Sets ``config.topk_attention`` and the attention implementation.

    Args:
        model: a transformers model whose attention goes through ``AttentionInterface``.
        **arguments: ``topk`` or ``ratio``, and any of ``min_keys``, ``max_keys``, ``select``, ``sink``,
            ``recent``, ``deterministic``, ``dense_layers``, ``prefill`` (see ``Settings``).

    Raises:
        ValueError: bad settings, an active sliding window, or a model that cannot change its attention. The
            model is then as it was.
    """
    config = _config(model)
    block = Settings.parse({"version": settings.VERSION, **arguments}).to_block()
    _refuse_unsupported(config)
    previous = getattr(config, BLOCK, None)
    setattr(config, BLOCK, block)
    try:
        settings.read(config)
        _set_implementation(model, NAME)
    except Exception:
        delattr(config, BLOCK)
        if previous is not None:
            setattr(config, BLOCK, previous)
        raise
    settings.keep_in_saves(config)
    return model


def unconfigure(model: Any, attn_implementation: str = "sdpa") -> Any:
    """Switches the model back to another attention and removes both keys from its config; returns it."""
    config = _config(model)
    _set_implementation(model, attn_implementation)
    for key in (BLOCK, IMPLEMENTATION):
        if key in vars(config):
            delattr(config, key)
    return model


def check(model: Any) -> Settings:
    """Fails unless the model runs top-k attention as its config says; returns the settings.

    A model loaded by code that dropped the implementation has ``config.topk_attention`` but runs dense
    attention without a word. Call this after loading and before measuring.

    Raises:
        RuntimeError: the config has the block but the implementation is another, or there is no block.
        ValueError: the block is invalid or the model has an active sliding window.
    """
    config = _config(model)
    if getattr(config, BLOCK, None) is None:
        raise RuntimeError(
            f"config.{BLOCK} is not set and the attention implementation is "
            f"{config._attn_implementation!r}: call topk_attn.hf.configure(model, ...) for top-k attention"
        )
    parsed = settings.read(config)
    for part in _configs_of_layers(model):
        if part._attn_implementation not in (NAME, PAGED_NAME):
            raise RuntimeError(
                f"config.{BLOCK} is set but the attention implementation is {part._attn_implementation!r}, "
                f"which is dense: load the model with attn_implementation={NAME!r}, or call "
                f"model.set_attn_implementation({NAME!r})"
            )
    _refuse_unsupported(config)
    return parsed


def save_pretrained(model: Any, directory: str | os.PathLike, **kwargs: Any) -> None:
    """``model.save_pretrained(directory, **kwargs)``, after which config.json surely has both keys.

    The folder then loads with ``from_pretrained(directory)`` into the same sparsity wherever topk_attn is
    imported, and raises, instead of running dense, where it is not.

    Raises:
        RuntimeError: the model does not run top-k attention (see ``check``).
    """
    check(model)
    model.save_pretrained(directory, **kwargs)
    write_keys(model.config, directory)


def write_keys(config: Any, directory: str | os.PathLike) -> None:
    """Puts ``attn_implementation`` and ``topk_attention`` of a configured model into
    ``directory``/config.json."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: save the model there first")
    content = json.loads(path.read_text(encoding="utf-8"))
    wanted = {IMPLEMENTATION: NAME, BLOCK: settings.read(config).to_block()}
    changed = {key: value for key, value in wanted.items() if content.get(key) != value}
    if not changed:
        return
    content.update(changed)
    # Written beside and renamed, so that a crash leaves the old file.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="config.", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _set_implementation(model: Any, name: str) -> None:
    model.set_attn_implementation(name)
    kept = _config(model)._attn_implementation
    if kept != name:
        raise ValueError(
            f"{type(model).__name__} kept the attention implementation {kept!r}: its layers do not use "
            "transformers' AttentionInterface; use topk_attn.patch_model instead"
        )


def _config(model: Any) -> Any:
    config = getattr(model, "config", None)
    if not hasattr(config, "_attn_implementation"):
        raise TypeError(f"model is a {type(model).__name__}: it must be a transformers model with a config")
    if hasattr(config, "get_text_config") and config.get_text_config() is not config:
        raise ValueError(
            f"{type(model).__name__} has a text config of its own: composite models are not supported as a "
            "whole; pass its language model"
        )
    return config


def _configs_of_layers(model: Any) -> list[Any]:
    """Every config that an attention layer of the model reads; they may have been replaced one by one."""
    found = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def _refuse_unsupported(config: Any) -> None:
    """Raises for a config whose layers use windows or capped scores; the attention itself refuses the
    rest."""
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        raise ValueError(
            f"config.attn_logit_softcapping is {cap}: topk_attn has no softcap and never ignores one"
        )
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        windowed = sorted({kind for kind in layer_types if kind != "full_attention"})
        if windowed:
            raise ValueError(
                f"config.layer_types has {', '.join(windowed)}: topk_attn takes full_attention layers only "
                "and never ignores a window"
            )
    elif getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"config.sliding_window is {config.sliding_window}: topk_attn does not combine top-k with a "
            "window and never ignores one; set config.sliding_window = None if the model is to attend to "
            "everything"
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(
            f"config.attention_chunk_size is {config.attention_chunk_size}: topk_attn never ignores a window"
        )
