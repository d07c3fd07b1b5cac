"""CUDA as a machine: no synchronisation, graphs, streams, repeats, memory, and bad metadata."""

import math
import threading

import op_helpers
import pytest
import torch
from cuda_helpers import (
    BF16,
    DEVICE,
    DTYPES,
    F32,
    KEPT,
    PLANNED,
    Way,
    every_way,
    int32,
    make_qkv,
    normal,
    poison_free_memory,
    refuses,
    served,
    ways,
)
from op_helpers import assert_same

import topk_attn

NAMES = ("out", "lse", "threshold", "tie_index", "dq", "dk", "dv")
MIB = 2**20


def everything(q, k, v, dout, dlse, pack=(), **kw):
    """Forward and backward by the operators themselves: no autograd, so the calls are all there is."""
    forward = torch.ops.topk_attn.fwd(q, k, v, *pack, **KEPT, **kw)
    return [*forward[:4], *torch.ops.topk_attn.bwd(dout, dlse, q, k, v, *forward, *pack, **kw)]


def inputs(tq=200, tk=330, h=4, hkv=2, d=64, dtype=BF16, seed=0, b=1):
    q, k, v = make_qkv(b, tq, tk, h, hkv, d, dtype=dtype, seed=seed)
    return q, k, v, normal(b, tq, h, d, dtype=dtype, seed=seed + 1), normal(b, h, tq, seed=seed + 2)


def assert_all_same(got, want, what) -> None:
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_same(a, b, f"{what}: {name}")


def differences(got, want) -> torch.Tensor:
    """How many of the tensors differ in any bit, on the device."""
    kinds = {2: torch.int16, 4: torch.int32}
    return sum(
        (a.view(kinds[a.element_size()]) != b.view(kinds[b.element_size()])).any().int()
        for a, b in zip(got, want, strict=True)
    )


# ------------------------------------------------------------------------------------------------------------
# Synchronisation, graphs
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_synchronisation(gpu):
    torch.cuda.synchronize()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@every_way(dims=(64, 72))
def test_no_host_synchronisation(no_synchronisation, dtype, d, way):
    q, k, v, dout, dlse = inputs(d=d, dtype=dtype)
    cu_q, cu_k = int32(0, 100, 100, 200), int32(0, 130, 230, 330)
    pack = (cu_q, cu_k, 100, 130)
    flat = (q[0], k[0], v[0], dout[0], dlse[0])
    with way.used():
        for select in ("head", "kv_group"):  # what is done once, at the first use
            with served(select):
                everything(q, k, v, dout, dlse, topk=9, select=select)
        topk_attn.topk_select_scores(dlse.reshape(-1, dlse.shape[-1]), 5)
        torch.cuda.synchronize()
        no_synchronisation()
        for deterministic in (False, True):
            everything(q, k, v, dout, dlse, topk=9, deterministic=deterministic)
            everything(*flat, pack, ratio=0.1, sink=1, recent=2, deterministic=deterministic)
            everything(q, k, v, dout, dlse, ratio=1.0, deterministic=deterministic)
            with served("kv_group"):
                everything(q, k, v, dout, dlse, topk=9, select="kv_group", deterministic=deterministic)
        topk_attn.topk_select(q, k, topk=9, return_indices=True)
        topk_attn.topk_select_scores(dlse.reshape(-1, dlse.shape[-1]), 5)
        args = [x.detach().requires_grad_() for x in (q, k, v)]
        topk_attn.topk_attn_func(*args, topk=9).backward(dout)


@every_way()
@pytest.mark.parametrize("packed", [False, True])
def test_graph_replays_with_new_data(gpu, dtype, d, way, packed):
    """Captured once, replayed on other data, other documents and other regimes than were captured."""
    kw = dict(ratio=0.08, min_keys=2, deterministic=True)
    fixed = list(inputs(d=d, dtype=dtype, seed=1))
    pack = ()
    if packed:
        fixed = [x[0] for x in fixed]
        pack = (int32(0, 100, 100, 200), int32(0, 130, 230, 330), 200, 330)
    with way.used():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                everything(*fixed, pack, **kw)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = everything(*fixed, pack, **kw)
        for seed, kind in (
            (2, "normal"),
            (3, "two_values"),
            (4, "clustered"),
            (5, "permuted"),
            (1, "normal"),
        ):
            new = [
                *make_qkv(1, 200, 330, 4, 2, d, dtype=dtype, seed=seed, kind=kind),
                *inputs(d=d, dtype=dtype)[3:],
            ]
            for x, y in zip(fixed, new, strict=True):
                x.copy_(y[0] if packed else y)
            if packed:
                pack[0].copy_(int32(0, seed, 90 + seed, 200))
                pack[1].copy_(int32(0, 10 * seed, 200 + seed, 330))
            graph.replay()
            torch.cuda.synchronize()
            assert_all_same(captured, everything(*fixed, pack, **kw), f"replay on {kind}")


