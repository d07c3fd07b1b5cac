"""A small load that runs every CUDA kernel at least once, for compute-sanitizer (scripts/gpu_check.sh).

Each case runs selection, forward and backward, and fails on NaN where none belongs. Sizes are small, odd and
no multiple of a tile; instrumented kernels are slow. Exit status 1: a case failed; the others still run.
"""

import itertools
import sys
import traceback

import torch

import topk_attn

DEVICE = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def inputs(dtype, head_dim, v_dim, tq, tk, heads=4, kv_heads=2, batch=1):
    generator = torch.Generator(DEVICE).manual_seed(5)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype).requires_grad_()

    return (
        random(batch, tq, heads, head_dim),
        random(batch, tk, kv_heads, head_dim),
        random(batch, tk, kv_heads, v_dim),
    )


def check(*tensors):
    for tensor in tensors:
        if not torch.isfinite(tensor.float()).all():
            raise AssertionError("a result is not finite")


def dense(dtype, head_dim, v_dim, tq, tk, **settings):
    q, k, v = inputs(dtype, head_dim, v_dim, tq, tk)
    out = topk_attn.topk_attn_func(q, k, v, **settings)
    out.backward(torch.ones_like(out))
    check(out, q.grad, k.grad, v.grad)


def packed(dtype, head_dim, lengths, **settings):
    total = sum(lengths)
    q, k, v = (
        t.squeeze(0).detach().requires_grad_() for t in inputs(dtype, head_dim, head_dim, total, total)
    )
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    longest = max(lengths)
    out = topk_attn.topk_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, **settings)
    out.backward(torch.ones_like(out))
    check(out, q.grad, k.grad, v.grad)


def select_scores():
    scores = torch.randn(37, 301, device=DEVICE)
    check(topk_attn.topk_select_scores(scores, 17)[0])


def overridden(settings, body, *arguments, **keywords):
    with topk_attn.cuda.override(**settings):
        body(*arguments, **keywords)


def cases():
    yield "select_scores", select_scores, (), {}
    yield "float32", dense, (FP32, 40, 24, 75, 91), {"topk": 9}
    yield "float32 group", dense, (FP32, 64, 64, 70, 70), {"ratio": 0.1, "select": "kv_group"}
    yield "float32 packed", packed, (FP32, 64, (65, 0, 1, 40)), {"topk": 7, "sink": 2, "recent": 3}
    ways = [({"build": "portable"}, (64, 128, 72, 256))]
    if torch.cuda.get_device_capability() == (9, 0):
        ways += [({"build": "sm90", "largest_share": share}, (64, 128)) for share in (0.0, 0.3, 1.0)]
    for settings, dims in ways:
        label = " ".join(str(v) for v in settings.values())
        for dtype, head_dim in itertools.product((BF16, FP16), dims):
            name = f"{label} {str(dtype)[6:]} {head_dim}"
            yield name, overridden, (settings, dense, dtype, head_dim, head_dim, 203, 331), {"topk": 20}
        yield f"{label} packed", overridden, (settings, packed, BF16, 64, (130, 0, 1, 77)), {"ratio": 0.1}
        every = {"causal": False, "topk": 1000}
        yield f"{label} all keys", overridden, (settings, dense, BF16, 64, 64, 70, 129), every
        again = {"topk": 20, "deterministic": True}
        yield f"{label} deterministic", overridden, (settings, dense, BF16, 64, 64, 130, 150), again
    portable = {"build": "portable"}
    group = {"topk": 12, "select": "kv_group", "sink": 1, "recent": 2}
    yield "portable group", overridden, (portable, dense, BF16, 64, 64, 100, 140), group


def main() -> int:
    failed = 0
    for name, body, arguments, keywords in cases():
        try:
            body(*arguments, **keywords)
            torch.cuda.synchronize()
            print(f"{name}: ran", flush=True)
        except Exception:
            failed += 1
            print(f"{name}: failed", flush=True)
            traceback.print_exc()
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
