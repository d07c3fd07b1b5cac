"""Random calls of every operator, in a process of its own: `python op_fuzz.py SEED SECONDS`.

Each case is a good call, half of the time with one or two arguments replaced by junk. A call must either
raise one ordinary error or give what the oracle gives. The case is printed before it runs, so that after a
crash the last line says what crashed. Exit status 1 and a report on the first violation.
"""

from __future__ import annotations

import math
import random
import resource
import sys
import time
import traceback
from pathlib import Path

import oracle
import torch
from op_helpers import (
    DTYPES,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    accumulate_dtype,
    assert_close,
    assert_encoding,
    assert_same,
    make_qkv,
    normal,
)
from oracle import Settings

import topk_attn

CLEAR_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
HUGE = [2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**31), -(2**63)]


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------------
# Good calls
# ------------------------------------------------------------------------------------------------------------


def random_settings(r: random.Random) -> dict:
    kw = {}
    if r.random() < 0.5:
        kw["topk"] = r.choice([1, 2, 3, 5, 8, 100, 2**62])
    else:
        kw["ratio"] = r.choice([1e-9, 0.05, 0.1, 0.3, 1 / 3, 0.9, 1.0, r.random() or 1.0])
    if r.random() < 0.3:
        kw["min_keys"] = r.choice([1, 2, 6, 1000])
    if r.random() < 0.3:
        kw["max_keys"] = r.choice([1000, 2**62]) if kw.get("min_keys", 1) > 6 else r.choice([6, 9, 2**62])
    if r.random() < 0.4:
        kw["select"] = r.choice(["head", "kv_group"])
    if r.random() < 0.3:
        kw["sink"] = r.choice([0, 1, 3, 50, 2**62])
    if r.random() < 0.3:
        kw["recent"] = r.choice([0, 1, 3, 50, 2**62])
    if r.random() < 0.3:
        kw["causal"] = r.random() < 0.5
    return kw


def random_shape(r: random.Random):
    hkv = r.choice([1, 1, 2, 3])
    return hkv * r.choice([1, 1, 2, 4]), hkv, r.choice([8, 8, 16, 24, 40, 64]), r.choice([8, 8, 16, 72])


def random_kind(r: random.Random) -> str:
    return r.choice(["normal", "permuted", "two_values", "duplicated", "integers", "zeros"])


def good_attend(r: random.Random) -> dict:
    h, hkv, d, dv = random_shape(r)
    q, k, v = make_qkv(
        r.choice([1, 2]),
        r.choice([0, 1, 2, 7, 20]),
        r.choice([0, 1, 3, 9, 33]),
        h,
        hkv,
        d,
        dv,
        dtype=r.choice(DTYPES),
        seed=r.randrange(10**6),
        kind=random_kind(r) if r.random() < 0.8 else "normal",
    )
    kw = dict(q=q, k=k, v=v, **random_settings(r))
    if r.random() < 0.2:
        kw["softmax_scale"] = r.choice([1e-3, 0.5, 2.0])
    return kw


def random_lengths(r: random.Random, count: int) -> list[int]:
    return [r.choice([0, 1, 2, 5, 11]) for _ in range(count)]


def good_varlen(r: random.Random) -> dict:
    h, hkv, d, dv = random_shape(r)
    docs = r.choice([1, 2, 4])
    lq = random_lengths(r, docs)
    lk = lq if r.random() < 0.6 else random_lengths(r, docs)
    q, k, v = make_qkv(1, sum(lq), sum(lk), h, hkv, d, dv, dtype=r.choice(DTYPES), seed=r.randrange(10**6))
    cu_q, cu_k = ([sum(x[:i]) for i in range(docs + 1)] for x in (lq, lk))
    return dict(
        q=q[0],
        k=k[0],
        v=v[0],
        cu_seqlens_q=int32(cu_q),
        cu_seqlens_k=int32(cu_k),
        max_seqlen_q=max(lq) + r.choice([0, 0, 3]),
        max_seqlen_k=max(lk) + r.choice([0, 0, 3]),
        **random_settings(r),
    )


