"""plan(): pure, visible, can be overridden; a request that cannot be served is an error with the reason."""

import pytest
import torch
from cuda_helpers import (
    BF16,
    DTYPES,
    ERRORS,
    F16,
    F32,
    builds,
    capability,
    make_qkv,
    refuses,
)
from op_helpers import assert_close

import topk_attn

pytestmark = pytest.mark.usefixtures("gpu")

BUILDS = {"plain", "portable", "sm90"}
SELECTIONS = {"slab", "fused"}


def plan(q, k, v=None, **kw):
    return topk_attn.cuda.plan(q, k, v, **{"topk": 9, **kw})


def example(dtype=BF16, d=64, dv=None, **kw):
    return make_qkv(1, 130, 140, 4, 2, d, dv, dtype=dtype, **kw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 64, 72, 128, 256])
def test_plan_names_what_runs(dtype, d):
    q, k, v = example(dtype, d)
    planned = plan(q, k, v)
    assert planned.build in BUILDS and planned.selection in SELECTIONS
    assert (planned.build == "plain") == (dtype == F32)
    assert planned.build != "plain" or planned.forward_share == planned.backward_share == 0
    topk_attn.topk_attn_func(q, k, v, topk=9)
    assert topk_attn.cuda.last_plan() == planned
    topk_attn.topk_select(q, k, topk=9)
    assert topk_attn.cuda.last_plan() == plan(q, k)


def test_full_speed_shapes_get_the_full_speed_build():
    for dtype in (BF16, F16):
        for d in (64, 128):
            want = "sm90" if capability() == (9, 0) else "portable"
            planned = plan(*example(dtype, d))
            assert planned.build == want
            if want == "sm90":
                assert planned.selection == "fused" and planned.forward_share > 0 < planned.backward_share
                assert plan(*example(dtype, d), deterministic=True) == planned
                assert plan(*example(dtype, d), select="kv_group").build == "portable"


def test_plan_is_pure():
    """The same answer again, no work on the device, and the same for equal shapes with other data."""
    q, k, v = example()
    topk_attn.topk_attn_func(q, k, v, topk=9)
    before = topk_attn.cuda.last_plan()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plans = [plan(q, k, v) for _ in range(3)]
        plans.append(plan(q, k))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == allocated
    assert all(p.build == plans[0].build for p in plans)
    assert plans[0] == plans[1] == plans[2] == plan(*example(seed=5))
    assert topk_attn.cuda.last_plan() == before


def test_plan_checks_its_arguments():
    q, k, v = example()
    refuses(lambda: plan(q, k, v, topk=0), "topk", "0")
    refuses(lambda: plan(q.double(), k.double(), v.double()), "float64|double")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
