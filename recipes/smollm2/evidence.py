"""The evidence on a pretrained model (`make evidence`): hours on two CPU cores, and resumable at any point.

    python recipes/smollm2/evidence.py

1. SmolLM2-135M-Instruct, converted, with the shipped adapter merged into it: it knows the ledger task
   (`vkvtrain/ledger.py`) with the full cache. `--base-afresh` trains that adapter again.
2. The gate: the base, evicted, must lose at least 25 points at both budgets; else there is nothing to win back.
3. The arms (`recipes/smollm2/ledger/*.yaml`), `--jobs` at once: the same rows, steps and rank; each is measured by its
   part of `eval/sweeps/ledger.yaml` as soon as it is trained.
4. Transfer: the adapters of seed 0 under policies that they were not trained for.
5. `docs/evidence.md`, its figure and the README's table, from the records in `docs/evidence`.

What has its record is neither trained nor measured again. Adapters and sweeps are in `runs/ledger`.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import findings
import tyro
from arms import (
    ARMS,
    BASE,
    MAIN,
    RUNS,
    TRANSFER,
    TRANSFERRED,
    Arm,
    evaluate,
    make_base,
    measure_held,
    missing,
    record_of,
    train,
)  # fmt: skip

GATE = 0.25
"""What eviction must cost the base at least, as a share of right answers."""


@dataclass
class Settings:
    jobs: int = 2
    """Arms that are trained or measured at once, one thread each."""
    problems: int = 200
    """Test problems of each evaluation."""
    base_afresh: bool = False
    """Train the base's adapter again instead of taking the shipped one."""
    report_only: bool = False
    """Write tables and figure from the records that are there, and stop."""


def check_gate() -> None:
    """Exit where the base keeps its answers under eviction."""
    found = {BASE: [record_of(BASE)]}
    right = {
        cell: sum(row) / len(row) for cell in ("full", *findings.EVICTED) for row in findings.grades(found[BASE], cell)
    }
    lost = ", ".join(f"{cell} {100 * share:.1f}%" for cell, share in right.items())
    print(f"gate: the base answers {lost}", flush=True)
    if any(right["full"] - right[cell] < GATE for cell in findings.EVICTED):
        sys.exit("evidence: the base loses too little to eviction: turn the task's dial, or lower the budgets")


def main(settings: Settings) -> None:
    if settings.report_only:
        findings.write()
        return
    make_base(settings.base_afresh)
    evaluate(BASE, MAIN, settings.problems, settings.jobs)
    check_gate()
    measure_held(BASE)
    writing = Lock()

    def pursue(arm: Arm) -> None:
        if not missing(arm.name, MAIN):
            return
        train(arm.recipe, RUNS / arm.name, arm.seed)
        evaluate(arm.name, MAIN, settings.problems, 1)
        if arm.seed == 0:
            measure_held(arm.name)
        with writing:
            findings.write()

    def transfer(name: str) -> None:
        evaluate(name, TRANSFER, settings.problems // 2, 1)
        with writing:
            findings.write()

    with ThreadPoolExecutor(settings.jobs) as pool:
        for done in [pool.submit(pursue, arm) for arm in ARMS] + [pool.submit(transfer, name) for name in TRANSFERRED]:
            done.result()
    findings.write()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
