"""The demonstration: one real model, fine-tuned natively with exact top-k attention and measured against
dense.

`python -m topk_attn.demo` runs it from start to end; see docs/demo.md.
"""
