"""topk_attn: exact top-k sparse attention for PyTorch.

Importing the package loads the operators (``torch.ops.topk_attn.*``) and registers the attention
implementation ``"topk_attn"`` with transformers, whichever of the two is imported first. See
``topk_attn.functional`` for the functions, ``topk_attn.nn`` for a module, ``topk_attn.sdpa`` for swapping
torch's SDPA and ``topk_attn.hf`` for transformers.
"""

import torch

from . import _loader

_loader.check_torch(torch.__version__)
_loader.check_cuda(torch.version.cuda)

from . import _C, cuda, functional, hf, nn, sdpa  # noqa: E402  (the check above must come before native code)
from .functional import (  # noqa: E402
    budget,
    scaled_dot_product_topk_attention,
    topk_attn_func,
    topk_attn_varlen_func,
    topk_attn_with_kvcache,
    topk_select,
    topk_select_scores,
)
from .kv_cache import KVCache  # noqa: E402
from .sdpa import patch_model, topk_attention, unpatch_model  # noqa: E402

__version__ = _loader.version()

__all__ = [
    "KVCache",
    "__version__",
    "budget",
    "build_info",
    "cuda",
    "functional",
    "hf",
    "nn",
    "patch_model",
    "scaled_dot_product_topk_attention",
    "sdpa",
    "topk_attention",
    "topk_attn_func",
    "topk_attn_varlen_func",
    "topk_attn_with_kvcache",
    "topk_select",
    "topk_select_scores",
    "unpatch_model",
]


def build_info() -> dict:
    """What the native code was built with and runs on: version, torch, torch_cuda, compiler, cxx_standard,
    cpu_isa."""
    return _C.build_info()


hf.register()
