"""topk-sft on several ranks (Gloo on the CPU): the result of one rank, whatever is divided among them."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from trainer_helpers import tiny_model
from trainer_run_helpers import (
    Workbench,
    assert_same_checkpoint,
    checkpoints,
    command,
    documents,
    environment,
    events,
    losses,
    poisoned,
    run,
)

TOPK = {"mode": "topk", "ratio": 0.3, "min_keys": 2}
STEPS = 5
MICRO_BATCHES = 4  # in a step, on all ranks together


def launcher(ranks: int) -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, "--no-python", "--standalone", f"--nproc-per-node={ranks}"]


def launch(ranks: int, *arguments) -> subprocess.CompletedProcess:
    """Under torchrun, whose agent serves the store."""
    return subprocess.run(
        [*launcher(ranks), *command(*arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(ranks: int, *arguments) -> list[subprocess.Popen]:
    """The ranks without torchrun, which is slow to start: nobody else ends them, rank 0 serves the store."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                command(*arguments),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment(), **variables},
            )
        )
    return processes


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Until it prints that."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate()[1])


def finish(processes, seconds: float = 60) -> tuple[list[int], str, str]:
    """Exit statuses, and what all of them printed and said on stderr."""
    end = time.monotonic() + seconds
    output = errors = ""
    for process in processes:
        out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
        output, errors = output + out, errors + err
    return [process.returncode for process in processes], output, errors


def run_ranks(ranks: int, *arguments, status: int = 0) -> str:
    """Runs to the end; what was printed, or the one message when all ranks must fail."""
    statuses, output, errors = finish(start_ranks(ranks, *arguments), 200)
    assert statuses == [status] * ranks, f"{statuses}\n{output}\n{errors}"
    return output if status == 0 else the_message(errors)


def the_message(errors: str) -> str:
    prefix = "topk-sft: error: "
    found = [line.removeprefix(prefix) for line in errors.splitlines() if line.startswith(prefix)]
    assert len(found) == 1, errors
    return found[0]


