"""The programs that check a GPU machine, as far as they go without a GPU."""

import importlib.util
import json
import sys
import time

import pytest
import torch
from install_helpers import ROOT, run


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stages(monkeypatch):
    module = load("gpu_stages")
    monkeypatch.setattr(module, "machine", lambda: {"card": "none", "torch": torch.__version__})
    return module


def go(stages, monkeypatch, tmp_path, *arguments):
    files = ["--result", tmp_path / "result.json", "--log", tmp_path / "log.txt", "--csrc-hash", "0123"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.sh", *map(str, files), *arguments])
    code = stages.main()
    return code, json.loads((tmp_path / "result.json").read_text())


def test_a_failing_stage_does_not_stop_the_later_ones(stages, monkeypatch, tmp_path, capsys):
    def commands(names, pieces):
        piece = pieces / "piece.json"
        write = f"import pathlib; pathlib.Path({str(piece)!r}).write_text('{{\"samples\": [1, 2]}}')"
        return [
            stages.Command(
                "checks", "fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 30
            ),
            stages.Command("checks", "hangs", ["sh", "-c", "echo waiting; sleep 60"], 0.5),
            stages.Command("checks", "is missing", ["/nonexistent/program"], 5),
            stages.Command("benchmark", "measures", [sys.executable, "-c", write], 30, piece),
        ]

    monkeypatch.setattr(stages, "commands", commands)
    start = time.monotonic()
    code, result = go(stages, monkeypatch, tmp_path, "checks", "benchmark")
    assert code == 1 and time.monotonic() - start < 30
    assert [e["result"] for e in result["stages"]["checks"]] == ["failed", "ran past 0 s", "failed"]
    assert [e["exit_code"] for e in result["stages"]["checks"]] == [3, None, None]
    assert result["stages"]["checks"][0]["output_tail"] == ["why"]
    assert result["stages"]["benchmark"][0]["data"] == {"samples": [1, 2]}
    assert not result["passed"] and result["csrc_hash"] == "0123"
    assert "waiting" in (tmp_path / "log.txt").read_text()
    said = capsys.readouterr().out
    assert "measures" in said and "why" in said


def test_all_passed(stages, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "commands", lambda *_: [stages.Command("tests", "fine", ["true"], 5)])
    code, result = go(stages, monkeypatch, tmp_path, "tests")
    assert code == 0 and result["passed"]


def test_no_time_left_is_a_failure(stages, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "commands", lambda *_: [stages.Command("tests", "late", ["true"], 5)])
    code, result = go(stages, monkeypatch, tmp_path, "--seconds", "1", "tests")
    assert code == 1 and result["stages"]["tests"][0]["result"] == "not run: no time left"


def test_the_commands_are_of_this_tree(stages, tmp_path):
    """Every script and folder that a stage names is there."""
    for command in stages.commands(list(stages.STAGES), tmp_path):
        for word in command.arguments:
            if word.startswith(("scripts/", "tests/", "benchmarks/")):
                assert (ROOT / word).exists(), word


def test_budget_of_the_carried_module(monkeypatch):
    """It stands in for the compiled one, digit for digit."""
    topk_attn = pytest.importorskip("topk_attn")
    monkeypatch.setenv("TOPK_LIB", "unused")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    carried = load("carried_module")
    settings = [{"topk": 3}, {"topk": 3, "min_keys": 5}, {"ratio": 1.0}]
    for ratio in (0.01, 0.05, 0.1, 0.3, 1 / 3):
        settings += [{"ratio": ratio}, {"ratio": ratio, "min_keys": 4, "max_keys": 40}]
    for n in (0, 1, 2, 99, 100, 101, 1000, 4096, 131072):
        for setting in settings:
            assert carried.budget(n, **setting) == topk_attn.budget(n, **setting), (n, setting)


def test_carry_says_what_is_missing(tmp_path):
    done = run([ROOT / "scripts" / "carry.sh", tmp_path, tmp_path / "carry"], cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith(f"carry: no libtopk_attn.so in {tmp_path}: build it first")
    assert not (tmp_path / "carry").exists()


def test_gpu_check_says_what_is_missing(tmp_path):
    done = run([ROOT / "scripts" / "gpu_check.sh"], cwd=ROOT, env={"TOPK_CARRY": str(tmp_path)})
    assert done.returncode == 1
    assert f"{tmp_path}/lib/libtopk_attn.so is not there" in done.stderr
