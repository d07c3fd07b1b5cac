"""topk-sft against the same training written in PyTorch, and what a run prints and writes."""

import hashlib
import json
import os
import pty
import subprocess

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from trainer_helpers import load_model, native_program, tiny_model
from trainer_run_helpers import (
    VOCAB,
    Workbench,
    best_fit_decreasing,
    command,
    documents,
    environment,
    events,
    losses,
    run,
    write_shard,
)


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


def reference_run(model, docs, *, steps, length, per_step, optim, scheduler, max_norm=1.0):
    """What a recipe with shuffle: false asks for, document by document; yields (loss, norm, rate)."""
    torch.set_num_threads(1)  # tiny tensors
    pieces = [(ids[:length], mask[:length]) for ids, mask in docs]
    pieces = [(ids, mask) for ids, mask in pieces if mask[1:].any()]
    bins = best_fit_decreasing([len(ids) for ids, _ in pieces], length)
    decay = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in n]
    plain = [p for n, p in model.named_parameters() if p.dim() <= 1 or "embed_tokens" in n]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": plain, "weight_decay": 0.0}], **optim)
    schedule = transformers.get_scheduler(
        scheduler.pop("name"), optimizer, num_training_steps=steps, **scheduler
    )
    position = 0
    for _ in range(steps):
        if position >= len(bins):
            position = 0
        chosen = [pieces[i] for sequence in bins[position : position + per_step] for i in sequence]
        position += per_step
        targets = sum(int(mask[1:].sum()) for _, mask in chosen)
        optimizer.zero_grad()
        total = 0.0
        for ids, mask in chosen:
            ids = torch.from_numpy(ids.astype(np.int64))
            labels = torch.where(torch.from_numpy(mask[1:] != 0), ids[1:], -100)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = (
                torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
                / targets
            )
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        yield total, norm, rate


SCHEDULES = {
    "cosine": (
        {"name": "cosine_with_min_lr", "scheduler_specific_kwargs": {"min_lr_rate": 0.1}},
        {"min_lr_ratio": 0.1},
    ),
    "linear": ({"name": "linear"}, {}),
    "constant": ({"name": "constant_with_warmup"}, {}),
    "wsd": (
        {
            "name": "warmup_stable_decay",
            "scheduler_specific_kwargs": {"num_decay_steps": 5},
        },
        {"decay_steps": 5},
    ),
}