# ------------------------------------------------------------------------------------------------------------
# Streams, threads, repeats
# ------------------------------------------------------------------------------------------------------------


@every_way(dtypes=(BF16, F32))
def test_two_streams_at_once(gpu, dtype, d, way):
    """Calls on two streams share no state: each gives what it gives alone."""
    kw = dict(topk=17, deterministic=True)
    with way.used():
        data = [inputs(tq=500, tk=700, d=d, dtype=dtype, seed=s) for s in (1, 2)]
        want = [everything(*x, **kw) for x in data]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in data]
        wrong = []
        for _ in range(40):
            for stream, x, w in zip(streams, data, want, strict=True):
                with torch.cuda.stream(stream):
                    wrong.append(differences(everything(*x, **kw), w))
        torch.cuda.synchronize()
    assert sum(int(x) for x in wrong) == 0


def test_several_python_threads(gpu):
    data = [inputs(seed=s) for s in range(4)]
    want = [everything(*x, topk=5, deterministic=True) for x in data]
    torch.cuda.synchronize()
    wrong = []

    def work(x, w):
        with torch.cuda.stream(torch.cuda.Stream()):
            total = sum(differences(everything(*x, topk=5, deterministic=True), w) for _ in range(30))
            torch.cuda.current_stream().synchronize()
            wrong.append(int(total))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(data, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a busy stream"])
def test_a_thousand_repeats_give_the_same_bits(gpu, dtype, beside):
    """Selection, forward and the deterministic backward."""
    other = torch.cuda.Stream()
    a = torch.randn(1024, 1024, device=DEVICE, dtype=BF16)
    for way in ways(dtype, 64):
        with way.used():
            data = [
                (inputs(tq=256, tk=300, dtype=dtype, seed=1), dict(ratio=0.1, deterministic=True)),
                (
                    inputs(tq=130, tk=500, dtype=dtype, seed=2),
                    dict(topk=40, causal=False, deterministic=True),
                ),
            ]
            want = [everything(*x, **kw) for x, kw in data]
            wrong = torch.zeros((), dtype=torch.int32, device=DEVICE)
            torch.cuda.synchronize()
            for i in range(1000):
                if beside:
                    with torch.cuda.stream(other):
                        torch.mm(a, a)
                x, kw = data[i % 2]
                wrong += differences(everything(*x, **kw), want[i % 2])
            torch.cuda.synchronize()
        assert int(wrong) == 0, f"{way}: {int(wrong)} of 7000 tensors differ"


@every_way(dtypes=(BF16, F32))
def test_deterministic_flag_keeps_forward_bits(dtype, d, way):
    """deterministic=True concerns the gradients' order of additions, nothing else."""
    with way.used():
        x = inputs(d=d, dtype=dtype)
        a, b = everything(*x, topk=9, deterministic=True), everything(*x, topk=9)
    assert_all_same(a[:4] + a[:3], b[:4] + b[:3], "forward")
    for name, got, want in zip(NAMES[4:], b[4:], a[4:], strict=True):
        op_helpers.assert_close(got.cpu(), want.double().cpu(), op_helpers.GRADIENT_TOLERANCE[dtype], name)


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


def device_memory(work) -> float:
    """MiB that `work` takes from the device at its peak, whoever allocates them, results included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reserved, free = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    allocated = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    # What torch's allocator took stays reserved; what went past it shows in the device's free memory only.
    outside = (free - torch.cuda.mem_get_info()[0]) - (torch.cuda.memory_reserved() - reserved)
    return (torch.cuda.max_memory_allocated() - allocated + max(0, outside)) / MIB


def large_inputs(n, heads, kv_heads, d):
    g = torch.Generator(DEVICE).manual_seed(1)
    shapes = ((heads, d), (kv_heads, d), (kv_heads, d), (heads, d))
    tensors = [torch.randn(1, n, *x, generator=g, device=DEVICE, dtype=BF16) for x in shapes]
    return *tensors, torch.randn(1, heads, n, generator=g, device=DEVICE)


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_is_linear(gpu, deterministic):
    """S = 16,384, 16 heads: float32 scores would take 16 GiB, bits of a mask 512 MiB."""
    heads, kv_heads, d = 16, 4, 64

    def run(x, **kw):
        everything(*x, deterministic=deterministic, **kw)

    for way in ways(BF16, d):
        with way.used():
            run(inputs(tq=512, tk=512, h=heads, hkv=kv_heads), topk=9)  # loads the kernels
            for kw in (dict(ratio=0.01), dict(topk=2048)):
                taken = {}
                for n in (8192, 16384):
                    x = large_inputs(n, heads, kv_heads, d)
                    taken[n] = device_memory(lambda x=x, kw=kw: run(x, **kw))
                    results = n * d * (2 * heads + 2 * kv_heads) * 2 / MIB + 3 * n * heads * 4 / MIB
                    sums = n * d * (heads + 2 * kv_heads) * 4 / MIB
                    assert taken[n] < results + sums + 256, f"{way}, {kw}, S = {n}: {taken[n]:.0f} MiB"
                assert taken[16384] < 2.2 * taken[8192] + 32, f"{way}, {kw}: {taken}"


def test_selection_needs_little_memory(gpu):
    for dtype in (BF16, F32):
        q, k, _ = make_qkv(1, 16384, 16384, 4, 2, 64, dtype=dtype)
        topk_attn.topk_select(q[:, :512], k[:, :512], ratio=0.5)
        for budget in (dict(ratio=0.01), dict(ratio=0.5)):
            taken = device_memory(lambda q=q, k=k, budget=budget: topk_attn.topk_select(q, k, **budget))
            assert taken < 256, f"{dtype}, {budget}: {taken:.0f} MiB"


# ------------------------------------------------------------------------------------------------------------
# Bad metadata: never read back, never out of bounds, never unwritten results
# ------------------------------------------------------------------------------------------------------------

TOTAL = 200
FAR = 10**6
# cu_seqlens_q, cu_seqlens_k and the rows that belong to no sound document.
BAD_BOUNDS = [
    ((0, 70, FAR), (0, 70, TOTAL), slice(70, None)),
    ((0, 70, TOTAL), (0, 70, FAR), slice(70, None)),
    ((0, 70, FAR), (0, 70, FAR), slice(70, None)),
    ((0, 70, 2**31 - 1), (0, 70, 2**31 - 1), slice(70, None)),
    ((0, 70, -5), (0, 70, TOTAL), slice(70, None)),
    ((0, 70, TOTAL), (0, 70, -5), slice(70, None)),
    ((0, 70, -(2**31)), (0, 70, -(2**31)), slice(70, None)),
    ((0, 70, 50), (0, 70, 50), slice(70, None)),
    ((0, 70, 150), (0, 70, 150), slice(150, None)),
    ((FAR, FAR, FAR), (FAR, FAR, FAR), slice(None)),
    ((-7, -7, -7), (0, 70, TOTAL), slice(None)),
    ((0, 0, 0), (0, 0, 0), slice(None)),
]
# More of them, where documents overlap or it is open whose rows they are: results are written and finite.
ODD_BOUNDS = [
    ((-5, 70, TOTAL), (0, 70, TOTAL)),
    ((30, 100, TOTAL), (30, 100, TOTAL)),
    ((0, 150, 20, TOTAL), (0, 150, 20, TOTAL)),
    ((TOTAL, 100, 0), (TOTAL, 100, 0)),
    ((0, FAR, 100, -FAR, TOTAL), (0, -FAR, 100, FAR, TOTAL)),
    ((2**31 - 1, -(2**31), 2**31 - 1), (-(2**31), 2**31 - 1, -(2**31))),
]


def packed_run(cu_q, cu_k, max_q, max_k, way, dtype=BF16, **kw):
    q, k, v, dout, dlse = (x[0] for x in inputs(tq=TOTAL, tk=TOTAL, dtype=dtype))
    with way.used(check=min(max_q, max_k) > 0):
        poison_free_memory()
        results = everything(q, k, v, dout, dlse, (int32(*cu_q), int32(*cu_k), max_q, max_k), topk=9, **kw)
    torch.cuda.synchronize()  # an illegal access would end here
    return dict(zip(NAMES, results, strict=True))


def assert_written(r) -> None:
    for name in ("out", "dq", "dk", "dv"):
        assert bool(r[name].isfinite().all()), f"{name} holds unwritten or non-finite values"
    assert bool((r["lse"].isfinite() | (r["lse"] == -math.inf)).all()), "lse"


def is_blind(r) -> torch.Tensor:
    """Rows (total_q) that are all zeros with lse = -inf and an encoding that admits nothing."""
    blind = (r["out"] == 0).flatten(1).all(1) & (r["dq"] == 0).flatten(1).all(1)
    blind &= (r["lse"] == -math.inf).all(0) & r["threshold"].isnan().all(0)
    return blind & (r["tie_index"] == -1).all(0)


@every_way(dims=(64,))
@pytest.mark.parametrize("cu_q,cu_k,bad", BAD_BOUNDS, ids=str)
def test_bad_bounds_give_zeros(gpu, dtype, d, way, cu_q, cu_k, bad):
    for deterministic in (False, True):
        r = packed_run(cu_q, cu_k, TOTAL, TOTAL, way, dtype, deterministic=deterministic)
        assert_written(r)
        blind = is_blind(r)
        assert bool(blind[bad].all()), f"rows {(~blind).nonzero().flatten()[:5].tolist()} are not zero"
        if bad.start == 70:
            # The sound document before them is what it is without them.
            want = packed_run((0, 70), (0, 70), TOTAL, TOTAL, way, dtype, deterministic=deterministic)
            for name in ("out", "threshold", "tie_index", "lse"):
                rows = (slice(0, 70),) if name == "out" else (slice(None), slice(0, 70))
                assert_same(r[name][rows].contiguous(), want[name][rows].contiguous(), name)


@pytest.mark.parametrize("cu_q,cu_k", ODD_BOUNDS, ids=str)
def test_odd_bounds_write_every_result(gpu, cu_q, cu_k):
    for dtype in (BF16, F32):
        for way in (PLANNED, *ways(dtype, 64)):
            for max_q, max_k in ((TOTAL, TOTAL), (7, 9), (0, 0)):
                for deterministic in (False, True):
                    r = packed_run(cu_q, cu_k, max_q, max_k, way, dtype, deterministic=deterministic)
                    assert_written(r)


@every_way(dims=(64,))
@pytest.mark.parametrize("max_q,max_k", [(100, 200), (200, 100), (64, 64), (1, 1), (0, 0), (65, 200)])
def test_too_small_max_seqlen(gpu, dtype, d, way, max_q, max_k):
    """Every row is either right or zero; nothing is left unwritten."""
    bound = (0, 30, TOTAL)
    want = packed_run(bound, bound, TOTAL, TOTAL, way, dtype, deterministic=True)
    r = packed_run(bound, bound, max_q, max_k, way, dtype, deterministic=True)
    assert_written(r)
    right = (r["out"] == want["out"]).flatten(1).all(1) & (r["lse"] == want["lse"]).all(0)
    assert bool((right | is_blind(r)).all())
    if min(max_q, max_k) >= 30:
        assert bool(right[:30].all())
    lists = topk_attn.topk_select(
        *(x[0] for x in inputs(tq=TOTAL, tk=TOTAL, dtype=dtype)[:2]),
        cu_seqlens_q=int32(*bound),
        cu_seqlens_k=int32(*bound),
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        ratio=0.5,
        return_indices=True,
    )[2]
    torch.cuda.synchronize()
    assert bool(((lists >= -1) & (lists < TOTAL)).all())


def test_bad_lengths_of_scores(gpu):
    scores = normal(6, 50)
    poison_free_memory()
    got = topk_attn.topk_select_scores(scores, 5, int32(50, 51, -1, 2**31 - 1, -(2**31), 7))
    torch.cuda.synchronize()
    want = topk_attn.topk_select_scores(scores, 5, int32(50, 0, 0, 0, 0, 7))
    for row in (0, 5):
        for a, b in zip(got, want, strict=True):
            assert_same(a[row].contiguous(), b[row].contiguous(), f"row {row}")
    assert bool(((got[2] >= -1) & (got[2] < 50)).all())


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------


def test_mixed_devices_are_refused(gpu):
    names, args = ("q", "k", "v"), make_qkv(1, 9, 9, 2, 1, 64)
    for i in range(3):
        changed = [x.cpu() if j == i else x for j, x in enumerate(args)]
        # With q on the CPU, k is the first that is not where q is.
        refuses(lambda c=changed: topk_attn.topk_attn_func(*c, topk=3), names[max(i, 1)], "cpu", "cuda")
        if i < 2:
            refuses(lambda c=changed: topk_attn.topk_select(*c[:2], topk=3), "k", "cpu", "cuda")
    q, k, v = (x[0] for x in args)
    cu = int32(0, 9)
    for bad in ((cu.cpu(), cu), (cu, cu.cpu())):
        name = "cu_seqlens_k" if bad[0].is_cuda else "cu_seqlens_q"
        refuses(lambda b=bad: topk_attn.topk_attn_varlen_func(q, k, v, *b, 9, 9, topk=3), name, "cpu")
    refuses(lambda: topk_attn.topk_select_scores(normal(2, 9), 3, int32(9, 9).cpu()), "lengths", "cpu")


def test_float64_is_refused(gpu):
    q, k, v = make_qkv(1, 9, 9, 2, 1, 64, dtype=torch.float64)
    for call in (
        lambda: topk_attn.topk_attn_func(q, k, v, topk=3),
        lambda: topk_attn.topk_select(q, k, topk=3),
    ):
        refuses(call, "float64|double", "cuda")


BF, F = torch.bfloat16, torch.float32
MISFITS = [
    ((1, 4, 2, 12), (1, 4, 1, 12), (1, 4, 1, 8), (F, F, F), ["12", "8"]),
    ((1, 4, 2, 264), (1, 4, 1, 264), (1, 4, 1, 8), (BF, BF, BF), ["264", "256"]),
    ((1, 4, 2, 8), (1, 4, 1, 16), (1, 4, 1, 8), (BF, BF, BF), ["k", "16", "8"]),
    ((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8), (BF, BF, BF), ["3", "2"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 5, 1, 8), (BF, BF, BF), ["v", "5", "4"]),
    ((2, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (BF, BF, BF), ["k", "1", "2"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (BF, F, BF), ["k", "dtype"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (BF, BF, torch.half), ["v", "dtype"]),
    ((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8), (torch.int32,) * 3, ["q", "int"]),
]


@pytest.mark.parametrize("case", MISFITS, ids=lambda c: f"{c[:3]}")
def test_misfits_are_refused(case):
    q, k, v = (torch.zeros(s, dtype=t, device=DEVICE) for s, t in zip(case[:3], case[3], strict=True))
    refuses(lambda: topk_attn.topk_attn_func(q, k, v, topk=2), *case[4])


def test_bad_settings_are_refused():
    q, k, v = make_qkv(1, 4, 6, 2, 1, 8, dtype=BF16)
    for kw, words in (
        (dict(topk=0), ["topk", "0"]),
        (dict(ratio=1.5), ["ratio", "1.5"]),
        (dict(topk=3, ratio=0.5), ["topk", "ratio"]),
        (dict(topk=3, min_keys=9, max_keys=8), ["min_keys", "max_keys"]),
        (dict(topk=3, select="foo"), ["select", "foo"]),
        (dict(topk=3, sink=-1), ["sink", "-1"]),
        (dict(topk=3, softmax_scale=0.0), ["softmax_scale", "0"]),
    ):
        refuses(lambda kw=kw: topk_attn.topk_attn_func(q, k, v, **kw), *words)
    refuses(lambda: topk_attn.topk_attn_func(q.mT, k, v, topk=3), "q")


def test_too_many_keys_are_refused():
    q = torch.zeros(1, 1, 1, 8, device=DEVICE)
    k = torch.zeros(1, 1, 1, 8, device=DEVICE).expand(1, 2**31 + 8, 1, 8)
    refuses(lambda: topk_attn.topk_attn_func(q, k, k, topk=1), "2147483656")
    refuses(lambda: topk_attn.topk_select(q, k, topk=1), "2147483656")


def test_an_error_leaves_the_device_usable(gpu):
    q, k, v = make_qkv(1, 9, 9, 2, 1, 64)
    with Way().used():
        refuses(lambda: topk_attn.topk_attn_func(q.double(), k.double(), v.double(), topk=3))
        assert bool(topk_attn.topk_attn_func(q, k, v, topk=3).isfinite().all())
