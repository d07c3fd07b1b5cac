"""Memory and sizes: no S x S buffer, offsets beyond 2^31 elements, lengths that int32 cannot hold."""

import math
import mmap
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from op_helpers import assert_same, make_qkv, normal

import topk_attn

HERE = Path(__file__).parent


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def peak_growth(setup: str, work: str) -> float:
    """MiB by which the peak resident size of a fresh process grows during `work`."""
    script = textwrap.dedent("""
        import ctypes, torch, topk_attn
        torch.manual_seed(0)
        torch.set_num_threads(2)
        def attend(q, k, v, **kw):
            out = topk_attn.topk_attn_func(q, k, v, **kw)
            out.backward(torch.ones_like(out))
            for x in (q, k, v):
                x.grad = None
        def inputs(n, h, hkv, d):
            return [torch.randn(1, n, x, d, requires_grad=True) for x in (h, hkv, hkv)]
        # ru_maxrss would begin with the size of the process that started this one.
        def status(name):
            return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])
        attend(*inputs(64, 2, 1, 16), topk=4)
    """)
    script += textwrap.dedent(setup)
    # Memory that the allocator holds free is handed back first, so that it cannot hide a part of the growth.
    script += "ctypes.CDLL(None).malloc_trim(0)\n"
    script += "before = status('VmRSS')\n"
    script += textwrap.dedent(work)
    script += "print('GROWTH', (status('VmHWM') - before) / 1024)\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split("GROWTH")[1])


def test_no_square_buffer_in_training():
    """S = 16,384, W = 64, 2 heads: the scores alone would take 2,048 MiB; S * W floats take 8 MiB."""
    growth = peak_growth("args = inputs(16384, 2, 1, 16)\n", "attend(*args, topk=64)\n")
    rows_times_kept = 16384 * 64 * 2 * 4 / 2**20
    assert growth < 8 * rows_times_kept + 64, f"{growth:.0f} MiB"


def test_memory_does_not_grow_with_the_square():
    growth = [
        peak_growth(f"args = inputs({n}, 2, 1, 8)\n", "attend(*args, topk=32)\n") for n in (4096, 16384)
    ]
    assert growth[1] < 4.5 * growth[0] + 32, growth


def test_selection_needs_no_lists():
    """Without indices, the selection of 16,384 rows needs 8 bytes a row, whatever W is."""
    growth = peak_growth(
        "q, k = torch.randn(1, 16384, 1, 8), torch.randn(1, 16384, 1, 8)\n",
        "topk_attn.topk_select(q, k, ratio=0.5)\n",
    )
    assert growth < 64, f"{growth:.0f} MiB"


