"""Whole models: at ratio=1 the unpatched logits, below that other ones, and every layer through the
operator."""

import pytest
import torch
from hf_helpers import LAYERS, MODELS, CountOperators, tiny_model, tokens

import topk_attn
from topk_attn import hf


@pytest.mark.parametrize("kind", MODELS)
def test_ratio_one_gives_the_unpatched_logits(kind):
    model = tiny_model(kind)
    ids = tokens(2, 40)
    with torch.no_grad():
        dense = model(ids).logits
        hf.configure(model, ratio=1.0)
        with CountOperators() as count:
            full = model(ids).logits
    torch.testing.assert_close(full, dense, rtol=1e-4, atol=1e-4)
    assert count.attention == LAYERS


@pytest.mark.parametrize("kind", MODELS)
def test_small_ratio_changes_the_logits(kind):
    model = tiny_model(kind)
    ids = tokens(2, 40)
    with torch.no_grad():
        dense = model(ids).logits
        sparse = hf.configure(model, ratio=0.05)(ids).logits
    # The first token sees itself only: nothing can be dropped.
    torch.testing.assert_close(sparse[:, 0], dense[:, 0], rtol=1e-4, atol=1e-4)
    assert (sparse - dense)[:, 8:].abs().amax() > 0.1


def test_operator_calls_are_layers_times_calls():
    model = hf.configure(tiny_model(), topk=4)
    with CountOperators() as count, torch.no_grad():
        for _ in range(3):
            model(tokens(2, 9))
    assert count.counts == {"fwd": 3 * LAYERS}
    with CountOperators() as count, torch.no_grad():
        model.generate(tokens(1, 9), max_new_tokens=5, do_sample=False)
    assert count.attention == 5 * LAYERS


def test_training_uses_the_operator_and_its_backward():
    model = hf.configure(tiny_model(), ratio=0.2, min_keys=2).train()
    ids = tokens(2, 24)
    with CountOperators() as count:
        model(ids, labels=ids).loss.backward()
    assert count.counts == {"fwd": LAYERS, "bwd": LAYERS}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_ratio_one_gives_the_unpatched_gradients():
    dense, sparse = tiny_model(), hf.configure(tiny_model(), ratio=1.0)
    ids = tokens(2, 24)
    for model in (dense, sparse):
        model(ids, labels=ids).loss.backward()
    for (name, a), b in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    plain, checkpointed = (hf.configure(tiny_model(), topk=5).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        checkpointed.enable_input_require_grads()
    ids = tokens(2, 24)
    for model in (plain, checkpointed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = tiny_model().to(dtype)
    ids = tokens(2, 20)
    with torch.no_grad():
        dense = model(ids).logits
        full = hf.configure(model, ratio=1.0)(ids).logits
    tolerance = {torch.bfloat16: 0.5, torch.float64: 1e-9}[dtype]
    assert full.dtype == dtype
    torch.testing.assert_close(full, dense, rtol=0, atol=tolerance)


def test_autocast():
    model = hf.configure(tiny_model(), ratio=0.3).train()
    ids = tokens(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16), CountOperators() as count:
        model(ids, labels=ids).loss.backward()
    assert count.attention == LAYERS
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_dense_layers_stay_dense(kind):
    ids = tokens(2, 30)
    with torch.no_grad():
        dense = tiny_model(kind)(ids).logits
        model = hf.configure(tiny_model(kind), ratio=0.05, dense_layers=[0, 2])
        with CountOperators() as count:
            mixed = model(ids).logits
        all_sparse = hf.configure(tiny_model(kind), ratio=0.05)(ids).logits
        all_dense = hf.configure(tiny_model(kind), ratio=0.05, dense_layers=[2, 1, 0])(ids).logits
    assert count.attention == 1
    assert (mixed - dense).abs().amax() > 0.1
    assert (mixed - all_sparse).abs().amax() > 0.1
    torch.testing.assert_close(all_dense, dense, rtol=1e-4, atol=1e-4)


def test_one_dense_layer_is_the_dense_layer():
    """With layer 1 sparse at ratio 1 and the others dense, nothing changes; with it sparse, layer 0 still
    agrees."""
    ids = tokens(1, 30)
    with torch.no_grad():
        dense = tiny_model()(ids, output_hidden_states=True).hidden_states
        model = hf.configure(tiny_model(), ratio=0.05, dense_layers=[0])
        mixed = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(mixed[1], dense[1], rtol=1e-4, atol=1e-4)
    assert (mixed[2] - dense[2]).abs().amax() > 0.01


def test_every_setting_reaches_the_operator():
    ids = tokens(1, 32)
    settings = [
        dict(topk=3),
        dict(topk=9),
        dict(ratio=0.1, min_keys=6),
        dict(ratio=0.9, max_keys=2),
        dict(topk=3, sink=2),
        dict(topk=3, recent=2),
        dict(topk=3, select="kv_group"),
    ]
    with torch.no_grad():
        logits = [hf.configure(tiny_model(), **one)(ids).logits for one in settings]
    for i in range(len(logits)):
        for j in range(i):
            assert (logits[i] - logits[j]).abs().amax() > 1e-3, (settings[i], settings[j])


def test_patched_model_through_sdpa_agrees():
    """The same sparsity by swapping SDPA, without transformers knowing."""
    ids = tokens(2, 20)
    with torch.no_grad():
        native = hf.configure(tiny_model(), topk=4)(ids).logits
        model = tiny_model(attn_implementation="sdpa")
        with CountOperators() as count, topk_attn.topk_attention(topk=4):
            swapped = model(ids).logits
    assert count.attention == LAYERS
    torch.testing.assert_close(swapped, native, rtol=1e-5, atol=1e-5)


def test_torch_compile_gives_the_eager_logits():
    model = hf.configure(tiny_model(), ratio=0.2)
    ids = tokens(2, 16)
    with torch.no_grad():
        eager = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_torch_compile_keeps_packed_documents_apart():
    model = hf.configure(tiny_model(), ratio=0.3)
    ids = tokens(2, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).repeat(2, 1)
    with torch.no_grad():
        eager = model(ids, position_ids=positions, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(
            ids, position_ids=positions, use_cache=False
        ).logits
        alone = model(ids[:, 5:], use_cache=False).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(eager[:, 5:], alone, rtol=1e-5, atol=1e-5)
