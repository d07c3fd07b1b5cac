"""Swapping torch's SDPA: everywhere inside, nowhere outside, never silently dense."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_directly
from torch.utils.checkpoint import checkpoint

import topk_attn
from topk_attn import patch_model, scaled_dot_product_topk_attention, topk_attention, unpatch_model

TORCH_SDPA = F.scaled_dot_product_attention


def qkv(t=9):
    return [torch.randn(2, 4, t, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Block(torch.nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class Model(torch.nn.Module):
    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.checkpointing = checkpointing

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


X = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))


def test_swaps_inside_and_restores_outside():
    q, k, v = qkv()
    dense = F.scaled_dot_product_attention(q, k, v)
    with topk_attention(topk=2, sink=1):
        inside = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(inside, scaled_dot_product_topk_attention(q, k, v, topk=2, sink=1))
    assert not torch.allclose(inside, dense)
    assert F.scaled_dot_product_attention is TORCH_SDPA
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), dense)


def test_reaches_references_taken_before():
    q, k, v = qkv()
    expected = scaled_dot_product_topk_attention(q, k, v, topk=2)
    with topk_attention(topk=2):
        assert torch.equal(imported_directly(q, k, v), expected)
        assert torch.equal(torch._C._nn.scaled_dot_product_attention(q, k, v), expected)


def test_passes_every_argument():
    q, k, v = qkv()
    mask = torch.tensor([True] * 6 + [False] * 3)[None]
    with topk_attention(ratio=1.0):
        for arguments in (dict(is_causal=True), dict(attn_mask=mask), dict(scale=0.2)):
            torch.testing.assert_close(
                F.scaled_dot_product_attention(q, k, v, **arguments), TORCH_SDPA_OF(q, k, v, **arguments)
            )
        positional = F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        torch.testing.assert_close(positional, TORCH_SDPA_OF(q, k, v, is_causal=True))
        grouped = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        torch.testing.assert_close(grouped, TORCH_SDPA_OF(q, k[:, :2], v[:, :2], enable_gqa=True))


def TORCH_SDPA_OF(*args, **kwargs):
    with torch._C.DisableTorchFunction():
        return TORCH_SDPA(*args, **kwargs)


def test_nested_blocks_and_exceptions():
    q, k, v = qkv()
    with topk_attention(topk=2):
        with topk_attention(topk=5):
            inner = F.scaled_dot_product_attention(q, k, v)
        with pytest.raises(RuntimeError, match="boom"), topk_attention(topk=7):
            raise RuntimeError("boom")
        outer = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(inner, scaled_dot_product_topk_attention(q, k, v, topk=5))
    assert torch.equal(outer, scaled_dot_product_topk_attention(q, k, v, topk=2))
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_other_threads_keep_their_own_attention():
    q, k, v = qkv()
    dense = F.scaled_dot_product_attention(q, k, v)
    results = {}
    entered, done = threading.Event(), threading.Event()

    def other():
        entered.wait()
        results["plain"] = F.scaled_dot_product_attention(q, k, v)
        with topk_attention(topk=5):
            results["own"] = F.scaled_dot_product_attention(q, k, v)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with topk_attention(topk=2):
        entered.set()
        done.wait()
        results["main"] = F.scaled_dot_product_attention(q, k, v)
    thread.join()
    assert torch.equal(results["plain"], dense)
    assert torch.equal(results["own"], scaled_dot_product_topk_attention(q, k, v, topk=5))
    assert torch.equal(results["main"], scaled_dot_product_topk_attention(q, k, v, topk=2))
    assert F.scaled_dot_product_attention is TORCH_SDPA


@pytest.mark.parametrize(
    "arguments,word",
    [
        (dict(dropout_p=0.1), "dropout_p"),
        (dict(attn_mask=torch.zeros(9, 9)), "attn_mask"),
        (dict(attn_mask=torch.ones(9, 9, dtype=torch.bool).tril()), "attn_mask"),
    ],
)
def test_refuses_what_it_cannot_honour(arguments, word):
    with topk_attention(topk=2), pytest.raises(ValueError, match=word):
        F.scaled_dot_product_attention(*qkv(), **arguments)
    assert F.scaled_dot_product_attention is TORCH_SDPA


@pytest.mark.parametrize(
    "arguments,error",
    [
        (dict(), ValueError),
        (dict(topk=1, ratio=0.5), ValueError),
        (dict(ratio=2.0), ValueError),
        (dict(topk=2, window=3), TypeError),
        (dict(topk=2, scale=1.0), TypeError),
    ],
)
def test_bad_arguments_raise_on_entry(arguments, error):
    for call in (lambda: topk_attention(**arguments).__enter__(), lambda: patch_model(Model(), **arguments)):
        with pytest.raises(error):
            call()
    assert F.scaled_dot_product_attention is TORCH_SDPA


def test_multihead_attention():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    for training in (True, False):
        attention.train(training)
        dense = attention(X, X, X, need_weights=False)[0]
        with topk_attention(ratio=1.0):
            torch.testing.assert_close(attention(X, X, X, need_weights=False)[0], dense, rtol=1e-4, atol=1e-5)
        with topk_attention(topk=1):
            assert not torch.allclose(attention(X, X, X, need_weights=False)[0], dense)
            with pytest.raises(ValueError, match="need_weights"):
                attention(X, X, X)
        assert torch.equal(attention(X, X, X, need_weights=False)[0], dense)


def test_transformer_encoder_fast_path_is_not_silently_dense():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True, dropout=0.0)
    encoder = torch.nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        dense = encoder(X)
        with topk_attention(ratio=1.0):
            torch.testing.assert_close(encoder(X), dense, rtol=1e-4, atol=1e-4)
        with topk_attention(topk=1):
            assert not torch.allclose(encoder(X), dense)


# ------------------------------------------------------------------------------------------------------------
# Whole models
# ------------------------------------------------------------------------------------------------------------


def test_patch_model_and_unpatch():
    model, same = Model(), Model()
    dense = model(X)
    assert patch_model(model, topk=2) is model
    sparse = model(X)
    with topk_attention(topk=2):
        assert torch.equal(sparse, same(X))
    assert not torch.allclose(sparse, dense)
    assert torch.equal(same(X), dense), "another model was touched"
    assert F.scaled_dot_product_attention is TORCH_SDPA
    patch_model(model, ratio=1.0)
    torch.testing.assert_close(model(X), dense, rtol=1e-5, atol=1e-5)
    assert torch.equal(unpatch_model(model)(X), dense)
    assert torch.equal(unpatch_model(model)(X), dense)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._forward_hooks_always_called and not module._forward_pre_hooks_with_kwargs


def test_patched_parts_of_a_model():
    model = Model()
    patch_model(model.blocks[0], topk=1)
    by_hand = Model()
    with topk_attention(topk=1):
        x = by_hand.blocks[0](X)
    assert torch.equal(model(X), by_hand.blocks[1](x))


def test_patched_model_with_activation_checkpointing():
    plain, checkpointed = Model(), Model(checkpointing=True)
    for model in (plain, checkpointed):
        patch_model(model, topk=3)
        model(X).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def test_an_exception_in_a_patched_model_leaves_nothing_behind():
    model = patch_model(Model(), topk=2)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 12, 31))
    assert F.scaled_dot_product_attention is TORCH_SDPA
    q, k, v = qkv()
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), TORCH_SDPA_OF(q, k, v))
    assert model(X).shape == X.shape


def test_copies_and_pickles_of_a_patched_model():
    model = patch_model(Model(), topk=2)
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)
    clone = copy.deepcopy(model)
    unpatch_model(clone)
    assert not torch.allclose(clone(X), expected)
    assert torch.equal(model(X), expected)


def test_state_dict_and_hooks_of_others_are_untouched():
    model = Model()
    keys = list(model.state_dict())
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    patch_model(model, topk=2)
    model(X)
    assert list(model.state_dict()) == keys
    unpatch_model(model)
    model(X)
    assert len(seen) == 2


def test_names_are_exported():
    for name in topk_attn.sdpa.__all__:
        assert getattr(topk_attn, name) is getattr(topk_attn.sdpa, name)
