"""topk-data: shards, the validation split, and the command itself."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import CHATML, LLAMA3, chat, save_tokenizer, write_jsonl
from safetensors.numpy import load_file, save_file

from topk_attn.data import DataError, read_shard
from topk_attn.data.cli import main
from topk_attn.data.split import validation_digests
from topk_attn.data.tokenizer import file_sha256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tok"), CHATML)


def prepare(model, tmp_path, records, *options, name="in.jsonl"):
    path = write_jsonl(tmp_path / name, records)
    return main(
        ["prepare", str(path), "--tokenizer", str(model), "--output", str(tmp_path / "out"), *options]
    )


def names(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


TEXTS = [{"text": f"document number {i}, {'very ' * (i % 7)}short"} for i in range(60)]


def test_shard_contents(model, tmp_path, capsys):
    records = [{"messages": chat("Hi", "Yo")}, {"text": "The quick brown fox"}, {"input_ids": [5, 6, 7]}]
    assert prepare(model, tmp_path, records) == 0
    out = capsys.readouterr().out
    assert "train: 3 records, 3 documents" in out
    path = tmp_path / "out" / "train-00000.safetensors"
    tensors = load_file(path)
    assert {name: (t.dtype, t.ndim) for name, t in tensors.items()} == {
        "input_ids": (np.int32, 1),
        "loss_mask": (np.uint8, 1),
        "doc_offsets": (np.int64, 1),
    }
    shard = read_shard(path)
    n = len(tensors["input_ids"])
    assert tensors["doc_offsets"][0] == 0 and tensors["doc_offsets"][-1] == n and len(shard) == 3
    expected = {
        "format": "topk-data",
        "version": "1",
        "tokenizer_sha256": file_sha256(model / "tokenizer.json"),
        "num_documents": "3",
        "num_tokens": str(n),
        "num_loss_tokens": str(tensors["loss_mask"].sum()),
        "split": "train",
    }
    assert expected.items() <= shard.metadata.items()
    vocab = json.loads((model / "tokenizer.json").read_text())
    ids = list(vocab["model"]["vocab"].values()) + [token["id"] for token in vocab["added_tokens"]]
    assert int(shard.metadata["vocab_size"]) == max(ids) + 1
    assert shard.document(2)[0].tolist() == [5, 6, 7]
    assert shard.document(2)[1].tolist() == [0, 1, 1]


def test_shards_hold_whole_documents_up_to_the_limit(model, tmp_path):
    assert prepare(model, tmp_path, TEXTS, "--max-tokens-per-shard", "100") == 0
    shards = [read_shard(tmp_path / "out" / name) for name in names(tmp_path / "out")]
    assert len(shards) > 3
    assert all(len(shard.input_ids) <= 100 for shard in shards)
    assert sum(map(len, shards)) == 60
    whole = tmp_path / "whole"
    assert main(["prepare", str(tmp_path / "in.jsonl"), "--model", str(model), "--output", str(whole)]) == 0
    assert np.array_equal(
        np.concatenate([shard.input_ids for shard in shards]),
        read_shard(whole / "train-00000.safetensors").input_ids,
    )


def split_texts(folder, model):
    from topk_attn.data import load_tokenizer

    hf = load_tokenizer(model).hf
    return {
        split: sorted(hf.decode(shard.document(i)[0]) for i in range(len(shard)))
        for split in ("train", "validation")
        for shard in [read_shard(folder / f"{split}-00000.safetensors")]
    }


def test_validation_split_depends_on_content_and_seed_only(model, tmp_path, capsys):
    assert prepare(model, tmp_path, TEXTS, "--val-documents", "12") == 0
    assert "validation: 12 records, 12 documents" in capsys.readouterr().out
    first = split_texts(tmp_path / "out", model)
    assert len(first["validation"]) == 12 and len(first["train"]) == 48
    assert sorted(first["train"] + first["validation"]) == sorted(record["text"] for record in TEXTS)
    assert prepare(model, tmp_path, TEXTS[::-1], "--val-documents", "12", "--overwrite") == 0
    assert split_texts(tmp_path / "out", model) == first
    assert prepare(model, tmp_path, TEXTS, "--val-documents", "12", "--seed", "5", "--overwrite") == 0
    assert split_texts(tmp_path / "out", model) != first


def test_a_fraction_keeps_sides_when_records_are_added(model, tmp_path):
    assert prepare(model, tmp_path, TEXTS[:40], "--val-fraction", "0.3") == 0
    before = split_texts(tmp_path / "out", model)
    assert prepare(model, tmp_path, TEXTS, "--val-fraction", "0.3", "--overwrite") == 0
    after = split_texts(tmp_path / "out", model)
    assert set(before["validation"]) <= set(after["validation"])
    assert set(before["train"]) <= set(after["train"])
    assert 8 <= len(after["validation"]) <= 28


def test_parts_and_copies_stay_on_one_side(model, tmp_path):
    long = [{"text": f"story {i} " + "the quick brown fox " * 10} for i in range(8)]
    assert prepare(model, tmp_path, long + long, "--val-documents", "4", "--sequence-len", "16") == 0
    sides = split_texts(tmp_path / "out", model)
    opening = {side: {t[:8] for t in texts if t.startswith("story")} for side, texts in sides.items()}
    assert len(opening["validation"]) == 2 and len(opening["train"]) == 6
    assert not opening["train"] & opening["validation"]


def test_splits_that_would_be_empty():
    assert validation_digests([1, 2, 3], None, None) == set()
    assert validation_digests([3, 1, 2, 1], None, 3) == {1, 2}
    with pytest.raises(DataError, match="validation split would be empty: 0 of 2"):
        validation_digests([1 << 63, 1 << 63], 0.1, None)
    with pytest.raises(DataError, match="training split would be empty: 2 of 2"):
        validation_digests([1, 2], None, 9)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="fraction must be between"):
            validation_digests([1, 2], fraction, None)
    with pytest.raises(DataError, match="at least 1"):
        validation_digests([1, 2], None, 0)


def test_runs_repeat_exactly(model, tmp_path):
    assert prepare(model, tmp_path, TEXTS, "--val-documents", "5") == 0
    first = {name: load_file(tmp_path / "out" / name) for name in names(tmp_path / "out")}
    assert prepare(model, tmp_path, TEXTS, "--val-documents", "5", "--overwrite") == 0
    for name, tensors in first.items():
        again = load_file(tmp_path / "out" / name)
        assert all(np.array_equal(again[key], tensors[key]) for key in tensors)


def test_failure_leaves_nothing(model, tmp_path, capsys):
    # Found by the second pass, after shards of the first documents were complete.
    records = TEXTS + [{"text": "a"}]
    assert prepare(model, tmp_path, records, "--max-tokens-per-shard", "50") == 1
    assert f"topk-data: error: {tmp_path}/in.jsonl:61: no token of the document" in capsys.readouterr().err
    assert names(tmp_path / "out") == []
    # Found by the first.
    assert prepare(model, tmp_path, [*TEXTS, "{"]) == 1
    assert "in.jsonl:61: not valid JSON" in capsys.readouterr().err
    assert names(tmp_path / "out") == []


def test_invalid_records_can_be_skipped(model, tmp_path, capsys):
    records = ["{", *TEXTS[:5], {"text": "a"}, {"messages": chat("a")}]
    assert prepare(model, tmp_path, records, "--skip-invalid") == 0
    captured = capsys.readouterr()
    assert "skipped: 3 records" in captured.out and "train: 5 records" in captured.out
    assert "in.jsonl:1: not valid JSON" in captured.err and "in.jsonl:7" in captured.err
    assert prepare(model, tmp_path, ["{"], "--skip-invalid", "--split", "x") == 1
    assert "no records" in capsys.readouterr().err


def test_an_existing_split_is_replaced_only_on_demand(model, tmp_path, capsys):
    assert prepare(model, tmp_path, TEXTS, "--max-tokens-per-shard", "100") == 0
    (tmp_path / "out" / "train-extra.safetensors").write_text("not a shard of ours")
    assert prepare(model, tmp_path, TEXTS[:3]) == 1
    assert "the split 'train' exists already; use --overwrite" in capsys.readouterr().err
    assert prepare(model, tmp_path, TEXTS[:3], "--overwrite") == 0
    assert names(tmp_path / "out") == ["train-00000.safetensors", "train-extra.safetensors"]
    assert len(read_shard(tmp_path / "out" / "train-00000.safetensors")) == 3
    assert prepare(model, tmp_path, TEXTS[:3], "--split", "other") == 0


def test_bad_options(model, tmp_path, capsys):
    for options, message in (
        (["--split", "a/b"], "usable as a file name"),
        (["--val-documents", "3", "--val-split", "train"], "both named 'train'"),
        (["--sequence-len", "1"], "sequence_len must be at least 2"),
        (["--overflow", "drop"], "overflow needs sequence_len"),
        (["--roles-to-train", "robot"], "roles to train"),
        (["--max-tokens-per-shard", "0"], "max_tokens must be at least 1"),
    ):
        assert prepare(model, tmp_path, TEXTS, *options) == 1
        assert message in capsys.readouterr().err
    for options in (["--val-fraction", "0.1", "--val-documents", "1"], ["--turns", "some"], ["--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            prepare(model, tmp_path, TEXTS, *options)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "--tokenizer", str(model), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2


def test_tokenizer_folders_that_do_not_fit(model, tmp_path, capsys):
    path = str(write_jsonl(tmp_path / "in.jsonl", TEXTS))
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    small = save_tokenizer(tmp_path / "small")
    (small / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 5}))
    for folder, message in (
        (tmp_path / "none", "not a folder"),
        (empty, "no tokenizer.json"),
        (broken, "cannot load the tokenizer"),
        (small, "not in [0, 5) of the vocabulary"),
    ):
        assert main(["prepare", path, "--model", str(folder), "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err


def test_chat_template_from_a_file(model, tmp_path):
    (tmp_path / "t.jinja").write_text(LLAMA3)
    assert (
        prepare(model, tmp_path, [{"messages": chat("a", "b")}], "--chat-template", str(tmp_path / "t.jinja"))
        == 0
    )
    ids, mask = read_shard(tmp_path / "out" / "train-00000.safetensors").document(0)
    from topk_attn.data import load_tokenizer

    assert load_tokenizer(model).hf.decode(ids[mask == 1]) == "b<|eot|>"


def test_inspect_shows_the_mask(model, tmp_path, capsys):
    prepare(model, tmp_path, [{"messages": chat("Hi", "Yo")}, {"text": "The fox"}])
    shard = str(tmp_path / "out" / "train-00000.safetensors")
    capsys.readouterr()
    assert main(["inspect", shard, "--model", str(model), "--documents", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "<|im_start|>assistant\n[[Yo<|im_end|>]]" in out and "split: train" in out and "document 1" not in out
    )
    assert main(["inspect", shard, "--start", "1"]) == 0
    assert "[[" in capsys.readouterr().out
    assert main(["inspect", shard, "--model", str(model), "--color", "always"]) == 0
    assert "\033[32mYo<|im_end|>\033[0m" in capsys.readouterr().out
    assert main(["inspect", shard, "--start", "2"]) == 1
    assert "has 2 documents" in capsys.readouterr().err
    other = save_tokenizer(tmp_path / "other", tokenizer=None, eos_token="<|eot|>")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    assert main(["inspect", shard, "--model", str(other)]) == 1
    assert "made with another tokenizer" in capsys.readouterr().err


def test_broken_shards_are_refused(model, tmp_path):
    prepare(model, tmp_path, TEXTS[:4])
    path = tmp_path / "out" / "train-00000.safetensors"
    good, metadata = load_file(path), read_shard(path).metadata
    target = tmp_path / "broken.safetensors"

    def refused(message, changes=None, meta=None, drop=None):
        tensors = {**good, **(changes or {})}
        tensors.pop(drop, None)
        save_file(tensors, target, {**metadata, **(meta or {})})
        with pytest.raises(DataError, match=message):
            read_shard(target)

    offsets = good["doc_offsets"]
    refused("not a token shard", meta={"format": "pt"})
    refused("not a token shard", meta={"version": "2"})
    refused("no tensor 'loss_mask'", drop="loss_mask")
    refused("input_ids must be int32", {"input_ids": good["input_ids"].astype(np.int64)})
    refused("loss_mask has", {"loss_mask": good["loss_mask"][:-1]})
    refused("doc_offsets must rise", {"doc_offsets": offsets[:-1]})
    refused("doc_offsets must rise", {"doc_offsets": offsets[::-1].copy()})
    refused("loss_mask must hold 0 and 1, got 2", {"loss_mask": good["loss_mask"] * 2})
    refused("vocab_size must be a number", meta={"vocab_size": "many"})
    target.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a safetensors file"):
        read_shard(target)


def test_prompt_files(model, tmp_path, capsys):
    chats = tmp_path / "chats.jsonl"
    write_jsonl(chats, [{"messages": chat("one")}, {"messages": chat("two", "2", "three", system="s")}])
    single = tmp_path / "chat.json"
    single.write_text(json.dumps(chat("four"), indent=1))
    (tmp_path / "p.txt").write_text("from a file")
    target = tmp_path / "prompts.safetensors"
    command = [
        "tokens",
        "--model",
        str(model),
        "--output",
        str(target),
        "--prompt",
        "plain",
        "--prompt",
        "more",
    ]
    command += ["--prompt-file", str(tmp_path / "p.txt"), "--user", "hi", "--system", "be"]
    assert main([*command, "--chat", str(chats), "--chat", str(single)]) == 0
    assert "7 prompts" in capsys.readouterr().out
    from topk_attn.data import load_tokenizer

    hf = load_tokenizer(model).hf
    shard = read_shard(target)
    assert shard.metadata["split"] == "prompts" and not shard.loss_mask.any()
    texts = [hf.decode(shard.document(i)[0]) for i in range(len(shard))]
    assistant = "<|im_start|>assistant\n"
    assert texts[:3] == ["plain", "more", "from a file"]
    assert texts[3] == f"<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n{assistant}"
    assert texts[4] == f"<|im_start|>user\none<|im_end|>\n{assistant}"
    assert texts[5].endswith(f"three<|im_end|>\n{assistant}") and texts[6].endswith(
        f"four<|im_end|>\n{assistant}"
    )

    single.write_text(json.dumps(chat("a", "b")))
    assert main(["tokens", "--model", str(model), "--output", str(target), "--chat", str(single)]) == 1
    assert "a prompt must end before its answer" in capsys.readouterr().err
    single.write_text('{"x": 1}')
    assert main(["tokens", "--model", str(model), "--output", str(target), "--chat", str(single)]) == 1
    assert "non-empty list" in capsys.readouterr().err
    assert main(["tokens", "--model", str(model), "--output", str(target), "--prompt", ""]) == 1
    assert (
        main(["tokens", "--model", str(model), "--output", str(tmp_path / "no" / "x"), "--prompt", "a"]) == 1
    )
    with pytest.raises(SystemExit):
        main(["tokens", "--model", str(model), "--output", str(target)])


def test_the_command_runs_as_a_module(model, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS[:3])
    command = [
        sys.executable,
        "-m",
        "topk_attn.data",
        "prepare",
        "--input",
        str(path),
        "--tokenizer",
        str(model),
    ]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "train: 3 records" in done.stdout