def good_cache(r: random.Random) -> dict:
    h, hkv, d, dv = random_shape(r)
    b, dtype = r.choice([1, 2, 3]), r.choice(DTYPES)
    new, tq = r.choice([0, 0, 1, 4]), r.choice([1, 1, 2, 4, 6])
    page = r.choice([None, 1, 3, 16])
    capacity = r.choice([8, 20, 33])
    kw = dict(q=normal(b, tq, h, d, dtype=dtype, seed=r.randrange(10**6)))
    lead = (b, capacity)
    if page is not None:
        per_row = -(-capacity // page)
        lead = (b * per_row + 2, page)
        pages = r.sample(range(lead[0]), b * per_row)
        kw["block_table"] = int32(pages).reshape(b, per_row)
    kw["k_cache"] = normal(*lead, hkv, d, dtype=dtype, seed=r.randrange(10**6))
    kw["v_cache"] = normal(*lead, hkv, dv, dtype=dtype, seed=r.randrange(10**6))
    if new:
        kw["k"] = normal(b, new, hkv, d, dtype=dtype, seed=r.randrange(10**6))
        kw["v"] = normal(b, new, hkv, dv, dtype=dtype, seed=r.randrange(10**6))
    lengths = [r.randint(0, capacity - new) for _ in range(b)]
    kw["cache_seqlens"] = int32(lengths)
    if r.random() < 0.4:
        kw["cache_leftpad"] = int32([r.randint(0, n) for n in lengths])
    return dict(**kw, **random_settings(r))


def good_scores(r: random.Random) -> dict:
    rows, n = r.choice([0, 1, 5]), r.choice([0, 1, 7, 64, 300])
    dtype = r.choice([torch.float32, torch.bfloat16, torch.float16])
    kw = dict(scores=normal(rows, n, dtype=dtype, seed=r.randrange(10**6)), topk=r.choice([1, 3, 20, 400]))
    if r.random() < 0.4:
        kw["scores"] = (kw["scores"] * 2).round() / 2
    if r.random() < 0.5:
        kw["lengths"] = int32([r.randint(0, n) for _ in range(rows)])
    return kw


# ------------------------------------------------------------------------------------------------------------
# Calls and checks
# ------------------------------------------------------------------------------------------------------------


def settings_of(kw: dict) -> Settings:
    return Settings(**{n: x for n, x in kw.items() if n in Settings.__dataclass_fields__})


def leaf(x):
    """A leaf that requires a gradient where it can; junk is passed on as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().requires_grad_(x.is_floating_point())


def run_attend(kw: dict):
    q, k, v = (leaf(kw[name]) for name in ("q", "k", "v"))
    rest = {n: x for n, x in kw.items() if n not in ("q", "k", "v")}
    out, lse = topk_attn.topk_attn_func(q, k, v, **rest, return_lse=True)
    select = {n: x for n, x in rest.items() if n != "softmax_scale"}
    chosen = topk_attn.topk_select(q, k, **select, return_indices=True)
    dout = normal(*out.shape, dtype=out.dtype, seed=3)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return lambda: check_attend(kw, out, lse, chosen, dout, grads)


def check_attend(kw, out, lse, chosen, dout, grads):
    s, dtype = settings_of(kw), kw["q"].dtype
    want = oracle.attention(kw["q"], kw["k"], kw["v"], s, dout=dout)
    assert_encoding(chosen[0], chosen[1], want, dtype)
    assert_same(chosen[2], oracle.index_lists(want.kept, oracle.budget(kw["k"].shape[1], s)), "indices")
    assert_close(out, want.out, FORWARD_TOLERANCE[dtype], "out")
    assert_close(lse, want.lse, FORWARD_TOLERANCE[accumulate_dtype(dtype)], "lse")
    for name, got, expected in zip(("dq", "dk", "dv"), grads, (want.dq, want.dk, want.dv), strict=True):
        assert_close(got, expected, GRADIENT_TOLERANCE[dtype], name)


def run_varlen(kw: dict):
    q, k, v = (leaf(kw[name]) for name in ("q", "k", "v"))
    rest = {n: x for n, x in kw.items() if n not in ("q", "k", "v")}
    out, lse = topk_attn.topk_attn_varlen_func(q, k, v, **rest, return_lse=True)
    chosen = topk_attn.topk_select(q, k, **{n: x for n, x in rest.items() if n != "softmax_scale"})
    dout = normal(*out.shape, dtype=out.dtype, seed=3)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return lambda: check_varlen(kw, out, lse, chosen, dout, grads)


def check_varlen(kw, out, lse, chosen, dout, grads):
    s, dtype = settings_of(kw), kw["q"].dtype
    want = oracle.varlen(kw["q"], kw["k"], kw["v"], kw["cu_seqlens_q"], kw["cu_seqlens_k"], s, dout=dout)
    assert_encoding(chosen[0], chosen[1], want, dtype)
    assert_close(out, want.out, FORWARD_TOLERANCE[dtype], "out")
    assert_close(lse, want.lse, FORWARD_TOLERANCE[accumulate_dtype(dtype)], "lse")
    for name, got, expected in zip(("dq", "dk", "dv"), grads, (want.dq, want.dk, want.dv), strict=True):
        assert_close(got, expected, GRADIENT_TOLERANCE[dtype], name)


def run_cache(kw: dict):
    before = {n: kw[n].clone() if isinstance(kw[n], torch.Tensor) else kw[n] for n in ("k_cache", "v_cache")}
    result = topk_attn.topk_attn_with_kvcache(
        **kw, return_lse=True, return_indices=True, return_encoding=True
    )
    return lambda: check_cache({**kw, **before}, *result)


def check_cache(kw, out, lse, indices, encoding):
    s, dtype = settings_of(kw), kw["q"].dtype
    want = oracle.kvcache(
        kw["q"],
        kw["k_cache"],
        kw["v_cache"],
        kw["cache_seqlens"],
        s,
        k=kw.get("k"),
        v=kw.get("v"),
        leftpad=kw.get("cache_leftpad"),
        block_table=kw.get("block_table"),
    )
    assert_encoding(*encoding, want, dtype)
    lists = torch.stack([oracle.index_lists(kept, indices.shape[-1]) for kept in want.kept])
    assert_same(indices, lists, "indices")
    assert_close(out, want.out, FORWARD_TOLERANCE[dtype], "out")
    assert_close(lse, want.lse, FORWARD_TOLERANCE[accumulate_dtype(dtype)], "lse")


def scores_are_meta(kw: dict) -> bool:
    return isinstance(kw["scores"], torch.Tensor) and kw["scores"].is_meta


def run_scores(kw: dict):
    threshold, tie_index, indices = topk_attn.topk_select_scores(**kw)

    if scores_are_meta(kw):
        assert threshold.is_meta and tie_index.is_meta and indices.is_meta
        return lambda: None

    def check():
        want = oracle.select_scores(kw["scores"], kw["topk"], kw.get("lengths"))
        assert torch.equal(threshold.nan_to_num(7e7), want[0].float().nan_to_num(7e7)), "threshold"
        assert_same(tie_index, want[1], "tie_index")
        assert_same(indices, want[2], "indices")

    return check


CALLS = {
    "attend": (good_attend, run_attend),
    "varlen": (good_varlen, run_varlen),
    "cache": (good_cache, run_cache),
    "scores": (good_scores, run_scores),
}


# ------------------------------------------------------------------------------------------------------------
# Junk
# ------------------------------------------------------------------------------------------------------------


def junk_tensor(r: random.Random, old: torch.Tensor) -> torch.Tensor:
    """The old tensor with one property spoiled."""
    how = r.randrange(9)
    if how == 0:
        kinds = [
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int32,
            torch.int64,
            torch.bool,
        ]
        return old.to(r.choice(kinds))
    if how == 1 and old.dim():
        dim = r.randrange(old.dim())
        return old.narrow(dim, 0, r.randint(0, old.shape[dim]))
    if how == 2 and old.dim():
        return torch.cat([old, old], dim=r.randrange(old.dim()))
    if how == 3 and old.dim() > 1:
        a, b = r.sample(range(old.dim()), 2)
        return old.transpose(a, b)
    if how == 4:
        return old.unsqueeze(r.randint(0, old.dim()))
    if how == 5 and old.dim():
        return old.select(0, 0) if old.shape[0] else old
    if how == 6:
        return old.to("meta")
    if how == 7 and old.dim():
        return old.flip(0)[:, ...] if old.dim() else old
    if old.dtype == torch.int32 and old.numel():
        spoiled = old.clone()
        spoiled.view(-1)[r.randrange(old.numel())] = r.choice([-1, 0, 1, 3, 7, 40, 1000, 2**31 - 1, -(2**31)])
        return spoiled
    return old.new_zeros(r.choice([(), (0,), (1,), (2, 3), (1, 1, 1, 8), (2, 5, 2, 16)]))


def spoil(r: random.Random, kw: dict) -> list[str]:
    names = r.sample(sorted(kw), min(len(kw), r.choice([1, 1, 2])))
    for name in names:
        old = kw[name]
        if isinstance(old, torch.Tensor):
            kw[name] = junk_tensor(r, old) if r.random() < 0.93 else r.choice([None, 3, "x", [1, 2]])
        elif isinstance(old, str):
            kw[name] = r.choice(["", "HEAD", "heads", "kv_group\0", None, 3, "é" * 1000])
        elif isinstance(old, bool):
            kw[name] = r.choice([None, "yes", 2.5])
        elif isinstance(old, float):
            kw[name] = r.choice(
                [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1.0 + 1e-15, 5e-324, None, "x"]
            )
        else:
            kw[name] = r.choice([0, -1, 1, *HUGE, 2**64, 2.5, None, "x", math.nan, True])
    if r.random() < 0.1:
        kw[r.choice(["ratio", "topk"])] = r.choice([0.5, 2, None])
    return names


def describe(name: str, kw: dict) -> str:
    def show(x):
        if isinstance(x, torch.Tensor):
            small = x.dtype in (torch.int32, torch.int64) and x.numel() <= 16 and x.device.type == "cpu"
            values = f"={x.tolist()}" if small else ""
            return f"{str(x.dtype)[6:]}{list(x.shape)}/{list(x.stride())}@{x.device.type}{values}"
        return repr(x) if len(repr(x)) < 60 else repr(x)[:57] + "..."

    return f"{name}({', '.join(f'{n}={show(x)}' for n, x in kw.items())})"


def one_case(seed: int) -> str:
    """Runs the case of `seed`; returns what came of it, raises AssertionError on a violation."""
    r = random.Random(seed)
    name = r.choice(list(CALLS))
    make, run = CALLS[name]
    kw = make(r)
    bad = spoil(r, kw) if r.random() < 0.5 else []
    print(f"case {seed}: spoiled {bad}: {describe(name, kw)}", flush=True)
    try:
        check = run(kw)
    except CLEAR_ERRORS as error:
        message = str(error)
        assert bad, f"a good call was refused: {type(error).__name__}: {message}"
        assert message.strip(), "an error without a message"
        assert "INTERNAL ASSERT" not in message, message
        return "refused"
    except Exception as error:
        raise AssertionError(f"not an ordinary error: {error!r}") from error
    try:
        check()
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"the call was accepted, but has no meaning for the oracle: {error!r}"
        ) from error
    return "checked"


def limit_memory(more: int) -> None:
    """Lets the process grow by `more` bytes, so that a huge output is an ordinary error."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    seed, seconds = int(sys.argv[1]), float(sys.argv[2])
    limit_memory(4 * 2**30)
    torch.set_num_threads(1)
    counts: dict[str, int] = {}
    start = time.monotonic()
    case = seed * 1_000_000
    keep_going = len(sys.argv) > 3
    failures = 0
    while time.monotonic() - start < seconds:
        try:
            outcome = one_case(case)
        except AssertionError:
            traceback.print_exc(file=sys.stdout)
            failures += 1
            if not keep_going:
                print(f"VIOLATION; repeated by: python -c 'import op_fuzz; op_fuzz.one_case({case})'")
                return 1
            outcome = "violated"
        counts[outcome] = counts.get(outcome, 0) + 1
        case += 1
    print(f"DONE {counts}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
