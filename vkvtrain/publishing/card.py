"""The model card: text from a template, metadata that the Hub understands, everything from data escaped."""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vkvtrain.publishing.measured import Evaluation, MeasuredRow
from vkvtrain.publishing.run import FinishedRun, is_path

_TEMPLATE = "card.md.jinja"


class Markdown(str):
    """Text that is Markdown already; everything else that a template prints is escaped."""


def escaped(value: Any) -> str:
    """A value as one line of Markdown text that means only itself, also in a table."""
    if isinstance(value, Markdown):
        return value
    line = html.escape(re.sub(r"\s+", " ", str(value)), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)


def code(value: Any) -> Markdown:
    """A value as a code span, also in a table."""
    line = re.sub(r"[`|]", "'", " ".join(str(value).split()))
    return Markdown(f"`{line}`")


def model_card(
    run: FinishedRun, evaluation: Evaluation | None, name: str, versions: Mapping[str, str], merged: bool
) -> ModelCard:
    """The card of a run.

    Args:
        run: what is published.
        evaluation: what was measured of it, or None.
        name: `user/repository`, or the directory's name.
        versions: of the libraries it was trained with.
        merged: whether whole weights are published, else an adapter.

    Raises:
        ValueError: metadata that do not survive being written and read.
    """
    results = [result for row in evaluation.own for result in _results(row)] if evaluation else None
    licence: dict[str, Any] = dict(run.base.licence)
    data = ModelCardData(
        base_model=run.base.name,
        base_model_relation=("finetune" if merged else "adapter") if run.base.name else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        datasets=[run.hub_dataset] if run.hub_dataset else None,
        tags=["vkvtrain", "kv-cache-eviction", run.eviction.policy, "lora", "custom_generate"],
        model_name=name.rpartition("/")[2],
        eval_results=results,
        **licence,
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        finalize=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code,
        "quoted": lambda text: Markdown(json.dumps(text)),
        "plain": lambda value: Markdown("-" if value is None else value),
        "number": lambda value, form: "-" if value is None else form.format(value),
    }
    text = environment.get_template(_TEMPLATE).render(
        run=run,
        data=public_recipe(run).get("data", {}).get("source"),
        evaluation=evaluation,
        name=name,
        title=name.rpartition("/")[2],
        versions=versions,
        merged=merged,
        budgets=_budgets(run),
        full=_full_bytes(evaluation),
        extra="gap closed [95%]" if evaluation and any(row.gap_closed for row in evaluation.rows) else "fact match",
        settings=Markdown(yaml.safe_dump(public_recipe(run), sort_keys=False, width=1000).strip()),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
    read: Any = card.data
    if (read.eval_results or None) != results or read.license != run.base.licence["license"]:
        raise ValueError("the card's metadata do not survive being written and read: please report this")
    return card


def _results(row: MeasuredRow) -> list[EvalResult]:
    """A row as entries of the card's `model-index`."""
    arguments = {"cache": row.cache, "policy": row.policy, "budget": row.budget, "n": row.n, "seed": row.seed}
    measured = {
        row.metric: (row.exact_match.value, {"low": row.exact_match.low, "high": row.exact_match.high}),
        **({} if row.fact_match is None else {"fact_match": (row.fact_match, {})}),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.task_name,
            dataset_name=row.task_name,
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')}, {row.setting}",
            metric_value=value,
            metric_args={name: given for name, given in (arguments | interval).items() if given is not None},
        )
        for metric, (value, interval) in measured.items()
    ]


def _full_bytes(evaluation: Evaluation | None) -> dict[tuple[str, str | None], float | None]:
    """By (model, task), the peak bytes of the full cache."""
    rows = evaluation.rows if evaluation else []
    return {(row.model, row.task): row.peak_kv_bytes for row in rows if row.cache == "full"}


def _budgets(run: FinishedRun) -> list[Any]:
    budget = (run.recipe.get("eviction") or {}).get("budget")
    if isinstance(budget, dict):  # {low, high} or {from, to}
        return [f"{key} {value}" for key, value in budget.items()]
    return budget if isinstance(budget, list) else [budget]


def public_recipe(run: FinishedRun) -> dict[str, Any]:
    """The resolved recipe without paths of the machine it ran on."""
    recipe = {key: dict(value) if isinstance(value, dict) else value for key, value in run.recipe.items()}
    recipe["output"] = Path(str(recipe.get("output", ""))).name
    recipe["model"]["name"] = run.base.name or "tiny"
    return _without_paths(recipe)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and is_path(value) else value
