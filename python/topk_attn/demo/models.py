"""Loading a model by transformers, without its progress bars and load report."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


@contextlib.contextmanager
def _quiet():
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_model(
    folder: Path, dtype: torch.dtype, attn_implementation: str = "sdpa", layers: int | None = None
):
    """The causal language model of a Hugging Face folder, for inference.

    Args:
        attn_implementation: the attention to use, whatever the folder's config says.
        layers: only the first so many decoder layers; None: all.
    """
    from transformers import AutoModelForCausalLM

    changes = {} if layers is None else {"num_hidden_layers": layers}
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn_implementation, **changes
        )
    return model.eval()


def token_ids(folder: Path, text: str) -> torch.Tensor:
    """(1, T) ids of a text by the folder's tokenizer."""
    from transformers import AutoTokenizer

    with _quiet():
        return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
