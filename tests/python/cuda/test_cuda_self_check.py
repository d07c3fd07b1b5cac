"""The measurement of score bits at first use (csrc/ops/cuda_bits.h), and what a card that fails it gets."""

import pytest
import torch
from cuda_helpers import BF16, F16, F32, Way, builds, make_qkv

import topk_attn

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(autouse=True)
def fresh_verdicts():
    torch.ops.topk_attn._cuda_reset_bits("")
    yield
    torch.ops.topk_attn._cuda_reset_bits("")


def run(dtype=BF16, d=64):
    q, k, v = make_qkv(1, 96, 96, 2, 1, d, dtype=dtype, seed=2)
    out = topk_attn.topk_attn_func(q, k, v, topk=7)
    return out, topk_attn.cuda.last_plan()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("d", [40, 64, 128, 256])
def test_this_card_agrees(dtype, d):
    """In every build, or the calls below would warn or raise."""
    for build in builds(dtype, d):
        with Way(build).used():
            run(dtype, d)


def test_sm90_that_disagrees_is_replaced():
    if "sm90" not in builds(BF16, 64):
        pytest.skip("this GPU has no sm90 build")
    want, plan = run()
    assert plan.build == "sm90"
    torch.ops.topk_attn._cuda_reset_bits("sm90")
    got, plan = run()
    assert plan.build == "portable"
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    # Who asked for it gets an error instead.
    with topk_attn.cuda.override(build="sm90"), pytest.raises(RuntimeError, match="do not compute identical"):
        run()
    with topk_attn.cuda.override(largest_share=0.5), pytest.raises(RuntimeError, match="do not compute"):
        run()


def test_portable_that_disagrees_raises():
    torch.ops.topk_attn._cuda_reset_bits("portable")
    with (
        topk_attn.cuda.override(build="portable"),
        pytest.raises(RuntimeError, match="'portable' do not compute"),
    ):
        run()
    run(F32)  # the plain build has one routine


def test_it_costs_nothing_but_the_first_time():
    run()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    with torch.autograd.profiler.profile(use_device="cuda") as profile:
        run()
    assert torch.cuda.memory_allocated() == allocated
    copies = [e.key for e in profile.key_averages() if "Memcpy DtoH" in e.key]
    assert not copies, copies


def test_graph_capture_leaves_it_to_later():
    """A capture cannot wait for a verdict, and must not be broken by the attempt."""
    q, k, v = make_qkv(1, 96, 96, 2, 1, 64, dtype=BF16, seed=2)
    want = topk_attn.topk_attn_func(q, k, v, topk=7)
    torch.ops.topk_attn._cuda_reset_bits("")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = topk_attn.topk_attn_func(q, k, v, topk=7)
    graph.replay()
    assert torch.equal(out, want)
