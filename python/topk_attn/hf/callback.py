"""A transformers Trainer callback that keeps both config keys in every checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

from . import model as _model
from .settings import keep_in_saves


class SaveTopkAttention(TrainerCallback):
    """Keeps ``attn_implementation`` and ``topk_attention`` in the config.json of everything the Trainer
    saves.

    ``Trainer(..., callbacks=[topk_attn.hf.SaveTopkAttention()])``. At the start of training it checks that
    the model runs top-k attention, so that a run cannot be dense by mistake.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = _unwrap(model)
        _model.check(model)
        # Also for saves that no callback sees, such as trainer.save_model().
        keep_in_saves(model.config)

    def on_save(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if (folder / "config.json").is_file():
            _model.write_keys(_unwrap(model).config, folder)


def _unwrap(model):
    """The transformers model inside DistributedDataParallel and the like."""
    while not hasattr(model, "config") and hasattr(model, "module"):
        model = model.module
    return model
