"""Runs the cases of the attention benchmark; every row outlives an exception of its competitors."""

from __future__ import annotations

import gc
import statistics
import time

import torch

from . import competitors as peers
from . import data, measure, report
from .bars import Budgets, Case
from .data import Budget, Inputs
from .report import Row

PROBE_TOKENS = 16384  # the form of a dense backend is chosen at this length
MIB = 2**20


def build(name: str, inputs: Inputs, budgets: Budgets) -> peers.Competitor:
    """The competitor of this name; dense ones are chosen by Runner.dense."""
    by_label = {b.label: b for b in (budgets.small, budgets.large, budgets.fixed)}
    family, _, rest = name.partition(" ")
    if name == "top-k ratio=1":
        return peers.topk(name, inputs, Budget("all", {"ratio": 1.0}))
    if name == "top-k dense path":
        # Every row keeps everything, no tile is gathered: the masked dense kernels without a mask.
        keep_all = Budget("all", {"topk": inputs.tokens})
        settings = {"largest_share": 0.0} if inputs.q.is_cuda else {}
        return peers.topk(name, inputs, keep_all, **settings)
    label, _, variant = rest.partition(" ")
    if family == "slab+flex":
        return peers.slab_flex(name, inputs, by_label[label])
    if family == "eager":
        return peers.eager(name, inputs, by_label[label])
    settings = {"build": variant} if variant == "portable" else {}
    return peers.topk(name, inputs, by_label[label], deterministic=variant == "deterministic", **settings)