@pytest.mark.parametrize(
    ("family", "schedule", "attention"),
    [
        ("llama", "cosine", "dense"),
        ("qwen2", "wsd", "dense"),
        ("qwen3", "linear", "dense"),
        ("mistral", "constant", "dense"),
    ]
    + [("llama", "cosine", "topk"), ("qwen3", "wsd", "topk")],
)
def test_twenty_steps_equal_pytorch(tmp_path, family, schedule, attention):
    bench = Workbench(tmp_path, family)
    theirs, ours = SCHEDULES[schedule]
    sparsity = {"ratio": 0.3, "min_keys": 4}
    run(
        bench.recipe(
            data={"shuffle": False, "sequence_len": 48},
            attention={"mode": "topk", **sparsity} if attention == "topk" else {},
            train={"max_steps": 20},
            optim={"lr_scheduler": schedule, "warmup_steps": 3, "adam_beta2": 0.95, **ours},
        )
    )
    implementation = "eager"
    if attention == "topk":
        hf = pytest.importorskip("topk_attn.hf", reason="the Python package is not built")
        assert hf is not None
        implementation = "topk_attn"
    model = load_model(bench.model_dir, torch.float32, "eager")
    if attention == "topk":
        model.config.topk_attention = {"version": 1, **sparsity}
        model.set_attn_implementation(implementation)
    expected = list(
        reference_run(
            model,
            bench.train,
            steps=20,
            length=48,
            per_step=4,
            optim={"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
            scheduler={**theirs, "num_warmup_steps": 3},
        )
    )
    steps = events(tmp_path / "run", "step")
    assert len(steps) == 20
    for step, (loss, norm, rate) in zip(steps, expected, strict=True):
        assert step["learning_rate"] == pytest.approx(rate, rel=1e-9, abs=1e-12)
        assert step["loss"] == pytest.approx(loss, rel=2e-5)
        assert step["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert expected[-1][0] < expected[0][0]
    trained = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, parameter in model.named_parameters():
        # Adam turns rounding noise of a vanishing gradient into steps of up to the learning rate.
        assert (trained[name] - parameter).abs().max().item() < 2e-4, name
        assert (trained[name] - parameter).abs().mean().item() < 2e-6, name


def test_export_loads_in_transformers_with_the_same_sparsity(bench):
    run(bench.recipe(attention={"mode": "topk", "topk": 8, "dense_layers": [1]}, train={"max_steps": 2}))
    final = bench.folder / "run" / "final"
    config = transformers.AutoConfig.from_pretrained(final)
    assert config.topk_attention["topk"] == 8
    assert config.topk_attention["dense_layers"] == [1]
    assert (final / "tokenizer.json").read_bytes() == (bench.model_dir / "tokenizer.json").read_bytes()


def test_accumulation_does_not_change_the_result(bench):
    for name, micro, steps in (("one", 4, 1), ("two", 2, 2), ("four", 1, 4)):
        run(bench.recipe(name, train={"micro_batch_size": micro, "gradient_accumulation_steps": steps}))
    one, two, four = (losses(bench.folder / name) for name in ("one", "two", "four"))
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5)
        assert four[step] == pytest.approx(one[step], rel=1e-5)


def test_activation_checkpointing_does_not_change_a_bit(bench):
    run(bench.recipe("plain"))
    for recompute in ("all", "all_but_attention"):
        run(bench.recipe(recompute, train={"gradient_checkpointing": True, "recompute": recompute}))
        assert losses(bench.folder / recompute) == losses(bench.folder / "plain")


def test_profile_writes_a_chrome_trace(bench):
    trace = bench.folder / "trace.json"
    attention = {"mode": "topk", "ratio": 0.3, "dense_layers": [0]}
    run(bench.recipe(attention=attention), "--profile", trace)
    recorded = json.loads(trace.read_text())["traceEvents"]
    names = {event.get("name", "") for event in recorded}
    # The parts of a step, and dense and top-k attention apart.
    assert {"forward", "backward", "optimizer", "topk_attn::fwd", "topk_attn::bwd", "aten::mm"} <= names
    assert any("scaled_dot_product" in name for name in names)
    memory = [event["args"]["Total Allocated"] for event in recorded if event.get("name") == "[memory]"]
    assert max(memory) > min(memory) >= 0


def test_packing_does_not_change_the_loss(bench):
    # All documents in one step, packed or not: the same mean over the same targets.
    for name, packing in (("packed", True), ("single", False)):
        run(
            bench.recipe(
                name,
                data={"sample_packing": packing},
                train={"max_steps": 1, "gradient_accumulation_steps": 64, "eval_steps": 1},
            )
        )
    packed, single = (bench.folder / name for name in ("packed", "single"))
    assert losses(packed)[1] == pytest.approx(losses(single)[1], rel=1e-5)
    assert events(packed, "step")[0]["targets"] == sum(int(mask[1:].sum()) for _, mask in bench.train)
    for a, b in zip(events(packed, "eval"), events(single, "eval"), strict=True):
        assert a["loss_dense"] == pytest.approx(b["loss_dense"], rel=1e-5)


def test_evaluation_equals_transformers(bench):
    run(
        bench.recipe(
            attention={"ratio": 0.2},
            train={"max_steps": 1, "eval_steps": 1, "eval_attention": ["dense", "topk"]},
        )
    )
    model = load_model(bench.model_dir, torch.float32)
    total = targets = 0
    with torch.no_grad():
        for ids, mask in bench.validation:
            ids = torch.from_numpy(ids.astype(np.int64))
            labels = torch.where(torch.from_numpy(mask[1:] != 0), ids[1:], -100)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            targets += int(mask[1:].sum())
    first, last = events(bench.folder / "run", "eval")
    assert first["step"] == 0 and last["step"] == 1
    assert first["targets"] == targets
    assert first["loss_dense"] == pytest.approx(total / targets, rel=1e-5)
    assert first["loss_topk"] != first["loss_dense"]


def test_evaluation_only(bench):
    # The same figures as an evaluation before the first step; ratios stand beside the recipe's own budget.
    evaluation = {"eval_attention": ["dense", "topk"], "eval_ratios": [0.2, 0.4, 1]}
    attention = {"ratio": 0.2, "min_keys": 2}
    run(bench.recipe(attention=attention, train={"max_steps": 1, "eval_steps": 1, **evaluation}))
    done = run(bench.recipe("only", attention=attention, train=evaluation), "--evaluate")
    [only] = events(bench.folder / "only")
    expected = events(bench.folder / "run", "eval")[0]
    modes = ["dense", "topk", "topk_0.2", "topk_0.4", "topk_1"]
    assert [key for key in only if key.startswith("loss_")] == [f"loss_{mode}" for mode in modes]
    assert [only[f"loss_{mode}"] for mode in modes] == [expected[f"loss_{mode}"] for mode in modes]
    assert only["targets"] == expected["targets"]
    assert only["loss_topk_0.2"] == only["loss_topk"] != only["loss_topk_0.4"]
    assert only["loss_topk_1"] == pytest.approx(only["loss_dense"], rel=1e-5)
    assert f"loss {only['loss_topk_0.4']:.4f} under topk_0.4 attention" in done.stdout
    left = {path.name for path in (bench.folder / "only").iterdir() if not path.name.startswith(".")}
    assert left == {"recipe.yaml", "tensorboard", "train.jsonl"}  # no checkpoint, no model


def test_evaluation_only_needs_data_and_weights(bench):
    files = {
        "dataset_prepared_path": None,
        "train_files": [str(bench.folder / "data" / "train-00000.safetensors")],
    }
    assert "needs held-out data" in run(bench.recipe(data=files), "--evaluate", status=1).stderr
    bare = bench.recipe(model={"random_init": True})
    assert "needs weights" in run(bare, "--evaluate", status=1).stderr


def test_one_seed_one_result(bench):
    run(bench.recipe("a"))
    run(bench.recipe("b"))
    run(bench.recipe("c", train={"seed": 7}))
    a, b, c = (losses(bench.folder / name) for name in "abc")
    assert a == b
    assert a != c  # another order of the data
    run(bench.recipe("d", model={"random_init": True}, train={"deterministic": True}))
    run(bench.recipe("e", model={"random_init": True}, train={"deterministic": True}))
    assert losses(bench.folder / "d") == losses(bench.folder / "e") != a


def test_bfloat16_trains_on_float32_masters(bench):
    run(bench.recipe(model={"dtype": "bfloat16"}, train={"max_steps": 3}))
    run(bench.recipe("full", train={"max_steps": 3}))
    masters = load_file(bench.folder / "run" / "step-3" / "model.safetensors")
    exported = load_file(bench.folder / "run" / "final" / "model.safetensors")
    start = load_file(bench.model_dir / "model.safetensors")
    full = load_file(bench.folder / "full" / "step-3" / "model.safetensors")
    moved = unrepresentable = 0
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(exported[name], master.to(torch.bfloat16)), name
        unrepresentable += int((master != master.to(torch.bfloat16).float()).sum())
        moved += int((master != start[name]).sum())
        # Masters start from the stored float32 weights, so three small steps stay near the float32 run.
        assert (master - full[name]).abs().max() < 5e-3
    assert moved > 0 and unrepresentable > 0
    for step, loss in losses(bench.folder / "run").items():
        assert loss == pytest.approx(losses(bench.folder / "full")[step], rel=2e-2)


def test_epochs(bench):
    count = len(best_fit_decreasing([len(ids) for ids, _ in bench.train], 64))
    run(bench.recipe(train={"max_steps": None, "num_epochs": 1.5}))
    steps = events(bench.folder / "run", "step")
    per_epoch = -(-count // 4)
    assert len(steps) == -(-3 * per_epoch // 2)
    assert sum(step["targets"] for step in steps[:per_epoch]) == sum(
        int(mask[1:].sum()) for _, mask in bench.train
    )
    assert steps[per_epoch - 1]["epoch"] == 1.0


def test_logs_agree(bench):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(bench.recipe(train={"eval_steps": 5}))
    accumulator = EventAccumulator(str(bench.folder / "run" / "tensorboard"))
    accumulator.Reload()
    steps = events(bench.folder / "run", "step")
    for tag, key in (
        ("train/loss", "loss"),
        ("train/grad_norm", "grad_norm"),
        ("train/learning_rate", "learning_rate"),
    ):
        scalars = accumulator.Scalars(tag)
        assert [scalar.step for scalar in scalars] == list(range(1, 11))
        assert [scalar.value for scalar in scalars] == [float(np.float32(step[key])) for step in steps]
    evals = accumulator.Scalars("eval/loss_dense")
    assert [scalar.step for scalar in evals] == [0, 5, 10]
    for step in steps:
        assert (
            f"step {step['step']}/10 | loss {step['loss']:.4f} | grad norm {step['grad_norm']:.3f}"
            in done.stdout
        )
        assert step["mfu"] == pytest.approx(step["flops"] / step["seconds"] / 0.1e12)
    assert "\r" not in done.stdout and "\x1b" not in done.stdout


def test_topk_flops_are_counted_beside_dense_ones(bench):
    run(bench.recipe(attention={"mode": "topk", "topk": 2}, train={"max_steps": 1}))
    step = events(bench.folder / "run", "step")[0]
    assert 0 < step["flops"] < step["flops_dense"]


def test_progress_bar_on_a_terminal(bench):
    leader, follower = pty.openpty()
    process = subprocess.Popen(command(bench.recipe()), stdout=follower, stderr=follower, env=environment())
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert process.wait() == 0
    assert b"\r\x1b[K" in shown
    assert b"100% [" in shown
    assert b"step 10/10 | loss" in shown


def test_dry_run_shows_the_plan_and_writes_nothing(bench):
    before = sorted(path for path in bench.folder.rglob("*"))
    recipe = bench.recipe(attention={"mode": "topk", "ratio": 0.05}, data={"shuffle": False})
    done = run(recipe, "--dry-run")
    assert sorted(path for path in bench.folder.rglob("*") if path != recipe) == before
    parameters = sum(p.numel() for p in tiny_model("llama", tie_word_embeddings=True).parameters())
    assert f"{parameters:,} parameters" in done.stdout
    assert "ratio 0.05" in done.stdout
    assert "memory     about" in done.stdout
    first = best_fit_decreasing([len(ids) for ids, _ in bench.train], 64)[:2]
    tokens = sum(len(bench.train[i][0]) for sequence in first for i in sequence)
    targets = sum(int(bench.train[i][1][1:].sum()) for sequence in first for i in sequence)
    assert f"first micro-batch: {tokens} tokens, {targets} of them targets" in done.stdout
    for number in (i for sequence in first for i in sequence):
        ids, mask = bench.train[number]
        bare = int(mask[1:].argmax()) + 1  # the first token is never predicted
        words = [f"w{token}" for token in ids]
        assert (
            f"  document {number}, tokens 0 to {len(ids) - 1} of {len(ids)}\n"
            f'    no loss  {bare:>5} tokens: "{" ".join(words[:bare])}"\n'
            f'    loss     {len(ids) - bare:>5} tokens: "{" ".join(words[bare:])}"\n'
        ) in done.stdout


def test_a_tokenizer_that_cannot_be_decoded_shows_ids(bench):
    # The data agrees with it, so the run is right; only text is missing.
    other = b'{"model": {"type": "Unheard"}}'
    (bench.model_dir / "tokenizer.json").write_bytes(other)
    write_shard(
        bench.folder / "data" / "train-00000.safetensors",
        [(np.array([3, 4, 5], np.int32), np.array([0, 1, 1], np.uint8))],
        "train",
        tokenizer_sha256=hashlib.sha256(other).hexdigest(),
    )
    (bench.folder / "data" / "validation-00000.safetensors").unlink()
    shown = run(bench.recipe(), "--dry-run").stdout
    assert "note: token ids are shown instead of text: " in shown
    assert "loss         2 tokens: 4 5\n" in shown


@pytest.mark.parametrize("attention", ["dense", "topk"])
def test_samples_during_training_equal_topk_generate(bench, attention):
    """Completions after the last step are those of the exported model."""
    prompts = [
        (np.array([5, 6, 7], np.int32), np.zeros(3, np.uint8)),
        (np.array([9], np.int32), np.zeros(1, np.uint8)),
    ]
    write_shard(bench.folder / "prompts.safetensors", prompts, "prompts")
    run(
        bench.recipe(
            attention={"mode": attention, "topk": 2},
            train={
                "max_steps": 4,
                "sample_steps": 2,
                "sample_prompts": str(bench.folder / "prompts.safetensors"),
                "sample_max_new_tokens": 6,
            },
        )
    )
    samples = events(bench.folder / "run", "sample")
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2, 4, 4]
    assert samples[0]["prompt"] == '"w5 w6 w7"'
    done = subprocess.run(
        [
            native_program("topk-generate"),
            "--model",
            str(bench.folder / "run" / "final"),
            "--prompts",
            str(bench.folder / "prompts.safetensors"),
            "--max-new-tokens",
            "6",
            "--format",
            "ids",
        ],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    for sample, ids in zip(samples[4:], done.stdout.split(), strict=True):
        words = " ".join(f"w{token}" for token in ids.split(","))
        assert sample["completion"] == f'"{words}"'


def test_documents_without_targets_and_long_documents_are_counted(tmp_path):
    train = documents(6, 3) + [(np.full(9, 5, np.int32), np.zeros(9, np.uint8))]
    train += [(np.full(200, 7, np.int32), np.ones(200, np.uint8))]
    bench = Workbench(tmp_path, train=train)
    cut = run(bench.recipe(), "--dry-run").stdout
    assert "1 documents left out: no token in them carries loss" in cut
    assert "1 documents cut to 64 tokens: 136 tokens dropped" in cut
    split = run(bench.recipe(data={"overflow": "split"}), "--dry-run").stdout
    assert "1 documents split into pieces of up to 64 tokens" in split
    assert f"{sum(int(mask[1:].sum()) for _, mask in train)} of them targets" in split


def test_only_the_wanted_split_is_read(bench):
    write_shard(
        bench.folder / "data" / "other-00000.safetensors",
        [(np.full(9, 5, np.int32), np.ones(9, np.uint8))],
        "other",
    )
    assert "1 documents, 9 tokens" in run(bench.recipe(data={"train_split": "other"}), "--dry-run").stdout
    assert (
        "holds no token shard of the split 'none'"
        in run(bench.recipe(data={"train_split": "none"}), status=1).stderr
    )
    files = {
        "dataset_prepared_path": None,
        "train_files": [str(bench.folder / "data" / "other-00000.safetensors")],
    }
    assert "held out   none" in run(bench.recipe(data=files), "--dry-run").stdout
    assert "eval_files is empty" in run(bench.recipe(data=files, train={"eval_steps": 1}), status=1).stderr


def test_another_tokenizer_is_refused(bench):
    (bench.model_dir / "tokenizer.json").write_text("{}")
    message = run(bench.recipe(), status=1).stderr
    assert "made with another tokenizer" in message
    assert "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a" in message


def test_ids_outside_the_vocabulary_are_refused(bench):
    write_shard(
        bench.folder / "data" / "train-00001.safetensors",
        [(np.full(4, VOCAB, np.int32), np.ones(4, np.uint8))],
        "train",
    )
    assert f"input_ids[0] is {VOCAB}" in run(bench.recipe(), status=1).stderr


def test_usage(bench):
    assert "usage: topk-sft" in run("--help").stdout
    assert run("--version").stdout.startswith("topk-sft ")
    assert "learning_rate" in run("--help-recipe").stdout
    for arguments in (
        [],
        [bench.recipe(), "--dryrun"],
        [bench.recipe(), "other.yaml"],
        [bench.recipe(), "--resume"],
    ):
        assert "usage: topk-sft" in run(*arguments, status=2).stderr


def test_recipe_mistakes_name_the_place(bench):
    recipe = bench.recipe()
    recipe.write_text(recipe.read_text() + "optin: {}\n")
    line = len(recipe.read_text().splitlines())
    assert run(recipe, status=1).stderr == (
        f"topk-sft: error: {recipe}:{line}:1: unknown section 'optin'; did you mean 'optim'?\n"
    )
    message = run(bench.recipe(), "optim.learning_rat=1", status=1).stderr
    assert "override 'optim.learning_rat=1'" in message and "'optim.learning_rate'" in message
    assert not (bench.folder / "run").exists()
    assert "no such file" in run("nowhere.yaml", status=1).stderr.lower()


def test_overrides_and_synonyms(bench):
    done = run(bench.recipe(), "train.max_steps=3", "data.cutoff_len=32", "--dry-run")
    assert "steps      3 " in done.stdout
    assert "note: override 'data.cutoff_len=32': 'cutoff_len' is read as data.sequence_len" in done.stdout
