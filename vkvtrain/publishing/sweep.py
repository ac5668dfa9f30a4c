"""What a sweep of `vkvtrain ablate` measured of a run and of its controls."""

from pathlib import Path
from typing import Any

from vkvtrain.ablation.grid import BASE, FULL
from vkvtrain.ablation.store import Store
from vkvtrain.ablation.summary import Setting, Summary, summarise
from vkvtrain.identity import adapter_hash
from vkvtrain.publishing.measured import Evaluation, Interval, MeasuredDifference, MeasuredRow, checked
from vkvtrain.training.run_directory import base_identity


def read_sweep(directory: Path, run: Path, name: str | None) -> Evaluation:
    """The evaluation of a run in a sweep's results.

    Args:
        directory: output of `vkvtrain ablate`.
        run: the run's directory; the sweep must have measured this very adapter.
        name: what the sweep calls it; None finds it by its weights.

    Raises:
        ValueError: no sweep, one that measured other weights, or none of the run under eviction.
    """
    store = Store.existing(directory)
    summary = summarise(store)
    model = _model_of(summary.plan, directory, run, name)
    rows = [_row(setting, summary) for setting in summary.settings if setting.grade is not None]
    compared = [
        MeasuredDifference(
            task=one.ours.task,
            cache=_cache(one.ours.policy, one.ours.budget),
            kind=one.kind,
            problems=one.problems,
            difference=Interval(**one.difference),
            p=one.p_holm,
        )
        for one in summary.comparisons
        if one.ours.model == model
    ]
    missing = [status.name for status in summary.missing]
    return checked(Evaluation(rows, model, compared, missing), directory)


def _model_of(plan: dict[str, Any], directory: Path, run: Path, name: str | None) -> str:
    """What the sweep calls the run; raises ValueError unless its weights are the run's."""
    adapters = {
        key: None if model["peft"] is None else model["fingerprint"].rpartition("+")[2]
        for key, model in plan["models"].items()
    }
    ours = adapter_hash(run)
    if name == BASE:
        raise ValueError(f"--results-model {name!r} is the model without this adapter: name the adapter's row")
    if name is None:
        name = next((key for key, adapter in adapters.items() if adapter == ours), None)
    elif name not in adapters:
        raise ValueError(f"--results-model {name!r}: the sweep has no such model (there are: {', '.join(adapters)})")
    elif adapters[name] is not None and adapters[name] != ours:
        name = None
    if name is None:
        raise ValueError(
            f"--results {str(directory)!r} measured other weights than those in {str(run)!r} (models: "
            f"{', '.join(adapters)}): run the sweep again with this adapter"
        )
    measured, trained = plan["models"][name]["fingerprint"].rpartition("+")[0], base_identity(run)
    if adapters[name] is not None and trained not in (None, measured):
        raise ValueError(
            f"--results {str(directory)!r} measured this adapter on another base model than that of its "
            f"training ({measured} instead of {trained}): run the sweep again with that one"
        )
    return name


def _row(setting: Setting, summary: Summary) -> MeasuredRow:
    key, means = setting.key, setting.means
    assert setting.grade is not None
    return MeasuredRow(
        model=key.model,
        task=key.task,
        metric=summary.plan["tasks"][key.task]["metric"],
        cache="full" if key.policy == FULL else "evicted",
        policy=key.policy,
        budget=key.budget,
        compression=setting.compression,
        n=setting.problems,
        exact_match=Interval(**setting.grade),
        gap_closed=Interval(**setting.gap) if setting.gap is not None else None,
        tokens=means.get("tokens"),
        looping_or_cut_off=means.get("looping_or_cut_off"),
        peak_kv_bytes=means.get("peak_kv_bytes"),
        evictions=means.get("evictions"),
    )


def _cache(policy: str, budget: int | None) -> str:
    return "full cache" if budget is None else f"{policy}, budget {budget}"