# ------------------------------------------------------------------------------------------------------------
# Offsets beyond 2^31
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vast():
    """6 GiB of zeros that take no memory until written: bfloat16, 3 * 2^30 elements."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        buffer = mmap.mmap(-1, 6 * 2**30, flags=flags)
    except OSError as error:
        pytest.skip(f"no 6 GiB of address space: {error}")
    return torch.frombuffer(buffer, dtype=torch.bfloat16)


def spread(storage, x, dim):
    """A copy of x in `storage` whose steps along `dim` span the whole of it, beyond 2^31 elements."""
    strides = list(x.contiguous().stride())
    strides[dim] = (3 * 2**30 - x.numel()) // max(1, x.shape[dim] - 1) // 8 * 8
    assert strides[dim] * (x.shape[dim] - 1) > 2**31
    view = storage.as_strided(x.shape, strides)
    view.copy_(x)
    return view


@pytest.mark.parametrize("which,dim", [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (1, 0), (0, 0)])
def test_far_rows(vast, which, dim):
    args = list(make_qkv(2, 30, 40, 4, 2, 16, dtype=torch.bfloat16, seed=dim))
    want = gradients(args)
    args[which] = spread(vast, args[which], dim)
    for a, b in zip(gradients(args), want, strict=True):
        assert_same(a.contiguous(), b.contiguous(), "far rows")


def gradients(args):
    q, k, v = (x.detach().requires_grad_() for x in args)
    out, lse = topk_attn.topk_attn_func(q, k, v, topk=5, return_lse=True)
    dout = normal(*out.shape, dtype=out.dtype, seed=1)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("paged", [False, True])
def test_far_pages(vast, paged):
    lead = (40, 4) if paged else (3, 40)
    k, v = (
        normal(*lead, 2, 16, dtype=torch.bfloat16, seed=1),
        normal(*lead, 2, 16, dtype=torch.bfloat16, seed=2),
    )
    extra = {"block_table": torch.randperm(40).to(torch.int32)[:30].reshape(3, 10)} if paged else {}
    q, new = (
        normal(3, 2, 4, 16, dtype=torch.bfloat16, seed=3),
        normal(3, 2, 2, 16, dtype=torch.bfloat16, seed=4),
    )

    def run(k, v):
        out = topk_attn.topk_attn_with_kvcache(
            q, k, v, new, new, cache_seqlens=int32(38, 5, 20), topk=5, return_indices=True, **extra
        )
        return [*out, k.contiguous(), v.contiguous()]

    want = run(k.clone(), v.clone())
    for dim in (0, 1):
        for which in (0, 1):
            args = [k.clone(), v.clone()]
            args[which] = spread(vast, args[which], dim)
            for a, b in zip(run(*args), want, strict=True):
                assert_same(a, b, f"far pages, dim {dim}")


def test_far_score_rows(vast):
    x = normal(30, 64, dtype=torch.bfloat16)
    want = topk_attn.topk_select_scores(x, 7)
    for a, b in zip(topk_attn.topk_select_scores(spread(vast, x, 0), 7), want, strict=True):
        assert_same(a, b, "far score rows")


# ------------------------------------------------------------------------------------------------------------
# Beyond int32
# ------------------------------------------------------------------------------------------------------------


def test_key_indices_beyond_int32_are_refused():
    """tie_index and indices are int32: more keys than that must be an error, not a wrapped index."""
    for device in ("meta", "cpu"):
        q = torch.zeros(1, 1, 1, 8, device=device)
        k = torch.zeros(1, 1, 1, 8, device=device).expand(1, 2**31 + 8, 1, 8)
        with pytest.raises(RuntimeError, match="2147483656"):
            topk_attn.topk_attn_func(q, k, k, topk=1)
        with pytest.raises(RuntimeError, match="2147483656"):
            topk_attn.topk_select(q, k, topk=1)
    scores = torch.zeros(1, 1).expand(1, 2**31 + 8)
    with pytest.raises(RuntimeError, match="2147483656|contiguous"):
        topk_attn.topk_select_scores(scores, 1)


def test_slots_beyond_int32_are_refused_or_right():
    """A contiguous cache of 3 x 2^30 rows: the last sequence's slots do not fit in int32."""
    k = torch.zeros(1, 1, 1, 8).expand(3, 2**30, 1, 8)
    q = normal(3, 1, 1, 8)
    call = dict(cache_seqlens=int32(5, 6, 7), topk=2)
    out = topk_attn.topk_attn_with_kvcache(q, k, k, **call)
    assert bool((out == 0).all())
    with pytest.raises(RuntimeError, match="(?i)slot"):
        topk_attn.topk_attn_with_kvcache(q, k, k, **call, return_slots=True)


def test_wide_budget_of_a_long_empty_cache():
    """max_keys, topk and ratio far beyond the valid rows: only lists that were asked for cost memory."""
    k = torch.zeros(1, 1, 1, 8).expand(1, 2**30, 1, 8)
    q = normal(1, 1, 2, 8)
    for budget in (dict(topk=2**31), dict(ratio=1.0), dict(ratio=0.5, max_keys=2**40)):
        out, lse = topk_attn.topk_attn_with_kvcache(
            q, k, k, cache_seqlens=int32(9), **budget, return_lse=True
        )
        assert bool((out == 0).all())
        assert math.isclose(float(lse[0, 0, 0]), math.log(topk_attn.budget(9, **budget)), rel_tol=1e-6)


@pytest.mark.parametrize("shape", ["(2**35, 4, {h}, 8)", "(2**40, 0, {h}, 8)"])
def test_huge_batches_end_in_an_error_or_at_once(shape):
    """A batch of expanded or empty sequences takes no memory itself; the call must not take all there is."""
    script = f"""
        import op_fuzz, torch, topk_attn
        q = torch.zeros(1, 4, 2, 8)[:, : {shape.format(h=2)}[1]].expand({shape.format(h=2)})
        k = torch.zeros(1, 4, 1, 8)[:, : {shape.format(h=1)}[1]].expand({shape.format(h=1)})
        op_fuzz.limit_memory(2 * 2**30)
        try:
            topk_attn.topk_select(q, k, topk=1)
        except (RuntimeError, MemoryError) as error:
            print("refused:", error)
        print("alive")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=HERE, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "alive" in done.stdout, done.stderr[-2000:]
    assert "bad_alloc" not in done.stdout and "length_error" not in done.stdout, done.stdout
