"""Never losing work: exact resume, signals, damaged checkpoints, full disks, folders of others."""

import json
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_helpers import tiny_model
from trainer_run_helpers import (
    Workbench,
    assert_same_checkpoint,
    best_fit_decreasing,
    checkpoints,
    command,
    documents,
    environment,
    events,
    losses,
    poisoned,
    run,
    write_shard,
)

TOPK = {"mode": "topk", "ratio": 0.3, "min_keys": 2}


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


def steps_per_epoch(bench, per_step):
    return -(-len(best_fit_decreasing([len(ids) for ids, _ in bench.train], 64)) // per_step)


@pytest.mark.parametrize("attention", ["dense", "topk"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_continues_to_the_bit(bench, attention, accumulation):
    """From the middle of an epoch, from its last step and from the first step of the next."""
    sections = {
        "attention": TOPK if attention == "topk" else {},
        "train": {"gradient_accumulation_steps": accumulation, "eval_steps": 4},
    }
    epoch = steps_per_epoch(bench, 2 * accumulation)
    assert 2 < epoch < 10
    straight = bench.folder / "straight"
    run(bench.recipe("straight", **sections, checkpoint={"save_steps": 1}))
    assert checkpoints(straight) == [f"step-{n}" for n in range(1, 11)]
    for step in (2, epoch, epoch + 1):
        name = f"from-{step}"
        run(bench.recipe(name, **sections), "--resume", straight / f"step-{step}")
        again = bench.folder / name
        assert losses(again) == {n: loss for n, loss in losses(straight).items() if n > step}
        assert_same_checkpoint(again / "step-10", straight / "step-10")
        norms = [line["grad_norm"] for line in events(again, "step")]
        assert norms == [line["grad_norm"] for line in events(straight, "step") if line["step"] > step]
        final, other = (load_file(folder / "final" / "model.safetensors") for folder in (again, straight))
        assert all(torch.equal(final[key], other[key]) for key in other)


def test_resume_in_bfloat16(bench):
    sections = {"model": {"dtype": "bfloat16"}}
    run(bench.recipe("straight", **sections, checkpoint={"save_steps": 5}))
    run(bench.recipe("again", **sections), "--resume", bench.folder / "straight" / "step-5")
    assert_same_checkpoint(bench.folder / "again" / "step-10", bench.folder / "straight" / "step-10")
    assert losses(bench.folder / "again")[10] == losses(bench.folder / "straight")[10]


def test_resume_latest_in_place(bench):
    recipe = bench.recipe(checkpoint={"save_steps": 5})
    run(bench.recipe("straight", checkpoint={"save_steps": 5}))
    run(recipe)
    folder = bench.folder / "run"
    shutil.rmtree(folder / "step-10")
    shutil.rmtree(folder / "final")
    done = run(recipe, "--resume", "latest")
    assert "continuing from" in done.stdout and "after step 5 of 10" in done.stdout
    assert_same_checkpoint(folder / "step-10", bench.folder / "straight" / "step-10")
    # The log only grows: the steps that were done twice are in it twice, with equal numbers.
    seen = [line["step"] for line in events(folder, "step")]
    assert seen == [*range(1, 11), *range(6, 11)]
    assert losses(folder) == losses(bench.folder / "straight")
    # A finished run has nothing left to do, and more steps go on from its end.
    assert "after step 10 of 10" in run(recipe, "--resume=latest").stdout
    more = run(recipe, "train.max_steps=12", "--resume", "latest").stdout
    assert "train.max_steps was 10 when the checkpoint was written and is 12 now" in more
    assert checkpoints(folder)[-1] == "step-12"
    assert "is at step 12, but this run ends after 10" in run(recipe, "--resume", "latest", status=1).stderr


def test_old_checkpoints_are_removed(bench):
    run(bench.recipe(checkpoint={"save_steps": 2, "save_total_limit": 2}))
    assert checkpoints(bench.folder / "run") == ["step-8", "step-10"]


def start(bench, *arguments, wait_for: str, **sections):
    """A long run in the background, once it has printed `wait_for`."""
    recipe = bench.recipe(**sections)
    process = subprocess.Popen(
        command(recipe, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    for line in process.stdout:
        if wait_for in line:
            return recipe, process
    raise AssertionError(f"never printed {wait_for!r}: {process.stderr.read()}")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(bench, sent):
    recipe, process = start(bench, train={"max_steps": 100000}, wait_for="step 3/")
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    folder = bench.folder / "run"
    (saved,) = checkpoints(folder)
    step = int(saved[5:])
    assert step >= 3
    assert f"stopped by {sent.name} after step {step} of 100000" in out
    assert events(folder)[-1]["event"] == "stop"
    assert not (folder / "final").exists()
    run(recipe, f"train.max_steps={step + 3}", "--resume", "latest")
    # A run that was never stopped, with the schedule of the long one, gets to the same place.
    straight = bench.recipe("straight", train={"max_steps": 100000}, checkpoint={"save_steps": step})
    process = subprocess.Popen(command(straight), stdout=subprocess.PIPE, text=True, env=environment())
    for line in process.stdout:
        if f"step-{step} written" in line:
            process.kill()
    process.wait()
    assert_same_checkpoint(folder / saved, bench.folder / "straight" / saved)


def test_a_signal_during_accumulation_drops_the_unfinished_step(bench):
    sections = {
        "data": {"sample_packing": False},
        "train": {"max_steps": 4, "micro_batch_size": 1, "gradient_accumulation_steps": 30},
    }
    run(bench.recipe("straight", **sections))
    recipe, process = start(bench, **sections, wait_for="step 1/4")
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    run(recipe, "--resume", "latest")
    assert_same_checkpoint(bench.folder / "run" / "step-4", bench.folder / "straight" / "step-4")
    assert losses(bench.folder / "run") == losses(bench.folder / "straight")


def test_a_second_signal_exits_at_once(bench):
    _, process = start(bench, train={"max_steps": 100000}, wait_for="step 2/")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_a_killed_run_leaves_usable_checkpoints(bench):
    recipe, process = start(
        bench, train={"max_steps": 100000}, checkpoint={"save_steps": 2}, wait_for="step-4 written"
    )
    process.kill()
    process.communicate()
    assert "continuing from" in run(recipe, "train.max_steps=20", "--resume", "latest").stdout
    assert checkpoints(bench.folder / "run")[-1] == "step-20"
    assert not list((bench.folder / "run").glob(".*tmp*"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "marker"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(bench, damage):
    recipe = bench.recipe(checkpoint={"save_steps": 4})
    run(recipe)
    folder = bench.folder / "run"
    newest = folder / "step-10"
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(data[:-7])
        why = f"{weights} has {len(data) - 7} bytes instead of {len(data)}"
    elif damage == "flipped":
        data[-3] ^= 1
        weights.write_bytes(data)
        why = f"{weights} does not have the sha256"
    elif damage == "missing":
        (newest / "optimizer.safetensors").unlink()
        why = "optimizer.safetensors is missing"
    else:
        (newest / "COMPLETE").write_text("{")
        why = "COMPLETE"
    for wanted in ("latest", newest):
        message = run(recipe, "--resume", wanted, status=1).stderr
        assert f"checkpoint {newest} is refused" in message
        assert why in message
        assert f"the previous usable checkpoint is {folder / 'step-8'}" in message
    done = run(recipe, "--resume", folder / "step-8")
    assert "is damaged and was renamed" in done.stdout
    assert checkpoints(folder) == ["step-4", "step-8", "step-10"]
    assert (folder / "broken-step-10").is_dir()


def test_an_unfinished_checkpoint_is_passed_over(bench):
    recipe = bench.recipe(checkpoint={"save_steps": 4})
    run(recipe)
    folder = bench.folder / "run"
    (folder / "step-10" / "COMPLETE").unlink()
    message = run(recipe, "--resume", folder / "step-10", status=1).stderr
    assert "never finished" in message and f"--resume {folder / 'step-8'}" in message
    done = run(recipe, "--resume", "latest")
    assert f"{folder / 'step-10'} has no COMPLETE marker" in done.stdout
    assert "after step 8 of 10" in done.stdout


def test_no_usable_checkpoint(bench):
    recipe = bench.recipe()
    assert "holds no complete checkpoint" in run(recipe, "--resume", "latest", status=1).stderr
    assert "there is no checkpoint" in run(recipe, "--resume", bench.folder / "step-1", status=1).stderr
    run(recipe, "train.max_steps=1")
    (bench.folder / "run" / "step-1" / "rng.safetensors").unlink()
    assert "there is no earlier usable checkpoint" in run(recipe, "--resume", "latest", status=1).stderr


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"train": {"seed": 1}}, "train.seed was '42' there and is '1' here"),
        ({"data": {"sequence_len": 32}}, "data.sequence_len"),
        ({"data": {"overflow": "split"}}, "data.overflow"),
        ({"train": {"micro_batch_size": 1}}, "train.micro_batch_size"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(bench, sections, what):
    run(bench.recipe("other", train={"max_steps": 2}))
    message = run(bench.recipe(**sections), "--resume", bench.folder / "other" / "step-2", status=1).stderr
    assert "belongs to another run" in message and what in message
    assert not (bench.folder / "run" / "train.jsonl").exists()


def test_a_checkpoint_of_other_data_or_another_model_is_refused(bench, tmp_path):
    run(bench.recipe("other", train={"max_steps": 2}))
    step = bench.folder / "other" / "step-2"
    changed = documents(40, 1)
    changed[5][0][-1] ^= 1
    write_shard(bench.folder / "data" / "train-00000.safetensors", changed, "train")
    message = run(bench.recipe(), "--resume", step, status=1).stderr
    assert "training data was" in message
    (tmp_path / "wide").mkdir()
    wide = Workbench(
        tmp_path / "wide", model=tiny_model("llama", intermediate_size=80, tie_word_embeddings=True)
    )
    message = run(wide.recipe(), "--resume", step, status=1).stderr
    assert "mlp 96" in message and "mlp 80" in message


def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(bench):
    """Even when somebody has rewritten the marker."""
    import hashlib

    recipe = bench.recipe()
    run(recipe, "train.max_steps=2")
    step = bench.folder / "run" / "step-2"
    weights = load_file(step / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()
    save_file(weights, step / "model.safetensors")
    marker = json.loads((step / "COMPLETE").read_text())
    content = (step / "model.safetensors").read_bytes()
    marker["files"]["model.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (step / "COMPLETE").write_text(json.dumps(marker))
    assert (
        "model.norm.weight is F32 [5], but this run has F32 [64]"
        in run(recipe, "--resume", "latest", status=1).stderr
    )


def limited(size):
    """Makes every write beyond `size` bytes of a file fail, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_leaves_the_last_good_checkpoint(bench):
    sections = {"checkpoint": {"save_steps": 3, "save_total_limit": 1}}
    run(bench.recipe("straight", **sections))
    recipe = bench.recipe(**sections)
    run(recipe, "train.max_steps=3", "optim.warmup_steps=2")
    folder = bench.folder / "run"
    size = (folder / "step-3" / "optimizer.safetensors").stat().st_size
    message = run(recipe, "--resume", "latest", status=1, preexec_fn=limited(size // 2)).stderr
    assert "File too large" in message and "optimizer.safetensors" in message
    assert checkpoints(folder) == ["step-3"]
    assert not [path for path in folder.iterdir() if "tmp" in path.name]
    assert "after step 3 of 10" in run(recipe, "--resume", "latest").stdout
    assert checkpoints(folder) == ["step-10"]


def test_a_full_disk_at_the_first_checkpoint_and_at_the_export(bench):
    recipe = bench.recipe(checkpoint={"save_steps": 5})
    assert "model.safetensors" in run(recipe, status=1, preexec_fn=limited(60000)).stderr
    assert checkpoints(bench.folder / "run") == []
    export = bench.recipe("export", checkpoint={"save_at_end": False})
    run(export, status=1, preexec_fn=limited(60000))
    assert not (bench.folder / "export" / "final").exists()


def test_folders_of_others_are_left_alone(bench):
    folder = bench.folder / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    recipe = bench.recipe()
    assert "is not empty (it holds thesis.txt)" in run(recipe, status=1).stderr
    run(bench.recipe("good", train={"max_steps": 2}))
    message = run(recipe, "--resume", bench.folder / "good" / "step-2", status=1).stderr
    assert "is not the folder of a run" in message
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    # A finished run is not started over in its folder either.
    assert "--resume latest" in run(bench.recipe("good"), status=1).stderr
    (bench.folder / "file").write_text("")
    assert "cannot be made" in run(bench.recipe("file"), status=1).stderr


def test_going_back_below_a_good_checkpoint_is_refused(bench):
    recipe = bench.recipe(checkpoint={"save_steps": 5})
    run(recipe)
    message = run(recipe, "--resume", bench.folder / "run" / "step-5", status=1).stderr
    assert "step-10 is newer than" in message


def test_two_processes_do_not_share_a_folder(bench):
    recipe, process = start(bench, train={"max_steps": 100000}, wait_for="step 1/")
    try:
        shutil.rmtree(bench.folder / "run" / "tensorboard")
        message = run(recipe, "--resume", "latest", status=1).stderr
        assert "another process is training in" in message or "holds no complete checkpoint" in message
    finally:
        process.kill()
        process.communicate()


SINGLE = {
    "data": {"sample_packing": False, "shuffle": False},
    "train": {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6},
}


def test_a_nonfinite_loss_stops_and_says_where(tmp_path):
    bench = poisoned(tmp_path, 50)
    message = run(bench.recipe(**SINGLE), status=1).stderr
    # Document 7 is the second micro-batch of step 4.
    assert "step 4, micro-batch 2 of 2 (documents 7): the loss is nan" in message
    assert "all parameters are finite" in message
    assert events(bench.folder / "run", "nonfinite")[0]["step"] == 4


def test_a_nonfinite_loss_can_be_skipped(tmp_path):
    bench = poisoned(tmp_path, 50)
    sections = {
        **SINGLE,
        "train": {**SINGLE["train"], "on_nonfinite": "skip"},
        "checkpoint": {"save_steps": 1},
    }
    done = run(bench.recipe(**sections))
    assert "skipped step 4, micro-batch 2 of 2" in done.stdout
    folder = bench.folder / "run"
    assert sorted(losses(folder)) == [1, 2, 3, 5, 6]
    before, after = (load_file(folder / f"step-{n}" / "model.safetensors") for n in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((folder / "step-6" / "trainer_state.json").read_text())["updates"] == 5


def test_a_nonfinite_gradient_names_micro_batch_and_parameter(tmp_path):
    """The forward pass is finite; a neuron that is off and weighs 3e38 lets the backward pass overflow."""
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[0] = 0
        mlp.up_proj.weight[0] *= 1e4
        mlp.down_proj.weight[:, 0] = 3e38
    bench = Workbench(tmp_path, model=model)
    message = run(bench.recipe(**SINGLE), status=1).stderr
    assert "step 1, micro-batch 1 of 2 (documents 0): the gradient of model.layers.1." in message
    assert "_proj.weight is not finite" in message


def test_skipping_ends_when_every_step_fails(tmp_path):
    bench = Workbench(tmp_path)
    # The first real step throws the weights to infinity.
    done = run(
        bench.recipe(
            train={"on_nonfinite": "skip", "max_steps": 40}, optim={"learning_rate": 1e38, "warmup_steps": 0}
        ),
        status=1,
    )
    assert "10 steps in a row were skipped" in done.stderr
    assert "holds a value that is not finite" in done.stderr or "all parameters are finite" in done.stderr


def test_nonfinite_weights_are_refused_at_the_start(bench):
    path = bench.model_dir / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path, {"format": "pt"})
    assert "model.norm.weight" in run(bench.recipe(), status=1).stderr


def test_a_split_document_resumes_too(tmp_path):
    train = documents(10, 5) + [(np.arange(3, 120).astype(np.int32), np.ones(117, np.uint8))] * 3
    bench = Workbench(tmp_path, train=train)
    sections = {"data": {"overflow": "split", "sequence_len": 32}}
    run(bench.recipe("straight", **sections, checkpoint={"save_steps": 3}))
    run(bench.recipe("again", **sections), "--resume", bench.folder / "straight" / "step-3")
    assert_same_checkpoint(bench.folder / "again" / "step-10", bench.folder / "straight" / "step-10")