class Runner:
    def __init__(
        self, device: torch.device, budgets: Budgets, seed: int, seconds: float, most_rounds: int
    ) -> None:
        self.device, self.budgets, self.seed = device, budgets, seed
        self.seconds, self.most_rounds = seconds, most_rounds
        self.clock = measure.Clock(device)
        self._dense_form: dict[tuple, int] = {}

    def run(self, case: Case, rows: list[Row]) -> dict:
        """Fills `rows`; returns what is stored of the case."""
        try:
            inputs = case.make()
        except Exception as error:
            return self._lost(case, rows, error)
        batch, tokens, heads, dim = inputs.q.shape
        shape = f"B{batch} S{tokens} H{heads} Hkv{inputs.k.shape[2]} D{dim}"
        print(f"\n{case.name}  ({shape})", flush=True)
        record: dict = {"case": case.name, "shape": shape, "shares": self._shares(case, inputs)}

        running, failures, missing, checks, plans = {}, {}, {}, {}, {}
        for name in dict.fromkeys(n for row in rows for n in (row.subject, row.peer)):
            try:
                competitor = (
                    self.dense(name, inputs) if name in peers.DENSE else build(name, inputs, self.budgets)
                )
                checks[name] = self._check(competitor, inputs)
                if inputs.q.is_cuda and name.startswith("top-k"):
                    plans[name] = self._plan(name)
                running[name] = competitor
            except peers.NotAvailable as error:
                missing[name] = str(error)
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"
            self.tidy()
        samples = self._sample(running, failures)
        for row in rows:
            self._settle(row, samples, failures, missing)
            print(report.row_line(row), flush=True)
        record |= {
            "samples_ms": samples,
            "medians_ms": {
                n: {p: measure.median(x, p) for p in measure.PARTS} for n, x in samples.items() if x
            },
            "relative_error": checks,
            "plans": plans,
            "notes": {n: c.note for n, c in running.items() if c.note},
            "failures": failures,
            "not_available": missing,
            "selection_ms": self._selection(case, inputs),
            "card_after": report.card_state() if self.device.type == "cuda" else {},
        }
        if plans:
            print("  plans: " + "; ".join(f"{n}: {' '.join(map(str, p.values()))}" for n, p in plans.items()))
        for name, note in record["notes"].items():
            if name in record["medians_ms"]:
                times = " + ".join(f"{record['medians_ms'][name][p]:.3f}" for p in ("forward", "backward"))
                print(f"  {name}: {times} ms, {note}", flush=True)
        return record

    def dense(self, name: str, inputs: Inputs) -> peers.Competitor:
        """The fastest correct form of a dense backend, chosen at PROBE_TOKENS once per shape."""
        forms = peers.dense_forms(name, inputs)
        key = (
            name,
            min(inputs.tokens, PROBE_TOKENS),
            inputs.q.shape[0],
            *inputs.q.shape[2:],
            inputs.k.shape[2],
        )
        if key not in self._dense_form:
            probe = inputs.first(min(inputs.tokens, PROBE_TOKENS))
            times, errors = {}, []
            for number, form in enumerate(forms):
                try:
                    competitor = form(probe)
                    self._check(competitor, probe)
                    found = [self.clock.sample(competitor) for _ in range(4)]
                    times[number] = statistics.median(x["both"] for x in found[1:])
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
            if not times:
                raise RuntimeError(f"no form of {name} runs: {errors[0]}")
            self._dense_form[key] = min(times, key=times.get)
        return forms[self._dense_form[key]](inputs)

    @staticmethod
    def _plan(name: str) -> dict:
        """What served the step just made; raises when it is not the build that the row is about."""
        import topk_attn.cuda

        plan = topk_attn.cuda.last_plan()._asdict()
        if name.endswith(" portable") and plan["build"] != "portable":
            raise RuntimeError(f"the build that ran is {plan['build']}")
        return plan

    def _check(self, competitor: peers.Competitor, inputs: Inputs) -> float:
        out, gradients = measure.step(competitor)
        return measure.check(competitor, inputs, out, gradients[0], self.seed)

    def _sample(
        self, running: dict[str, peers.Competitor], failures: dict[str, str]
    ) -> dict[str, list[dict]]:
        """One warm round, whose length says how many rounds the time allows (at least 3), then those."""
        samples: dict[str, list[dict]] = {name: [] for name in running}
        rounds, number = 1, 0
        while number <= rounds:
            began = time.perf_counter()
            for name in [n for n in running if n not in failures]:
                try:
                    sample = self.clock.sample(running[name])
                    if number:
                        samples[name].append(sample)
                except Exception as error:
                    failures[name] = f"{type(error).__name__}: {error}"
                    self.tidy()
            if number == 0:
                fitting = int(self.seconds / max(time.perf_counter() - began, 1e-6))
                rounds = max(3, min(self.most_rounds, fitting))
            number += 1
        return {name: found for name, found in samples.items() if name not in failures}

    @staticmethod
    def _settle(row: Row, samples: dict, failures: dict, missing: dict) -> None:
        for name in (row.subject, row.peer):
            if name in failures:
                return row.leave("failed", f"{name}: {failures[name]}")
            if name in missing:
                return row.leave("not run", f"{name}: {missing[name]}")
        row.settle(*(measure.median(samples[name], row.part) for name in (row.subject, row.peer)))

    def _shares(self, case: Case, inputs: Inputs) -> dict:
        shares = {}
        for budget in (self.budgets.small, self.budgets.large, self.budgets.fixed):
            if case.kind == "eager" or budget is self.budgets.fixed and case.kind != "random":
                continue
            try:
                found = shares[budget.label] = data.union_shares(inputs, budget, self.seed)
            except Exception as error:
                print(f"  union shares at {budget.label}: {type(error).__name__}: {error}")
                continue
            print(
                f"  union at {budget.label}: {found['rows_64']:.3f} of the visible keys for 64 rows, "
                f"{found['rows_128']:.3f} for 128; chunks of 16 keys {found['chunks_16']:.3f}",
                flush=True,
            )
        return shares

    def _selection(self, case: Case, inputs: Inputs) -> list[float] | str:
        """Samples of topk_select alone, which the forward contains; for information."""
        if case.kind == "eager":
            return []
        try:
            import topk_attn

            settings = self.budgets.small.arguments
            run = lambda: topk_attn.topk_select(inputs.q, inputs.k, **settings)  # noqa: E731
            found = [self.clock.call(run) for _ in range(4)][1:]
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        print(f"  topk_select {self.budgets.small.label} alone: {statistics.median(found):.3f} ms")
        return found

    @staticmethod
    def _lost(case: Case, rows: list[Row], error: Exception) -> dict:
        message = f"inputs: {type(error).__name__}: {error}"
        print(f"\n{case.name}")
        for row in rows:
            row.leave("failed", message)
            print(report.row_line(row))
        return {"case": case.name, "failures": {"inputs": message}}

    def tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:  # a dead context: every later row will say so itself
                print(f"  {error}")

    def workspace(self, case: Case, rows: list[Row]) -> dict:
        """Fills the rows of memory that forward and backward take beyond inputs and results."""
        print(f"\n{case.name}, workspace", flush=True)
        try:
            large = case.make()
            small = large.first(1024)
        except Exception as error:
            return self._lost(case, rows, error)
        found = {}
        for row in rows:
            try:
                make = lambda inputs, row=row: build(row.subject, inputs, self.budgets)  # noqa: E731
                found[row.subject] = measure.workspace(make, small, large)
                row.settle(found[row.subject]["bytes"], MIB)
            except Exception as error:
                row.leave("failed", f"{type(error).__name__}: {error}")
            self.tidy()
            print(report.row_line(row), flush=True)
        return {"case": case.name, "workspace": found}
