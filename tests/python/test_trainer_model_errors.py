"""The native model refuses broken folders and batches in one line that names file, tensor and fault."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_helpers import edit_config, packed_batch, run_probe, save_model, tiny_model

BATCH = packed_batch((12, 8), 131)


@pytest.fixture
def folder(tmp_path):
    return save_model(tiny_model("llama"), tmp_path / "model")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"}
    )


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [Q, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_non_finite_weights(folder, tmp_path, name, value):
    def change(weights):
        weights[name].view(-1)[5] = value

    rewrite(folder, change)
    message = run_probe(folder, BATCH, tmp_path, ok=False)
    assert f"tensor {name} holds 1 values that are NaN or infinite" in message
    assert "at element 5" in message and str(folder) in message


def test_overflow_by_conversion(folder, tmp_path):
    rewrite(folder, lambda weights: weights.update({Q: weights[Q].double() * 1e300}))
    assert f"{Q} holds" in (message := run_probe(folder, BATCH, tmp_path, ok=False))
    assert "as Float" in message


@pytest.mark.parametrize("name", [Q, "model.norm.weight", "lm_head.weight"])
def test_missing_tensor(folder, tmp_path, name):
    rewrite(folder, lambda weights: weights.pop(name))
    assert f"missing tensors: {name}" in run_probe(folder, BATCH, tmp_path, ok=False)


def test_unexpected_tensor(folder, tmp_path):
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    message = run_probe(folder, BATCH, tmp_path, ok=False)
    assert "does not have: model.layers.0.self_attn.q_proj.bias" in message


def test_other_names(folder, tmp_path):
    def change(weights):
        for name in list(weights):
            weights["base." + name] = weights.pop(name)

    rewrite(folder, change)
    message = run_probe(folder, BATCH, tmp_path, ok=False)
    assert "missing tensors: model.embed_tokens.weight" in message and "and 18 more" in message
    assert "base.lm_head.weight" in message


def test_rotary_buffers_of_old_exports_are_ignored(folder, tmp_path):
    want = run_probe(folder, BATCH, tmp_path)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)}
    rewrite(folder, lambda weights: weights.update(buffers))
    assert torch.equal(run_probe(folder, BATCH, tmp_path)["logits"], want["logits"])


@pytest.mark.parametrize("shape", [(64, 63), (64 * 64,), (1, 64, 64)])
def test_wrong_shape(folder, tmp_path, shape):
    rewrite(folder, lambda weights: weights.update({Q: torch.zeros(shape)}))
    message = run_probe(folder, BATCH, tmp_path, ok=False)
    assert f"tensor {Q} has shape {list(shape)}: config.json asks for [64, 64]" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_wrong_dtype(folder, tmp_path, dtype):
    rewrite(folder, lambda weights: weights.update({Q: torch.zeros(64, 64, dtype=dtype)}))
    assert f"tensor {Q} is" in (message := run_probe(folder, BATCH, tmp_path, ok=False))
    assert "must be F32, BF16, F16 or F64" in message


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -1000])
def test_truncated_file(folder, tmp_path, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in run_probe(folder, BATCH, tmp_path, ok=False)


def test_folder_without_files(tmp_path):
    assert "config.json" in run_probe(tmp_path / "nowhere", BATCH, tmp_path, ok=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in run_probe(empty, BATCH, tmp_path, ok=False)


def test_config_of_another_model(folder, tmp_path):
    edit_config(folder, num_hidden_layers=3)
    assert "missing tensors: model.layers.2." in run_probe(folder, BATCH, tmp_path, ok=False)
    edit_config(folder, num_hidden_layers=2, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    assert "q_proj.bias" in run_probe(folder, BATCH, tmp_path, ok=False)


def test_duplicate_key_in_config(folder, tmp_path):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"model_type"', '"hidden_size": 32, "model_type"'))
    assert 'duplicate key "hidden_size"' in run_probe(folder, BATCH, tmp_path, ok=False)


@pytest.mark.parametrize(
    "key,value,part",
    [
        (
            "input_ids",
            torch.full((20,), 131),
            "input_ids has values from 131 to 131: they must lie from 0 to 130",
        ),
        ("input_ids", torch.full((20,), -1), "input_ids"),
        ("labels", torch.full((20,), 131), "labels has values from 131"),
        ("labels", torch.full((20,), -1), "labels has values from -1"),
        ("labels", torch.full((19,), 1), "labels must be Long (20), got Long [19]"),
        ("position_ids", torch.full((20,), -1), "position_ids"),
        ("cu_seqlens", torch.tensor([0, 12, 19], dtype=torch.int32), "cu_seqlens must rise from 0"),
        ("cu_seqlens", torch.tensor([1, 12, 20], dtype=torch.int32), "cu_seqlens must rise from 0"),
        ("cu_seqlens", torch.tensor([0, 12, 8, 20], dtype=torch.int32), "cu_seqlens must rise from 0"),
        ("cu_seqlens", torch.tensor([0, 12, 20]), "cu_seqlens must be Int"),
    ],
)
def test_broken_batches(folder, tmp_path, key, value, part):
    assert part in run_probe(folder, {**BATCH, key: value}, tmp_path, ok=False)


@pytest.mark.parametrize(
    "block,part",
    [
        ({"version": 1}, "exactly one of topk and ratio"),
        ({"version": 1, "ratio": 0.0}, "ratio"),
        ({"version": 1, "ratio": 0.1, "dense_layers": [2]}, "layers 0 to 1"),
        ({"version": 1, "ratio": 0.1, "prefill": "dense"}, "decoding mode"),
    ],
)
def test_attention_settings(folder, tmp_path, block, part):
    assert part in run_probe(folder, BATCH, tmp_path, ok=False, attention=block)


def test_head_dim_that_the_operator_lacks(tmp_path):
    folder = save_model(tiny_model("llama", head_dim=20), tmp_path / "model")
    message = run_probe(folder, BATCH, tmp_path, ok=False, attention={"version": 1, "ratio": 0.1})
    assert "multiple of 8" in message and "20" in message


def test_own_attention_must_be_complete(folder, tmp_path):
    edit_config(folder, topk_attention={"version": 1, "ratio": 0.1})
    assert "attn_implementation is absent" in run_probe(folder, BATCH, tmp_path, ok=False, attention="own")
    edit_config(folder, topk_attention=..., attn_implementation="topk_attn")
    assert "topk_attention" in run_probe(folder, BATCH, tmp_path, ok=False, attention="own")


def test_index_errors_name_the_shard(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder, max_shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q] = "model-00099-of-00099.safetensors"
    path.write_text(json.dumps(index))
    assert "model-00099-of-00099.safetensors" in run_probe(folder, BATCH, tmp_path, ok=False)
