"""The native model against transformers: logits, loss and every gradient, dense attention, float32."""

import pytest
import torch
from safetensors.torch import load_file
from trainer_helpers import (
    FAMILIES,
    assert_close,
    load_model,
    packed_batch,
    reference,
    run_probe,
    save_model,
    tiny_model,
)

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500.5},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn_options": {
        "rope_type": "yarn",
        "rope_theta": 3000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 48,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.7,
    },
}
LENGTHS = (37, 1, 64, 23)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, tied, tmp_path):
    model = tiny_model(family, tie_word_embeddings=tied)
    batch = packed_batch(LENGTHS, 131)
    got = run_probe(save_model(model, tmp_path / "model"), batch, tmp_path)
    assert_close(got, reference(model, batch))
    assert torch.allclose(got["loss"], got["loss_without_grad"], rtol=1e-6)


@pytest.mark.parametrize(
    "family,overrides",
    [
        ("llama", dict(attention_bias=True, mlp_bias=True)),
        ("llama", dict(num_key_value_heads=4)),
        ("llama", dict(num_key_value_heads=1, head_dim=20)),
        ("llama", dict(pad_token_id=3)),
        ("llama", dict(pad_token_id=3, tie_word_embeddings=True)),
        ("mistral", dict(head_dim=8, num_attention_heads=6, num_key_value_heads=3)),
        ("qwen2", dict(use_sliding_window=False, sliding_window=16)),
        ("qwen3", dict(attention_bias=True, head_dim=40)),
    ],
    ids=["bias", "mha", "mqa", "pad", "pad_tied", "head_dim", "window_off", "qwen3_bias"],
)
def test_variants_equal_transformers(family, overrides, tmp_path):
    model = tiny_model(family, **overrides)
    batch = packed_batch(LENGTHS, 131)
    got = run_probe(save_model(model, tmp_path / "model"), batch, tmp_path)
    assert_close(got, reference(model, batch))


@pytest.mark.parametrize("rope", ROPES)
def test_rope_types_equal_transformers(rope, tmp_path):
    model = tiny_model("llama", rope_parameters=dict(ROPES[rope]), head_dim=32)
    batch = packed_batch((200, 150), 131)
    got = run_probe(save_model(model, tmp_path / "model"), batch, tmp_path)
    assert_close(got, reference(model, batch))


@pytest.mark.parametrize("rope", ["theta", "linear", "llama3", "yarn_options"])
def test_keys_of_transformers_4(rope, tmp_path):
    """rope_theta beside rope_scaling, `type` for `rope_type`, torch_dtype: the same model."""
    scaling = dict(ROPES[rope])
    theta = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    model = tiny_model("llama", rope_parameters=dict(ROPES[rope]), head_dim=32)
    folder = save_model(
        model,
        tmp_path / "model",
        rope_parameters=...,
        dtype=...,
        rope_theta=theta,
        rope_scaling=None if kind == "default" else {"type": kind, **scaling},
        torch_dtype="float32",
    )
    batch = packed_batch((120,), 131)
    assert_close(run_probe(folder, batch, tmp_path), reference(model, batch))


@pytest.mark.parametrize("long_position", [100_000])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_at_long_positions(rope, long_position, tmp_path):
    """At position 1e5 a last-bit difference of a frequency would show: cos and sin come from equal bits."""
    model = tiny_model("llama", rope_parameters=dict(ROPES[rope]), head_dim=32)
    batch = packed_batch((24,), 131)
    batch["position_ids"] += torch.arange(24) * long_position
    got = run_probe(save_model(model, tmp_path / "model"), batch, tmp_path)
    want = model(input_ids=batch["input_ids"][None], position_ids=batch["position_ids"][None]).logits[0]
    assert_close(got, {"logits": want.detach()} | {k: v for k, v in got.items() if k.startswith("grad.")})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_equals_alone(family, tmp_path):
    folder = save_model(tiny_model(family), tmp_path / "model")
    batch = packed_batch(LENGTHS, 131)
    together = run_probe(folder, batch, tmp_path)
    begin = 0
    total = 0.0
    for length in LENGTHS:
        alone = {key: batch[key][begin : begin + length] for key in ("input_ids", "position_ids", "labels")}
        alone["cu_seqlens"] = torch.tensor([0, length], dtype=torch.int32)
        got = run_probe(folder, alone, tmp_path)
        assert torch.allclose(got["logits"], together["logits"][begin : begin + length], atol=2e-5, rtol=1e-5)
        total += got["loss"].item()
        begin += length
    assert total == pytest.approx(together["loss"].item(), rel=1e-6)


