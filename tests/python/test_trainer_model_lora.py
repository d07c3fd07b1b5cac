"""Adapters of a frozen model: gradients against PyTorch, checkpointing in chunks, and the merged export."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from trainer_helpers import (
    assert_close,
    load_model,
    packed_batch,
    reference,
    run_probe,
    save_model,
    tiny_model,
)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOPK = {"version": 1, "ratio": 0.3, "min_keys": 2}
RANK, ALPHA = 5, 12.0


class Adapted(torch.nn.Module):
    """linear(x) + alpha / r * B A x"""

    def __init__(self, linear, a, b):
        super().__init__()
        self.linear = linear
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x):
        return self.linear(x) + ALPHA / RANK * F.linear(F.linear(x, self.a), self.b)


def adapters(model, targets, seed=5):
    """Values of A and B, neither zero, by the names the trainer gives them."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, module in model.named_modules():
        if name.split(".")[-1] in targets:
            out_size, in_size = module.weight.shape
            out[f"{name}.lora_A.weight"] = 0.2 * torch.randn(RANK, in_size, generator=generator)
            out[f"{name}.lora_B.weight"] = 0.2 * torch.randn(out_size, RANK, generator=generator)
    return out


def adapted(model, values):
    """The model with its parameters frozen and the adapters in place."""
    model.requires_grad_(False)
    for name in {key.rsplit(".lora_", 1)[0] for key in values}:
        parent, child = name.rsplit(".", 1)
        parent = model.get_submodule(parent)
        a, b = (values[f"{name}.lora_{letter}.weight"].clone() for letter in "AB")
        setattr(parent, child, Adapted(getattr(parent, child), a, b))
    return model


def adapted_reference(model, batch):
    """reference() of the adapters alone, with the trainer's names."""

    class Adapters:
        def __call__(self, **given):
            return model(**given)

        def zero_grad(self):
            model.zero_grad()

        def named_parameters(self):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    base, letter = name.rsplit(".", 1)
                    yield f"{base}.lora_{letter.upper()}.weight", parameter

    return reference(Adapters(), batch)


def inputs(batch, values):
    return {**batch, **{f"adapter.{name}": value for name, value in values.items()}}


def lora(targets):
    return {"r": RANK, "alpha": ALPHA, "targets": targets}


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["down_proj"]], ids=["all", "qv", "down"])
@pytest.mark.parametrize("family,bias", [("llama", True), ("qwen2", False), ("qwen3", False)])
def test_equals_pytorch(family, bias, targets, tmp_path):
    overrides = dict(attention_bias=True, mlp_bias=True) if bias else {}
    model = tiny_model(family, **overrides)
    folder = save_model(model, tmp_path / "model")
    batch = packed_batch((37, 1, 64, 23), 131)
    values = adapters(model, targets)
    got = run_probe(folder, inputs(batch, values), tmp_path, lora=lora(targets))
    want = adapted_reference(adapted(model, values), batch)
    assert len(values) == 2 * 2 * len(targets)
    assert_close(got, want)
    assert torch.allclose(got["loss"], got["loss_without_grad"], rtol=1e-6)


@pytest.mark.parametrize("attention", ["dense", TOPK], ids=["dense", "topk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_no_bit(attention, dtype, tmp_path):
    model = tiny_model("qwen3")
    folder = save_model(model, tmp_path / "model")
    batch = inputs(packed_batch((60, 31), 131), adapters(model, ALL))
    settings = dict(lora=lora(ALL), attention=attention, dtype=dtype)
    plain = run_probe(folder, batch, tmp_path, **settings)
    for recompute in ("all", "all_but_attention"):
        again = run_probe(folder, batch, tmp_path, recompute=recompute, **settings)
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("attention", ["dense", TOPK], ids=["dense", "topk"])
@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_chunks_of_tokens_add_up(attention, recompute, adapter, tmp_path):
    model = tiny_model("qwen3", attention_bias=True)
    folder = save_model(model, tmp_path / "model")
    batch = packed_batch((60, 31), 131)
    settings = dict(attention=attention, recompute=recompute)
    if adapter:
        batch = inputs(batch, adapters(model, ALL))
        settings["lora"] = lora(ALL)
    plain = run_probe(
        folder, batch, tmp_path, attention=attention, **({"lora": lora(ALL)} if adapter else {})
    )
    for tokens in (90, 32, 7):
        chunked = run_probe(folder, batch, tmp_path, chunk_tokens=tokens, **settings)
        assert_close(chunked, plain, rtol=2e-6)


def test_chunks_in_bfloat16_lose_little(tmp_path):
    model = tiny_model("qwen3")
    folder = save_model(model, tmp_path / "model")
    batch = packed_batch((60, 31), 131)
    exact = run_probe(folder, batch, tmp_path)
    plain = run_probe(folder, batch, tmp_path, dtype="bfloat16")
    chunked = run_probe(folder, batch, tmp_path, dtype="bfloat16", recompute="all", chunk_tokens=16)

    def distance(got, name):
        return (got[name].double() - exact[name].double()).norm() / exact[name].double().norm()

    for name in exact:
        assert distance(chunked, name) < 1.3 * distance(plain, name) + 1e-3, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_the_merged_model(dtype, tmp_path):
    """Base + scaling B A in float32, rounded once; transformers loads it and agrees."""
    model = tiny_model("llama", tie_word_embeddings=True)
    source = save_model(model, tmp_path / "model")
    targets = ["q_proj", "o_proj", "down_proj"]
    values = adapters(model, targets)
    batch = packed_batch((40, 25), 131)
    got = run_probe(
        source, inputs(batch, values), tmp_path, lora=lora(targets), dtype=dtype, export=str(tmp_path / "out")
    )
    kind = getattr(torch, dtype)
    base, merged = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        want = weight.to(kind)
        if (a := name.replace(".weight", ".lora_A.weight")) in values:
            low = [values[key].to(kind).float() for key in (a.replace("lora_A", "lora_B"), a)]
            want = (want.float() + ALPHA / RANK * (low[0] @ low[1])).to(kind)
            assert not torch.equal(merged[name], weight.to(kind))
        if dtype == "float32":
            assert torch.allclose(merged[name], want, rtol=1e-6, atol=1e-7), name
        else:  # the product's last bit may turn a rounding
            assert (merged[name].float() - want.float()).abs().max() <= 2**-8 * want.float().abs().max()
            assert (merged[name] != want).float().mean() < 1e-3, name
    if dtype == "float32":
        want = reference(load_model(tmp_path / "out", torch.float32), batch)
        assert torch.allclose(got["logits"], want["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given,message",
    [
        ({"r": 0, "alpha": 1, "targets": ["q_proj"]}, "lora: the rank must be at least 1, got 0"),
        ({"r": 1, "alpha": 1, "targets": []}, "lora: there is no map to adapt"),
        ({"r": 1, "alpha": 1, "targets": ["lm_head"]}, "lora: there is no map lm_head"),
    ],
)
def test_errors(given, message, tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    assert run_probe(folder, packed_batch((9,), 131), tmp_path, ok=False, lora=given) == message


def test_offload_needs_a_gpu(tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    message = run_probe(folder, packed_batch((9,), 131), tmp_path, ok=False, offload="1", recompute="all")
    assert "activations of a cpu model are in host memory already" in message