def test_every_build_can_be_asked_for(dtype, d):
    q, k, v = example(dtype, d)
    results = []
    for build in builds(dtype, d):
        with topk_attn.cuda.override(build=build):
            assert plan(q, k, v).build == build
            args = [x.detach().requires_grad_() for x in (q, k, v)]
            out = topk_attn.topk_attn_func(*args, topk=9)
            assert topk_attn.cuda.last_plan().build == build
            out.sum().backward()
            topk_attn.topk_select(q, k, topk=9)
            assert topk_attn.cuda.last_plan().build == build
        results.append([out.detach(), *(x.grad for x in args)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_close(a.cpu(), b.double().cpu(), 0.02 if dtype == BF16 else 3e-3, "build against build")


def test_override_ends_with_its_block():
    q, k, v = example()
    planned = plan(q, k, v)
    with topk_attn.cuda.override(build="portable"):
        if "sm90" in builds(BF16, 64):
            with topk_attn.cuda.override(build="sm90"):
                assert plan(q, k, v).build == "sm90"
        assert plan(q, k, v).build == "portable"
        with topk_attn.cuda.override():
            assert plan(q, k, v) == planned, "an inner override stands alone"
        assert plan(q, k, v).build == "portable"
    assert plan(q, k, v) == planned
    with pytest.raises(ZeroDivisionError), topk_attn.cuda.override(build="portable"):
        raise ZeroDivisionError
    assert plan(q, k, v) == planned


def served_or_refused(call, build):
    """A call under an override either ran on that build or raised an error that names it."""
    try:
        with topk_attn.cuda.override(build=build):
            call()
            return topk_attn.cuda.last_plan().build == build
    except ERRORS as error:
        assert any(word in str(error) for word in ("build", "kernels")), f"no reason in: {error}"
        return True


@pytest.mark.parametrize("build", sorted(BUILDS))
def test_unsupported_requests_say_why(build):
    """Never another build silently."""
    for dtype in DTYPES:
        for d, dv in ((64, 64), (72, 72), (64, 128), (256, 256), (8, 8)):
            q, k, v = example(dtype, d, dv)
            for call in (
                lambda q=q, k=k, v=v: topk_attn.topk_attn_func(q, k, v, topk=9),
                lambda q=q, k=k: topk_attn.topk_select(q, k, topk=9),
            ):
                assert served_or_refused(call, build), f"{build}: another build ran for {dtype}, {d}, {dv}"


def test_impossible_requests_are_errors():
    q, k, v = example(F32)
    for wish in (
        dict(build="sm90"),
        dict(build="portable"),
        dict(selection="fused"),
        dict(largest_share=0.5),
    ):
        with topk_attn.cuda.override(**wish):
            refuses(lambda: topk_attn.topk_attn_func(q, k, v, topk=9), "float32|fp16")
            refuses(lambda: plan(q, k, v), "float32|fp16")
    if capability() != (9, 0):
        with topk_attn.cuda.override(build="sm90"):
            refuses(lambda: topk_attn.topk_attn_func(*example(), topk=9), "sm90")
    for bad in (dict(build="cutlass"), dict(selection="approximate")):

        def request(bad=bad):
            with topk_attn.cuda.override(**bad):
                topk_attn.topk_attn_func(*example(), topk=9)

        refuses(request, *bad, *bad.values())
    for share in (-0.5, 1.5, float("nan")):

        def request(share=share):
            with topk_attn.cuda.override(largest_share=share):
                topk_attn.topk_attn_func(*example(), topk=9)

        refuses(request, "largest_share")


def test_override_concerns_the_calling_thread_or_all():
    """Another thread's call under an override still runs and gives the right result."""
    import threading

    q, k, v = example()
    want = topk_attn.topk_select(q, k, topk=9)
    got = []
    with topk_attn.cuda.override(build="portable"):
        thread = threading.Thread(target=lambda: got.append(topk_attn.topk_select(q, k, topk=9)))
        thread.start()
        thread.join()
    for a, b in zip(got[0], want, strict=True):
        assert torch.equal(a, b)


def test_share_of_the_attention_passes_leaves_selection_alone():
    """A largest_share is no reason to refuse topk_select, which has no regimes."""
    if "sm90" not in builds(BF16, 64):
        pytest.skip("one regime only")
    q, k, v = example()
    want = topk_attn.topk_select(q, k, topk=9)
    with topk_attn.cuda.override(build="sm90", largest_share=1.0):
        for a, b in zip(topk_attn.topk_select(q, k, topk=9), want, strict=True):
            assert torch.equal(a, b)


def test_forward_and_backward_of_different_builds():
    """An override around backward() alone changes speed, not gradients: states are good for every build."""
    q, k, v = (x.requires_grad_() for x in example())
    found = builds(BF16, 64)
    for first in found:
        for second in found:
            with topk_attn.cuda.override(build=first):
                out = topk_attn.topk_attn_func(q, k, v, topk=9)
                want = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
            with topk_attn.cuda.override(build=second):
                got = torch.autograd.grad(out.sum(), (q, k, v))
            for a, b in zip(got, want, strict=True):
                assert_close(a.cpu(), b.double().cpu(), 0.02, f"forward {first}, backward {second}")
