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

`--small` is the same with two arms, fewer steps and fewer problems, in `runs/demo-real`; it prints its tables, and
leaves the pages as they are.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import findings
import tyro
from arms import BASE, MAIN, ROOT, TRANSFER, TRANSFERRED, Arm, Study, evaluate, look_inside, make_base, train_arm

GATE = 0.25
"""What eviction must cost the base at least, as a share of right answers."""
SMALL = Study(
    (Arm("vase", 0), Arm("dense", 0)), Path("runs/demo-real"), ROOT / "runs/demo-real/records", problems=60, steps=80
)


@dataclass
class Settings:
    jobs: int = 2
    """Arms that are trained or measured at once, one thread each."""
    small: bool = False
    """Two arms, 80 steps and 60 problems instead of everything."""
    base_afresh: bool = False
    """Train the base's adapter again instead of taking the shipped one."""
    report_only: bool = False
    """Write tables and figure from the records that are there, and stop."""


def check_gate(study: Study) -> None:
    """Exit where the base keeps its answers under eviction."""
    cells = ("full", *findings.EVICTED)
    right = {cell: sum(row) / len(row) for cell in cells for row in findings.grades([study.record(BASE)], cell)}
    print(
        "gate: the base answers", ", ".join(f"{cell} {100 * share:.1f}%" for cell, share in right.items()), flush=True
    )
    if any(right["full"] - right[cell] < GATE for cell in findings.EVICTED):
        sys.exit("evidence: the base loses too little to eviction: turn the task's dial, or lower the budgets")


def show(study: Study) -> None:
    """What the records say: into the pages, or of a small study to the terminal."""
    if study is not SMALL:
        findings.write(study)
        return
    found = findings.records(study)
    print(
        f"{findings.main_table(found)}\n\n{findings.comparisons(found)}\n\n{findings.settings_line(found)}", flush=True
    )


def main(settings: Settings) -> None:
    study = SMALL if settings.small else Study()
    if settings.report_only:
        show(study)
        return
    make_base(settings.base_afresh)
    evaluate(study, BASE, MAIN, study.problems, settings.jobs)
    check_gate(study)
    look_inside(study, BASE)
    writing = Lock()

    def pursue(arm: Arm) -> None:
        if study.missing(arm.name, MAIN):
            train_arm(study, arm)
            evaluate(study, arm.name, MAIN, study.problems, jobs=1)
            if arm.seed == 0:
                look_inside(study, arm.name)
            with writing:
                show(study)

    def transfer(name: str) -> None:
        if study.missing(name, TRANSFER):
            evaluate(study, name, TRANSFER, study.problems // 2, jobs=1)
            with writing:
                show(study)

    with ThreadPoolExecutor(settings.jobs) as pool:
        todo = [pool.submit(pursue, arm) for arm in study.arms]
        todo += [] if settings.small else [pool.submit(transfer, name) for name in TRANSFERRED]
        for one in todo:
            one.result()
    show(study)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
