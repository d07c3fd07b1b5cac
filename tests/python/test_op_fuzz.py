"""Random arguments, in a process of its own so that a crash is a failure and not the end of the test run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("seed", [1, 2])
def test_random_arguments(seed):
    done = subprocess.run(
        [sys.executable, "op_fuzz.py", str(seed), "10"], cwd=HERE, capture_output=True, text=True, timeout=120
    )
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
    assert done.returncode == 0, f"exit status {done.returncode}\n{tail}"
    # Both kinds of cases must really have run.
    counts = re.search(r"DONE \{.*'(?:checked|refused)': (\d+).*'(?:checked|refused)': (\d+)", done.stdout)
    assert counts, tail
    assert int(counts[1]) > 50 and int(counts[2]) > 50, counts[0]
