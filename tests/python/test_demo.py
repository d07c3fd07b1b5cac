"""The demonstration's parts, and one run of it from start to end at tiny sizes."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from topk_attn.demo import __main__ as demo
from topk_attn.demo import corpus, download, evaluate, generate, stages


def dialog(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_split_keeps_all_answers_to_a_question_on_one_side():
    dialogs = [dialog(f"Question {i // 2}?", f"Answer {i}.") for i in range(40)]
    dialogs.append(dialog("question  0?", "Another spelling of the first question."))
    essays = {f"essay{i}": "x" * 9000 for i in range(6)} | {"short": "x" * 100}
    train, held = corpus.split(dialogs, essays, 5, 2, seed=1)
    ask = [{d[0]["content"].lower().replace("  ", " ") for d in side.dialogs} for side in (train, held)]
    assert len(ask[1]) == 5 and not ask[0] & ask[1]
    assert len(train.dialogs) + len(held.dialogs) == 41
    assert len(held.essays) == 2 and "short" in train.essays and not set(held.essays) & set(train.essays)
    # The side depends on the content only, not on the order.
    again = corpus.split(dialogs[::-1], dict(reversed(essays.items())), 5, 2, seed=1)[1]
    assert sorted(map(str, again.dialogs)) == sorted(map(str, held.dialogs)) and again.essays == held.essays
    other = corpus.split(dialogs, essays, 5, 2, seed=2)[1]
    assert sorted(map(str, other.dialogs)) != sorted(map(str, held.dialogs))
    with pytest.raises(ValueError, match="cannot hold out"):
        corpus.split(dialogs, essays, 100, 2, seed=1)


def write_shard(path, documents):
    ids = [np.asarray(tokens, np.int32) for tokens, _ in documents]
    masks = [np.asarray(mask, np.uint8) for _, mask in documents]
    tensors = {
        "input_ids": np.concatenate(ids),
        "loss_mask": np.concatenate(masks),
        "doc_offsets": np.cumsum([0, *map(len, ids)]).astype(np.int64),
    }
    save_file(tensors, path, metadata={"format": "topk-data", "version": "1", "vocab_size": "100"})


def test_rows_keep_documents_apart(tmp_path):
    shard = tmp_path / "x-00000.safetensors"
    write_shard(shard, [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1]), ([6, 7, 8, 9], [0, 0, 1, 1])])
    rows = evaluate.rows_of(shard, 6)
    assert [row.input_ids.tolist() for row in rows] == [[[1, 2, 3, 4, 5]], [[6, 7, 8, 9]]]
    assert rows[0].position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert rows[0].targets.tolist() == [2, 3, -100, 5, -100]
    assert rows[1].targets.tolist() == [-100, 8, 9, -100]
    assert [row.loss_tokens for row in rows] == [3, 2]
    with pytest.raises(ValueError, match="document 2 has 4 tokens, more than a row of 3"):
        evaluate.rows_of(shard, 3)


@pytest.mark.parametrize("mode", evaluate.MODES, ids=lambda m: m.name)
def test_loss_of_packed_rows_is_the_loss_of_the_documents(tmp_path, mode):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    evaluate.set_mode(model, mode)
    rng = np.random.default_rng(0)
    documents = [(rng.integers(0, 100, n), rng.integers(0, 2, n)) for n in (40, 7, 30, 21)]
    shard = tmp_path / "x-00000.safetensors"
    write_shard(shard, documents)
    total = count = 0
    for tokens, mask in documents:
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].double()
        for t in range(1, len(tokens)):
            if mask[t]:
                total -= float(logits[t - 1].log_softmax(-1)[tokens[t]])
                count += 1
    assert evaluate.loss(model, evaluate.rows_of(shard, 64)) == pytest.approx(total / count, rel=1e-5)


def test_only_results_of_a_demo_are_replaced(tmp_path):
    output = tmp_path / "output"
    demo.prepare_output(output)
    (output / "report.md").write_text("old")
    (output / "data").mkdir()
    (output / "notes.txt").write_text("mine")
    demo.prepare_output(output)
    assert not (output / "report.md").exists() and not (output / "data").exists()
    assert (output / "notes.txt").read_text() == "mine"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="mine exists and is not an earlier demo's"):
        demo.prepare_output(mine)
    assert (mine / "thesis.tex").read_text() == "precious"


def test_time_left_follows_the_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    clock = stages.Stages({"a": 50, "b": 100})
    assert clock.left() == 150
    with clock.stage("a"):
        now[0] = 100.0
    assert clock.left() == 200 and clock.gone == 100
    with pytest.raises(KeyError), clock.stage("c"):
        pass
    assert stages.duration(59.6) == "1 min 00 s" and stages.duration(7) == "7 s"


def test_damaged_download_is_fetched_again(monkeypatch, tmp_path):
    wheel = download.Wheel("p", "1", "p-1.whl", download.hashlib.sha256(b"good").hexdigest(), 4)
    fetched = []

    def pip(requirement, folder):
        fetched.append(requirement)
        (download.Path(folder) / wheel.file).write_bytes(content)

    monkeypatch.setattr(download, "_pip_download", pip)
    content = b"good"
    path = download.fetch(wheel, tmp_path)
    assert path.read_bytes() == b"good" and fetched == ["p==1"]
    assert download.fetch(wheel, tmp_path) == path and len(fetched) == 1
    path.write_bytes(b"goo")
    assert download.fetch(wheel, tmp_path).read_bytes() == b"good" and len(fetched) == 2
    path.unlink()
    content = b"evil"
    with pytest.raises(RuntimeError, match="sha256 must be"):
        download.fetch(wheel, tmp_path)
    assert [p.name for p in path.parent.iterdir()] == []


@pytest.mark.slow
def test_questions_asked_at_the_end_are_not_trained_on():
    plan = demo.make_plan(demo.parse([]))
    folder = download.default_folder()
    dialogs = corpus.read_dialogs(folder)
    train, held = corpus.split(
        dialogs, download.essays(folder), plan.eval_questions, plan.eval_essays, plan.seed
    )
    trained = {d[0]["content"] for d in train.dialogs}
    assert not trained & set(generate.QUESTIONS)
    assert set(generate.QUESTIONS[:2]) <= {d[0]["content"] for d in held.dialogs}


@pytest.mark.slow
def test_quick_demo_from_start_to_end(tmp_path):
    output = tmp_path / "demo_output"
    assert demo.main(["--quick", "--output", str(output)]) == 0
    result = json.loads((output / "report.json").read_text())
    assert set(result["losses"]) == {"original", "dense", "topk"}
    for by_mode in result["losses"].values():
        for losses in by_mode.values():
            assert 0 < losses["essays"] < 15 and 0 < losses["dialogs"] < 15
    assert all(sum(c["rows_different"].values()) == 0 for c in result["parity"].values())
    assert all(sum(c["rows"].values()) > 0 and c["cpp_bytes"] > 0 for c in result["parity"].values())
    # The native trainer and transformers measured the same models on the same text.
    for pair in result["agreement"]:
        assert pair["native"] == pytest.approx(pair["transformers"], abs=2e-3), pair
    assert all(len(result["curves"][run]["loss"]) == 2 for run in demo.RUNS)
    assert len(result["generations"]) > 0
    text = (output / "report.md").read_text()
    assert "fine-tuned top-k" in text and "| model activations, float32 |" in text
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