def settings(data_ranks: int = 1, **changes) -> dict:
    """Sections of a recipe whose steps are the same for every number of ranks."""
    sections = {
        "train": {
            "max_steps": STEPS,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": MICRO_BATCHES // data_ranks,
        },
        "optim": {"lr_scheduler": "constant"},
        "checkpoint": {"export_model": False},
        "logging": {"tensorboard": False},
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    return sections


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """23 sequences: five steps of four are an epoch with three left, in which some rank has nothing to do."""
    return Workbench(tmp_path_factory.mktemp("ranks"), "qwen3", train=documents(50, 1))


@pytest.fixture(scope="module")
def one_rank(bench):
    """The run of one rank by attention, made once: (losses, gradient norms, weights)."""

    @functools.cache
    def reference(attention: str):
        name = f"one-{attention}"
        topk = TOPK if attention == "topk" else {}
        run(bench.recipe(name, **settings(attention=topk, train={"eval_steps": 3})))
        return result(bench.folder / name)

    return reference


def result(folder):
    norms = {line["step"]: line["grad_norm"] for line in events(folder, "step")}
    held_out = [line[key] for line in events(folder, "eval") for key in line if key.startswith("loss_")]
    return losses(folder), norms, held_out, load_file(folder / f"step-{STEPS}" / "model.safetensors")


def assert_equal_runs(got, want):
    """The tolerance of docs/trainer.md: sums in another order, and what AdamW makes of that in five steps."""
    for g, w in zip(got[:2], want[:2], strict=True):
        assert g.keys() == w.keys()
        for step in w:
            assert g[step] == pytest.approx(w[step], rel=1e-4), f"step {step}"
    assert got[2] == pytest.approx(want[2], rel=1e-4)
    assert got[3].keys() == want[3].keys()
    for name in want[3]:
        # The learning rate is 1e-3: a gradient of noise alone moves a weight by up to that in each step.
        difference = (got[3][name] - want[3][name]).abs()
        assert difference.max() < 5e-4, f"{name}: off by {difference.max():.3g}"
        assert difference.mean() < 1e-6, f"{name}: off by {difference.mean():.3g} on average"


@pytest.mark.parametrize(
    ("ranks", "sharding", "sequence", "attention"),
    [
        (2, "none", 1, "dense"),
        (2, "optimizer", 1, "topk"),
        (4, "optimizer", 1, "dense"),
        (4, "full", 1, "topk"),
        (2, "optimizer", 2, "topk"),
        (2, "none", 2, "dense"),
        (4, "full", 2, "topk"),
    ],
)
def test_ranks_equal_one_rank(bench, one_rank, ranks, sharding, sequence, attention):
    name = f"{ranks}-{sharding}-{sequence}-{attention}"
    train = {"sharding": sharding, "sequence_parallel": sequence, "eval_steps": 3}
    topk = TOPK if attention == "topk" else {}
    output = run_ranks(ranks, bench.recipe(name, **settings(ranks // sequence, attention=topk, train=train)))
    assert output.count("done: ") == 1  # rank 0 alone speaks
    assert_equal_runs(result(bench.folder / name), one_rank(attention))


def test_full_sharding_with_recomputed_layers_and_an_export(bench, one_rank):
    """A layer runs twice while it is gathered, and rank 0 needs the whole model for the export."""
    train = {"sharding": "full", "gradient_checkpointing": True, "recompute": "all", "eval_steps": 3}
    run_ranks(2, bench.recipe("recompute", **settings(2, train=train, checkpoint={"export_model": True})))
    assert_equal_runs(result(bench.folder / "recompute"), one_rank("dense"))
    exported = load_file(bench.folder / "recompute" / "final" / "model.safetensors")
    saved = load_file(bench.folder / "recompute" / f"step-{STEPS}" / "model.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
def test_recomputed_layers_over_parts_of_the_tokens(bench, one_rank, recompute):
    """The exchanges around attention run again in the backward, or its kept result goes back to heads."""
    train = {"sequence_parallel": 2, "gradient_checkpointing": True, "recompute": recompute, "eval_steps": 3}
    name = f"parts-{recompute}"
    run_ranks(2, bench.recipe(name, **settings(1, attention=TOPK, train=train)))
    assert_equal_runs(result(bench.folder / name), one_rank("topk"))


def test_adapters_are_divided_and_the_frozen_weights_are_not(bench):
    lora = {"adapter": "lora", "lora_r": 4}
    run(bench.recipe("lora-one", **settings(1, model=lora)))
    run_ranks(2, bench.recipe("lora-two", **settings(2, model=lora, train={"sharding": "full"})))
    assert losses(bench.folder / "lora-two") == pytest.approx(losses(bench.folder / "lora-one"), rel=1e-4)
    got, want = (
        load_file(bench.folder / name / f"step-{STEPS}" / "adapter_model.safetensors")
        for name in ("lora-two", "lora-one")
    )
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).abs().mean() < 1e-6, name


def test_bfloat16_parameters(bench):
    """Float32 masters are divided; the bfloat16 weights are gathered."""
    sections = settings(2, model={"dtype": "bfloat16"})
    run_ranks(2, bench.recipe("bf16-two", **sections))
    run(bench.recipe("bf16-one", **settings(1, model={"dtype": "bfloat16"})))
    got, want = result(bench.folder / "bf16-two"), result(bench.folder / "bf16-one")
    for step, loss in want[0].items():
        assert got[0][step] == pytest.approx(loss, rel=5e-3)
    for name, weight in want[3].items():
        assert weight.dtype == torch.float32
        assert (got[3][name] - weight).abs().mean() < 1e-4, name


def test_resume_with_the_same_ranks_is_to_the_bit_and_with_others_goes_on(bench, one_rank):
    """2 -> 2 ranks, to the bit; 2 -> 1 -> 4 ranks, one run whose steps are those of one rank."""
    two = settings(2, checkpoint={"save_steps": 1})
    done = launch(2, bench.recipe("straight", **two))
    assert done.returncode == 0, done.stderr
    folder = bench.folder / "straight"
    again = bench.recipe("again", **two)
    run_ranks(2, again, "--resume", folder / "step-2")
    assert_same_checkpoint(bench.folder / "again" / f"step-{STEPS}", folder / f"step-{STEPS}")

    run(bench.recipe("moved", **settings(1, train={"max_steps": 4})), "--resume", folder / "step-2")
    four = settings(4, train={"sharding": "full", "eval_steps": 3})
    assert "continuing from" in run_ranks(4, bench.recipe("moved", **four), "--resume", "latest")
    got, want = result(bench.folder / "moved"), one_rank("dense")
    assert got[0] == pytest.approx({step: want[0][step] for step in (3, 4, 5)}, rel=1e-4)
    for name in want[3]:
        assert (got[3][name] - want[3][name]).abs().mean() < 1e-6, name

    # Steps of another size would be another run.
    other = bench.recipe("moved", **settings(1, train={"max_steps": 9}))
    assert "train.gradient_accumulation_steps was '4' there and is '8' here" in run_ranks(
        2, other, "--resume", folder / "step-2", status=1
    )


@pytest.fixture
def endless(bench, request):
    name = request.node.name.split("[")[0]
    train = {"max_steps": 100000, "rank_timeout": 3}
    return bench.recipe(name, **settings(1, train=train)), bench.folder / name


def test_a_killed_rank_ends_the_others_with_one_message(endless):
    processes = start_ranks(3, endless[0])
    wait_for(processes[0], "step 2/")
    processes[2].kill()
    status, _, errors = finish(processes)
    assert status == [1, 1, -signal.SIGKILL], errors
    assert the_message(errors).startswith("rank 2 of 3 was lost: no sign of life for"), errors


def test_a_killed_rank_under_the_launcher(endless):
    process = subprocess.Popen(
        [*launcher(2), *command(endless[0])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    wait_for(process, "step 2/")
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    ranks = [pid for pid in children if b"RANK=1\0" in rank_environment(pid)]
    os.kill(int(ranks[0]), signal.SIGKILL)
    status, _, errors = finish([process])
    assert status != [0]
    assert the_message(errors).startswith("rank 1 of 2 was lost"), errors


def rank_environment(pid: str) -> bytes:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return b"\0" + file.read().replace(b"LOCAL_RANK", b"").replace(b"GROUP_RANK", b"")


def test_a_stopped_rank_does_not_hold_the_others_for_ever(endless):
    processes = start_ranks(2, endless[0])
    wait_for(processes[0], "step 2/")
    processes[1].send_signal(signal.SIGSTOP)
    try:
        status, _, errors = finish(processes[:1])
        assert status == [1]
        assert the_message(errors).startswith("rank 1 of 2 was lost"), errors
    finally:
        processes[1].kill()
        processes[1].communicate()


def test_a_signal_to_one_rank_saves_once_and_ends_all(endless):
    recipe, folder = endless
    processes = start_ranks(2, recipe)
    wait_for(processes[0], "step 2/")
    processes[1].send_signal(signal.SIGTERM)
    status, _, errors = finish(processes)
    assert status == [0, 0], errors
    assert len(checkpoints(folder)) == 1
    assert [line["event"] for line in events(folder)][-2:] == ["checkpoint", "stop"]


ONE_DOCUMENT_EACH = {
    "data": {"sample_packing": False, "shuffle": False},
    "train": {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 6},
}


def test_a_nonfinite_loss_of_one_rank_stops_all_and_is_named_once(tmp_path):
    recipe = poisoned(tmp_path, 50).recipe(**ONE_DOCUMENT_EACH)
    # Document 7 is the second micro-batch of step 4, on rank 1.
    text = run_ranks(2, recipe, status=1)
    assert "step 4, micro-batch 2 of 2 (documents 7): the loss is nan; all parameters are finite" in text


@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_a_nonfinite_gradient_names_micro_batch_and_parameter(tmp_path, sharding):
    """The forward pass is finite; a neuron that is off and weighs 3e38 lets the backward pass overflow."""
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[0] = 0
        mlp.up_proj.weight[0] *= 1e4
        mlp.down_proj.weight[:, 0] = 3e38
    sections = {**ONE_DOCUMENT_EACH, "train": {**ONE_DOCUMENT_EACH["train"], "sharding": sharding}}
    text = run_ranks(2, Workbench(tmp_path, model=model).recipe(**sections), status=1)
    assert "step 1, micro-batch 1 of 2 (documents 0): the gradient of model.layers.1." in text
    assert "_proj.weight is not finite" in text


def test_errors_of_the_recipe_come_once(bench):
    for ranks, train, text in [
        (2, {"sequence_parallel": 3}, "train.sequence_parallel is 3: it must divide the number of ranks, 2"),
        (4, {"sequence_parallel": 4}, "it must divide the model's 4 heads and 2 KV heads"),
    ]:
        recipe = bench.recipe("wrong", **settings(1, train=train))
        assert text in run_ranks(ranks, recipe, status=1)
    assert not (bench.folder / "wrong").exists()
    assert (
        "it must divide the number of ranks, 1"
        in run(bench.recipe("wrong", **settings(1, train={"sequence_parallel": 2})), status=1).stderr
    )


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': it must be an integer"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2': it must be an integer from 0 to 1"),
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not"),
    ],
)
def test_an_environment_that_makes_no_sense(bench, variables, text):
    done = subprocess.run(
        command(bench.recipe("environment")),
        capture_output=True,
        text=True,
        env={**environment(), **variables},
    )
    assert done.returncode == 1
    assert text in done.stderr