def test_empty_documents_change_nothing(tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    batch = packed_batch((20, 30), 131)
    want = run_probe(folder, batch, tmp_path)
    batch["cu_seqlens"] = torch.tensor([0, 0, 20, 20, 20, 50, 50], dtype=torch.int32)
    got = run_probe(folder, batch, tmp_path)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_checkpointing_changes_no_bit(family, dtype, recompute, tmp_path):
    folder = save_model(tiny_model(family, tie_word_embeddings=family == "llama"), tmp_path / "model")
    batch = packed_batch(LENGTHS, 131)
    plain = run_probe(folder, batch, tmp_path, dtype=dtype)
    again = run_probe(folder, batch, tmp_path, dtype=dtype, recompute=recompute)
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_bfloat16_close_to_transformers(tmp_path):
    """bfloat16 weights and arithmetic: as far from float32 as transformers' own bfloat16 is."""
    model = tiny_model("llama")
    folder = save_model(model, tmp_path / "model")
    batch = packed_batch((50, 70), 131)
    got = run_probe(folder, batch, tmp_path, dtype="bfloat16")
    assert got["logits"].dtype == torch.bfloat16 and got["loss"].dtype == torch.float32
    want = reference(model, batch)
    theirs = reference(load_model(folder, torch.bfloat16), batch)
    for name, expected in want.items():
        ours = (got[name].float() - expected).norm().item()
        allowed = 1.5 * (theirs[name].float() - expected).norm().item() + 1e-3 * expected.norm().item()
        assert ours <= allowed, f"{name}: {ours:.3g}, transformers {allowed:.3g}"


def test_stored_bfloat16_and_float16_weights(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        folder = save_model(tiny_model("llama").to(dtype), tmp_path / str(dtype)[6:])
        batch = packed_batch((30,), 131)
        assert_close(run_probe(folder, batch, tmp_path), reference(load_model(folder, torch.float32), batch))


def test_all_labels_ignored_gives_zero(tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    batch = packed_batch((10, 5), 131)
    batch["labels"].fill_(-100)
    got = run_probe(folder, batch, tmp_path)
    assert got["loss"].item() == 0.0
    assert all(not value.any() for key, value in got.items() if key.startswith("grad."))


def test_large_vocabulary_is_chunked(tmp_path):
    """More logits than one chunk holds: the sums over chunks are the whole."""
    model = tiny_model("llama", vocab_size=70_001, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    batch = packed_batch((400, 300), 70_001, ignored=0.0)
    got = run_probe(save_model(model, tmp_path / "model"), batch, tmp_path)
    assert_close(got, reference(model, batch))


def test_sharded_weights(tmp_path):
    model = tiny_model("llama")
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    batch = packed_batch((30,), 131)
    assert_close(run_probe(folder, batch, tmp_path), reference(model, batch))


def test_tied_checkpoint_may_carry_an_equal_head(tmp_path):
    from safetensors.torch import save_file

    model = tiny_model("llama", tie_word_embeddings=True)
    folder = save_model(model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    batch = packed_batch((30,), 131)
    assert_close(run_probe(folder, batch, tmp_path), reference(model, batch))
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = run_probe(folder, batch, tmp_path, ok=False)
    assert "lm_head.weight" in message and "tie_word_embeddings" in message
