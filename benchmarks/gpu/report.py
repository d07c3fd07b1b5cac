"""Rows of the attention benchmark, where they ran, and how they are printed and stored."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Row:
    """One figure: the time of `subject` over the time of `peer` (or the other way round when `faster`)."""

    case: str
    subject: str
    peer: str
    part: str  # forward, backward, both
    must: float | None = None
    go_for: float | None = None
    faster: bool = False
    unit: str = "x"
    subject_value: float | None = None  # milliseconds, bytes
    peer_value: float | None = None
    value: float | None = None
    state: str = "not run"  # ok, failed, not run
    message: str = ""

    @property
    def name(self) -> str:
        return f"{self.case} | {self.subject} / {self.peer} | {self.part}"

    def settle(self, subject: float, peer: float) -> None:
        self.subject_value, self.peer_value = subject, peer
        self.value = peer / subject if self.faster else subject / peer
        self.state = "ok"

    def leave(self, state: str, message: str) -> None:
        self.state, self.message = state, message

    def _met(self, bar: float | None) -> bool | None:
        if bar is None or self.value is None:
            return None
        return self.value >= bar if self.faster else self.value <= bar

    @property
    def met(self) -> bool | None:
        return self._met(self.must)

    @property
    def reached(self) -> bool | None:
        return self._met(self.go_for)

    def record(self) -> dict:
        return {**self.__dict__, "name": self.name, "met": self.met, "reached": self.reached}


def row_line(row: Row) -> str:
    what = f"  {row.subject + ' / ' + row.peer:<48} {row.part:<9}"
    if row.state != "ok":
        return f"{what} {row.state.upper()}: {row.message}"
    sign = ">=" if row.faster else "<="
    bars = "no bar"
    if row.must is not None:
        bars = f"must {sign} {row.must:<6.4g} {'met   ' if row.met else 'MISSED'}"
    if row.go_for is not None:
        bars += f"  go for {sign} {row.go_for:<6.4g} {'reached' if row.reached else 'not yet'}"
    if row.unit == "MiB":
        return f"{what} {row.value:8.1f} MiB{'':19} {bars}"
    return f"{what} {row.value:6.3f} x  {row.subject_value:9.3f} / {row.peer_value:9.3f} ms  {bars}"


def source_hash() -> str:
    """As scripts/csrc_hash.sh: of the sources that a carried library was built from, else of those here."""
    carried = Path(os.environ.get("TOPK_CARRY", "/nonexistent")) / "csrc_hash"
    if carried.is_file():
        return carried.read_text().strip()
    command = ["bash", str(ROOT / "scripts" / "csrc_hash.sh")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def card_state() -> dict[str, str]:
    """What nvidia-smi says of the card now; empty where there is none."""
    fields = (
        "name",
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        first = done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(fields, (x.strip() for x in first.split(",")), strict=False))


def environment(device: torch.device) -> dict:
    found = {
        "device": str(device),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "csrc_hash": source_hash(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["card"] = card_state() or {"name": properties.name}
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        found["cudnn"] = torch.backends.cudnn.version()
    try:
        import topk_attn

        found["topk_attn"] = topk_attn.__version__
        found["build"] = topk_attn.build_info()
    except Exception as error:  # every row of this library will say so too
        found["topk_attn"] = f"does not import: {error}"
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def write_atomically(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w") as file:
        file.write(json.dumps(record, indent=1, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
