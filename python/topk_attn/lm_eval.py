"""``python -m topk_attn.lm_eval ...``: lm-eval-harness on a top-k model, refusing to evaluate a dense one.

All arguments are the harness's own:

    python -m topk_attn.lm_eval --model hf --model_args pretrained=DIR --tasks hellaswag

Importing topk_attn registers the attention; every model that the harness loads must pass
``topk_attn.hf.check``.
"""

from __future__ import annotations

import functools
import sys

from . import hf


def check_every_model(model_class: type) -> None:
    """Makes the harness's Hugging Face model class check each model it has loaded."""
    create = model_class.__init__

    @functools.wraps(create)
    def checked(self, *args, **kwargs):
        create(self, *args, **kwargs)
        settings = hf.check(self.model)
        print(f"topk_attn: evaluating with {settings.to_block()}", file=sys.stderr)

    model_class.__init__ = checked


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise SystemExit(f"topk_attn.lm_eval needs the harness, `pip install lm-eval`: {error}") from None
    check_every_model(HFLM)
    cli_evaluate()


if __name__ == "__main__":
    main()
