"""topk_attn.nn.TopKAttention: shapes, equality with its parts, packing, arguments, saving."""

import copy

import pytest
import torch
import torch.nn.functional as F

from topk_attn import topk_attn_func
from topk_attn.nn import TopKAttention


def module(**arguments) -> TopKAttention:
    torch.manual_seed(0)
    return TopKAttention(48, 6, **{"num_kv_heads": 2, "topk": 3, **arguments})


def test_equals_its_projections_and_the_function():
    attention = module(sink=1, select="kv_group", bias=True)
    x = torch.randn(2, 9, 48)
    q = attention.q_proj(x).view(2, 9, 6, 8)
    k, v = (proj(x).view(2, 9, 2, 8) for proj in (attention.k_proj, attention.v_proj))
    out = topk_attn_func(q, k, v, topk=3, sink=1, select="kv_group")
    assert torch.equal(attention(x), attention.o_proj(out.reshape(2, 9, 48)))


@pytest.mark.parametrize("causal", [False, True])
def test_ratio_one_is_dense_attention(causal):
    attention = module(topk=None, ratio=1.0, causal=causal)
    x = torch.randn(2, 9, 48)
    q = attention.q_proj(x).view(2, 9, 6, 8).transpose(1, 2)
    k, v = (proj(x).view(2, 9, 2, 8).transpose(1, 2) for proj in (attention.k_proj, attention.v_proj))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    expected = attention.o_proj(dense.transpose(1, 2).reshape(2, 9, 48))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_seqlen", [None, 7])
def test_packed_documents_equal_themselves_alone(max_seqlen):
    attention = module(ratio=0.4, topk=None)
    x = torch.randn(12, 48)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = attention(x, cu, max_seqlen)
    alone = torch.cat([attention(x[None, :5])[0], attention(x[None, 5:])[0]])
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_gradient():
    attention = module(bias=True)
    attention(torch.randn(2, 9, 48)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in attention.named_parameters()
        if n != "k_proj.bias"
    )


def test_defaults_and_parameter_shapes():
    attention = TopKAttention(64, 4, ratio=0.5)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {f"{x}_proj.weight": (64, 64) for x in "qkvo"}
    attention = TopKAttention(64, 4, 1, 24, ratio=0.5, bias=True, dtype=torch.bfloat16, device="meta")
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes["q_proj.weight"] == (96, 64) and shapes["k_proj.weight"] == (24, 64)
    assert shapes["o_proj.weight"] == (64, 96) and shapes["o_proj.bias"] == (64,)
    assert {p.dtype for p in attention.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in attention.parameters()} == {"meta"}


def test_state_and_copies():
    attention, other = module(), module()
    torch.nn.init.normal_(other.q_proj.weight)
    x = torch.randn(1, 5, 48)
    assert not torch.equal(other(x), attention(x))
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(x), attention(x))
    assert torch.equal(copy.deepcopy(attention)(x), attention(x))


def test_repr_shows_the_budget():
    assert "ratio=1.0" in repr(module(topk=None, ratio=1.0))
    text = repr(module(sink=2))
    assert "topk=3" in text and "sink=2" in text and "num_kv_heads=2" in text and "recent" not in text


@pytest.mark.parametrize(
    "arguments,name",
    [
        (dict(embed_dim=0, num_heads=2, topk=2), "embed_dim"),
        (dict(embed_dim=64, num_heads=0, topk=2), "num_heads"),
        (dict(embed_dim=64, num_heads=4, num_kv_heads=0, topk=2), "num_kv_heads"),
        (dict(embed_dim=64, num_heads=4, num_kv_heads=3, topk=2), "num_kv_heads"),
        (dict(embed_dim=65, num_heads=4, topk=2), "embed_dim"),
        (dict(embed_dim=48, num_heads=4, topk=2), "head_dim is 12"),
        (dict(embed_dim=48, num_heads=4, head_dim=264, topk=2), "head_dim is 264"),
        (dict(embed_dim=64, num_heads=4), "topk"),
        (dict(embed_dim=64, num_heads=4, topk=2, ratio=0.5), "ratio"),
        (dict(embed_dim=64, num_heads=4, ratio=1.5), "ratio"),
        (dict(embed_dim=64, num_heads=4, topk=2, select="all"), "select"),
        (dict(embed_dim=64, num_heads=4, topk=2, sink=-1), "sink"),
        (dict(embed_dim=64, num_heads=4, topk=2, softmax_scale=0.0), "softmax_scale"),
    ],
)
def test_bad_arguments_name_themselves(arguments, name):
    with pytest.raises(ValueError, match=name):
        TopKAttention(**arguments)


def test_bad_inputs():
    attention = module()
    for x, cu, word in (
        (torch.zeros(2, 9, 40), None, "embed_dim"),
        (torch.zeros(9, 48), None, "cu_seqlens|dimensions"),
        (torch.zeros(1, 9, 48), torch.tensor([0, 9], dtype=torch.int32), "dimensions"),
    ):
        with pytest.raises(ValueError, match=word):
            attention(x, cu)


def test_compiles_without_a_graph_break():
    attention = module()
    x = torch.randn(2, 9, 48)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), attention(x))
