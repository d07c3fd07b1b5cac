"""Exported folders: files copied byte for byte, only the agreed keys of config.json edited, same model."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from trainer_helpers import (
    FAMILIES,
    assert_close,
    edit_config,
    load_model,
    packed_batch,
    reference,
    run_probe,
    save_model,
    tiny_model,
)

BATCH = packed_batch((40, 25), 131)
OTHER_FILES = {
    "tokenizer.json": b'{"version": "1.0",  "odd": "spacing \xc3\xa9"}\n\n',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}\r\n{% endfor %}",
    "special_tokens_map.json": b'{"pad_token": "<p>"}',
    "README.md": b"about",
}


def source_folder(tmp_path, family="llama", **overrides):
    folder = save_model(tiny_model(family, **overrides), tmp_path / "source")
    for name, content in OTHER_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_bytes(b"tools")
    (folder / ".hidden").write_text("x")
    (folder / "pytorch_model.bin").write_text("x")
    (folder / "runs").mkdir()
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_export_is_the_same_model(family, tied, tmp_path):
    source = source_folder(tmp_path, family, tie_word_embeddings=tied)
    target = tmp_path / "a" / "target"
    got = run_probe(source, BATCH, tmp_path, export=str(target))
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    names = {path.name for path in target.iterdir()}
    assert names == {
        *OTHER_FILES,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "additional_chat_templates",
    }
    for name in [*OTHER_FILES, "generation_config.json", "additional_chat_templates/tools.jinja"]:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    with safe_open(target / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    want, have = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert want.keys() == have.keys() and ("lm_head.weight" in have) == (not tied)
    assert all(torch.equal(want[name], have[name]) for name in want)
    assert_close(got, reference(load_model(target, torch.float32), BATCH))


def test_sparse_export_changes_only_the_agreed_keys(tmp_path):
    source = source_folder(tmp_path)
    block = {"version": 1, "ratio": 0.1, "min_keys": 4, "select": "kv_group", "dense_layers": [1]}
    run_probe(source, {}, tmp_path, export=str(tmp_path / "t"), attention=block, dtype="bfloat16")
    want = json.loads((source / "config.json").read_text())
    have = json.loads((tmp_path / "t" / "config.json").read_text())
    assert have.pop("attn_implementation") == "topk_attn"
    assert have.pop("topk_attention") == block
    assert have.pop("dtype") == "bfloat16" and want.pop("dtype") == "float32"
    assert have == want and list(have) == list(want)
    assert {tensor.dtype for tensor in load_file(tmp_path / "t" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_dense_export_of_a_sparse_folder_drops_the_block(tmp_path):
    source = source_folder(tmp_path)
    before = json.loads((source / "config.json").read_text())
    edit_config(source, attn_implementation="topk_attn", topk_attention={"version": 1, "ratio": 0.1})
    run_probe(source, {}, tmp_path, export=str(tmp_path / "t"), attention="dense")
    assert json.loads((tmp_path / "t" / "config.json").read_text()) == before
    run_probe(source, {}, tmp_path, export=str(tmp_path / "u"), attention="own")
    assert (tmp_path / "u" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_old_dtype_key_stays_the_only_one(tmp_path):
    source = source_folder(tmp_path)
    edit_config(source, dtype=..., torch_dtype="float32")
    run_probe(source, {}, tmp_path, export=str(tmp_path / "t"), dtype="bfloat16")
    have = json.loads((tmp_path / "t" / "config.json").read_text())
    assert have["torch_dtype"] == "bfloat16" and "dtype" not in have


def test_shards(tmp_path):
    source = source_folder(tmp_path)
    target = tmp_path / "t"
    got = run_probe(source, BATCH, tmp_path, export=str(target), max_shard_bytes=60_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    weights = load_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    for shard in shards:
        tensors = load_file(target / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(tensors)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 60_000
    assert_close(got, reference(load_model(target, torch.float32), BATCH))
    again = run_probe(target, BATCH, tmp_path)
    assert all(torch.equal(got[name], again[name]) for name in got)


def test_an_existing_folder_is_not_touched(tmp_path):
    source = source_folder(tmp_path)
    target = tmp_path / "t"
    target.mkdir()
    (target / "precious").write_text("x")
    message = run_probe(source, {}, tmp_path, ok=False, export=str(target))
    assert str(target) in message and "not empty" in message
    assert [path.name for path in target.iterdir()] == ["precious"]
    assert not [path for path in tmp_path.iterdir() if "tmp-" in path.name]


@pytest.mark.parametrize("max_file_bytes", [10, 5_000, 100_000])
def test_a_full_disk_leaves_nothing(max_file_bytes, tmp_path):
    source = source_folder(tmp_path)
    message = run_probe(
        source, {}, tmp_path, ok=False, max_file_bytes=max_file_bytes, export=str(tmp_path / "t" / "target")
    )
    assert str(tmp_path / "t" / "target") in message and "cannot be written" in message
    assert not list((tmp_path / "t").iterdir())


def test_reload_in_transformers_with_the_same_sparsity(tmp_path):
    """The exported folder in transformers, through the package's attention, gives the native logits."""
    pytest.importorskip("topk_attn.hf")
    source = source_folder(tmp_path)
    block = {"version": 1, "ratio": 0.2, "min_keys": 2, "sink": 1, "recent": 2, "dense_layers": [0]}
    target = tmp_path / "t"
    got = run_probe(source, BATCH, tmp_path, export=str(target), attention=block)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).train()
    assert model.config._attn_implementation == "topk_attn"
    assert_close(got, reference(model, BATCH))
    dense = run_probe(source, BATCH, tmp_path)
    assert (dense["logits"] - got["logits"]).abs().max() > 1e-2
