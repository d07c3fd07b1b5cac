"""Stands in for the compiled module topk_attn._C in a carried package, which must run on any Python version:
loads the operators from TOPK_LIB. Copied to topk_attn/_C.py by scripts/carry.sh."""

import math
import os

import torch

torch.ops.load_library(os.environ["TOPK_LIB"])


def budget(n, *, topk=None, ratio=None, min_keys=1, max_keys=None):
    if n <= 0:
        return 0
    w = topk if topk is not None else math.ceil(ratio * n - 1e-6)
    w = max(w, min_keys)
    w = w if max_keys is None else min(w, max_keys)
    return max(1, min(w, n))


def build_info():
    return {"library": os.path.basename(os.environ["TOPK_LIB"])}


def cpu_isa():
    return "unknown"
