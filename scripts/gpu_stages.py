"""The stages of scripts/gpu_check.sh, which sets the environment up (TOPK_*, PYTHONPATH).

Each stage is one or more commands, each with a time limit of its own and none beyond the limit of the whole.
They run one after another, but for test files that measure neither time nor the device's free memory: those
share the GPU, since most of their time is the processor's. A command leaves its output in the log and may
leave a JSON file, which becomes part of the result. Standard library only; torch is asked about the machine
in a process of its own, so that a broken installation is one line here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tests", "benchmark", "checks", "sanitizer")
TOOLS = ("memcheck", "racecheck", "synccheck")
TESTS = ROOT / "tests" / "python" / "cuda"
TESTS_ALONE = ("test_cuda_runtime",)  # watches the device's free memory
# Where CUDA toolkits put compute-sanitizer if PATH does not have it.
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
# Check programs time large cases too unless they are told not to: the benchmark does that.
CHECK_ARGUMENTS = {"union_check": ["quick"]}
TAIL = 40  # lines of output that the result keeps of each command; the log has all

MACHINE = """
import json, platform, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps({
    "card": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count,
    "memory_gib": round(p.total_memory / 2**30, 1), "torch": torch.__version__, "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version(), "python": platform.python_version()}))
"""


@dataclass
class Command:
    """One command of a stage. `piece`: JSON or JUnit XML that it writes."""

    stage: str
    name: str
    arguments: list[str]
    limit: float
    piece: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    shares: bool = False  # runs at the same time as its neighbours that share


def commands(stages: list[str], pieces: Path) -> list[Command]:
    found = []
    python = sys.executable
    folder = Path(os.environ.get("TOPK_CHECKS", "/nonexistent"))
    programs = sorted(folder.glob("*_check")) if folder.is_dir() else []
    if "tests" in stages:
        # A process a file, so that a kernel that corrupts its context does not take all tests along.
        files = sorted(TESTS.glob("test_*.py"), key=lambda p: p.stem not in TESTS_ALONE)
        for file in files:
            report = pieces / f"{file.stem}.xml"
            pytest = [python, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "--tb=short"]
            pytest += ["--durations=5", "--maxfail=100", f"--junitxml={report}"]
            alone = file.stem in TESTS_ALONE
            environment = {"TOPK_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "2"}
            found.append(
                Command("tests", file.stem, pytest, 90 if alone else 200, report, environment, not alone)
            )
    if "benchmark" in stages:
        out = pieces / "benchmark.json"
        command = [python, "benchmarks/attention.py", "--quick", "--out", str(out)]
        real = Path(os.environ.get("TOPK_REAL", "/nonexistent"))
        if real.is_file():
            command += ["--real", str(real)]
        found.append(Command("benchmark", "benchmarks/attention.py --quick", command, 150, out))
    if "checks" in stages:
        found += [Command("checks", p.name, [str(p), *CHECK_ARGUMENTS.get(p.name, [])], 45) for p in programs]
        if not programs:
            found.append(Command("checks", "no check programs", ["false"], 5))
    if "sanitizer" in stages:
        sanitizer = compute_sanitizer()
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            # Only our kernels are instrumented; torch's make the inputs, and its probing calls may fail.
            command += ["--kernel-name", "kernel_substring=topk_attn", "--report-api-errors", "no"]
            command += ["--target-processes", "all", python, "scripts/gpu_small.py"]
            # Tensors become allocations of their own, so that accesses past their end are seen.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
            found.append(Command("sanitizer", tool, command, 60, None, environment))
    return found


def compute_sanitizer() -> str:
    places = [shutil.which("compute-sanitizer"), *(f"{f}/compute-sanitizer" for f in TOOL_FOLDERS)]
    return next((p for p in places if p and Path(p).is_file()), "compute-sanitizer")


def run(command: Command, limit: float, log: Path) -> dict:
    """Runs it in a process group of its own, killed when the time is over. `log` takes its output."""
    with open(log, "w") as out:
        return run_into(command, limit, out)


def run_into(command: Command, limit: float, log) -> dict:
    start = time.monotonic()
    log.write(f"\n===== {command.stage}: {command.name}: {' '.join(command.arguments)}\n")
    log.flush()
    begin = log.tell()
    result = "failed"
    code = None
    try:
        process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | command.environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            result = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            result = f"ran past {limit:.0f} s"
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    except OSError as error:
        log.write(f"{error}\n")
    seconds = time.monotonic() - start
    log.flush()
    with open(log.name, errors="replace") as text:
        text.seek(begin)
        tail = text.read().splitlines()[-TAIL:]
    entry = {"name": command.name, "result": result, "exit_code": code, "seconds": round(seconds, 1)}
    return entry | {"output_tail": tail} | read_piece(command.piece)


def read_piece(piece: Path | None) -> dict:
    if piece is None or not piece.is_file():
        return {}
    try:
        if piece.suffix == ".xml":
            return {"counts": test_counts(piece)}
        return {"data": json.loads(piece.read_text())}
    except (ValueError, xml.etree.ElementTree.ParseError) as error:
        return {"piece_error": str(error)}


def test_counts(report: Path) -> dict:
    """Counts, and the failing and the slowest tests, of a JUnit report."""
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failing = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    reasons: dict[str, int] = {}
    for skip in suite.iter("skipped"):
        reasons[skip.get("message", "")] = reasons.get(skip.get("message", ""), 0) + 1
    return counts | {"failing": failing, "skip_reasons": reasons}


def in_company(found: list[Command]) -> list[list[Command]]:
    """Commands that run at the same time, in order."""
    groups: list[list[Command]] = []
    for command in found:
        if command.shares and groups and groups[-1][0].shares:
            groups[-1].append(command)
        else:
            groups.append([command])
    return groups


def report(command: Command, entry: dict) -> None:
    counts = entry.get("counts", {})
    numbers = ", ".join(f"{v} {k}" for k, v in counts.items() if isinstance(v, int))
    what = f"{command.stage:10} {command.name:32}"
    print(f"{what} {entry['seconds']:6.1f} s  {entry['result']}  {numbers}")
    if entry["result"] != "passed":
        for line in entry.get("output_tail", [])[-15:]:
            print(f"    {line[:200]}")
    sys.stdout.flush()


def output(command: list[str]) -> tuple[str, str]:
    """(standard output, error): one of the two is empty."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return (done.stdout, "") if done.returncode == 0 else ("", done.stderr.strip()[-300:] or "failed")


def machine() -> dict:
    facts: dict = {"os": platform.platform(), "cores": os.cpu_count()}
    driver, _ = output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    facts["driver"] = driver.split()[0] if driver.split() else None
    found, error = output([sys.executable, "-c", MACHINE])
    return facts | (json.loads(found) if found else {"error": error})


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks/results/last_gpu_run.json")
    parser.add_argument("--log", type=Path, default=ROOT / "build/gpu_check.log")
    parser.add_argument("--seconds", type=float, default=460.0, help="limit of the whole")
    parser.add_argument("--csrc-hash", required=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [s for s in options.stages if s not in STAGES]
    if unknown:
        parser.error(f"no such stage: {unknown[0]}; stages are {', '.join(STAGES)}")
    stages = options.stages or list(STAGES)

    start = time.monotonic()
    facts = machine()
    card, torch = facts.get("card", "no GPU"), facts.get("torch")
    print(f"gpu_check: {card}, torch {torch}, sources {options.csrc_hash}")
    if "error" in facts:
        print(f"gpu_check: {facts['error']}", file=sys.stderr)
        return 1
    result = {
        "csrc_hash": options.csrc_hash,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": facts,
        "stages": {stage: [] for stage in stages},
    }
    options.log.parent.mkdir(parents=True, exist_ok=True)
    options.result.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as pieces, open(options.log, "w") as log:
        for together in in_company(commands(stages, Path(pieces))):
            left = options.seconds - (time.monotonic() - start)
            logs = [Path(pieces) / f"{i}.log" for i in range(len(together))]
            if left < 3:
                entries = [
                    {"name": c.name, "result": "not run: no time left", "seconds": 0.0} for c in together
                ]
            else:
                with ThreadPoolExecutor(len(together)) as pool:
                    limits = [min(c.limit, left) for c in together]
                    entries = list(pool.map(run, together, limits, logs))
                log.writelines(path.read_text(errors="replace") for path in logs)
                log.flush()
            for command, entry in zip(together, entries, strict=True):
                failed |= entry["result"] != "passed"
                result["stages"][command.stage].append(entry)
                report(command, entry)
            # Written after each stage: a machine that goes away leaves what there was.
            result["seconds"] = round(time.monotonic() - start, 1)
            result["passed"] = not failed
            options.result.write_text(json.dumps(result, indent=1) + "\n")
    print(f"gpu_check: {'failed' if failed else 'all passed'} in {result['seconds']:.0f} s; {options.result}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
