"""transformers integration: ``attn_implementation="topk_attn"`` with the settings in
``config.topk_attention``.

    import topk_attn
    model = AutoModelForCausalLM.from_pretrained(folder)
    topk_attn.hf.configure(model, ratio=0.01, min_keys=64)      # top-k everywhere, training included
    topk_attn.hf.save_pretrained(model, "out")                  # loads with the same sparsity
    topk_attn.hf.check(model)                                   # raises if it would run dense

This package needs transformers only when one of its functions does; importing topk_attn does not import it.
"""

from .attention import topk_attention_forward
from .masks import topk_attention_mask
from .model import check, configure, save_pretrained, unconfigure, write_keys
from .registration import PAGED_NAME, register
from .settings import NAME, Settings

__all__ = [
    "NAME",
    "PAGED_NAME",
    "SaveTopkAttention",
    "Settings",
    "TopKCache",
    "check",
    "configure",
    "register",
    "save_pretrained",
    "topk_attention_forward",
    "topk_attention_mask",
    "unconfigure",
    "write_keys",
]


def __getattr__(name: str):
    # These derive from transformers classes, which take seconds to import.
    if name == "SaveTopkAttention":
        from .callback import SaveTopkAttention

        return SaveTopkAttention
    if name == "TopKCache":
        from .cache import TopKCache

        return TopKCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
