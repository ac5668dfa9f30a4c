"""What eviction does to a real pretrained model: value ranges, next-token loss, and a fact stated once.

    python benchmarks/probe_pretrained.py

Four questions about SmolLM2-135M-Instruct (or `--model`), answered on the documentation that comes with Python:

- how heavy-tailed are the value ranges of each layer, and how large are the sinks' own?
- policy x budget: how much does next-token loss rise when the cache is evicted, token by token as in decoding?
- do sinks matter, and does evicting large values hurt more than evicting at random?
- is a passcode that was stated once still found after many evictions?

Every cell is kept in `cells.jsonl` as it is measured; a rerun continues. About half an hour on two CPU cores.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import transformers
import tyro
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.ablation.statistics import interval, paired_interval
from vkvtrain.events import evictions_by
from vkvtrain.policies import POLICIES
from vkvtrain.versions import cache_argument

ROOT = Path(__file__).parents[1]
BLOCK = 128
"""Tokens whose mean loss is one observation; those of one text are not independent: intervals are a little narrow."""
PROMPT = 16
"""Tokens that count as the prompt: everything after them is decoded."""


@dataclass
class Settings:
    model: str | None = None
    """Directory or Hub name; by default SmolLM2-135M-Instruct, downloaded and converted into runs/smollm2."""
    output: Path = Path("runs/probes")
    """Directory of the results."""
    budgets: list[int] = field(default_factory=lambda: [128, 256])
    """Budgets; the window is a quarter of the smallest."""
    texts: int = 4
    """Texts for the loss."""
    tokens: int = 1536
    """Tokens of each text; the loss is that of the tokens after the first third."""
    codes: int = 12
    """Passcodes."""
    distance: int = 384
    """Tokens of prose between a passcode and the question."""


@dataclass(frozen=True)
class Setting:
    """A row of the tables."""

    label: str
    fields: dict[str, Any]


def settings_to_probe() -> list[Setting]:
    """Every registered policy with four sinks; some without; random with its prompt protected."""
    rows = [Setting(name, {"policy": name}) for name in POLICIES if name != "full"]
    rows += [
        Setting(f"{name}, no sinks", {"policy": name, "sinks": 0}) for name in ("vase_attnv", "random", "streaming")
    ]
    return [*rows, Setting("random + protect_prompt", {"policy": "random", "protect_prompt": True})]


def documents() -> list[str]:
    """The topics of Python's documentation, longest first."""
    return sorted(topics.values(), key=len, reverse=True)


def long_texts(tokenizer: Any, count: int, tokens: int) -> Tensor:
    """The first `tokens` tokens of the `count` longest documents, [count, tokens]."""
    encoded = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents())
    rows = [ids[:tokens] for ids, _ in zip(encoded, range(count), strict=False)]
    if len(rows) < count or min(map(len, rows)) < tokens:
        sys.exit(f"--tokens {tokens}: the {count} longest documents are not all that long; lower --tokens or --texts")
    return torch.tensor(rows)


def passcode_rows(tokenizer: Any, codes: int, distance: int) -> tuple[Tensor, int]:
    """Prose, a passcode stated once, prose, the question and the answer; (rows [codes, S], tokens of an answer)."""
    prose = tokenizer("\n\n".join(documents()[8:]), add_special_tokens=False, verbose=False)["input_ids"]
    if len(prose) < codes * (distance + 64):
        sys.exit(f"--codes {codes} at --distance {distance} needs more prose than there is: lower one of them")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(codes):
        code = "".join(map(str, rng.integers(0, 10, 6)))
        start = number * (distance + 64)
        before, between = prose[start : start + 64], prose[start + 64 : start + 64 + distance]
        said = tokenizer(f"\n\nThe secret passcode is {code}.\n\n", add_special_tokens=False)["input_ids"]
        asked = tokenizer("\n\nThe secret passcode is", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {code}", add_special_tokens=False)["input_ids"]
        rows.append([*before, *said, *between, *asked, *answer])
    answers = len(answer)
    if len({len(row) for row in rows}) > 1:
        sys.exit(
            "this tokenizer writes numbers of six digits with varying numbers of tokens: the probe needs equal ones"
        )
    return torch.tensor(rows), answers


@torch.no_grad()
def token_losses(model: Any, ids: Tensor, config: EvictionConfig) -> Tensor:
    """Cross-entropy of every token given those before it, as decoding would see them, [rows, S - 1]."""
    with simulated_eviction(model, config, [PROMPT] * len(ids)):
        logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def value_ranges(model: Any, ids: Tensor) -> list[dict[str, float]]:
    """Of each layer: how the value ranges `max_d v - min_d v` are distributed over positions, heads and texts."""
    caches: list[Any] = [DynamicCache(config=model.config) for _ in ids]
    for row, cache in zip(ids, caches, strict=True):
        model(input_ids=row[None], **cache_argument(cache))
    rows = []
    for layer in range(len(caches[0].layers)):
        values = torch.cat([cache.layers[layer].values for cache in caches])  # [texts, Hkv, S, D]
        ranges = (values.amax(-1) - values.amin(-1)).double()
        middle = ranges.median().item()
        rows.append(
            {
                "layer": layer,
                "median": middle,
                "p99_over_median": ranges.quantile(0.99).item() / middle,
                "max_over_median": ranges.max().item() / middle,
                "excess_kurtosis": float(stats.kurtosis(ranges.flatten().numpy())),
                "first_token_over_median": ranges[:, :, 0].mean().item() / middle,
            }
        )
    return rows


class Cells:
    """Measurements by name, kept in a file as they come."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.values = path, {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) != about:
            sys.exit(f"{path} was measured with other settings: choose another --output, or delete it")
        for line in lines[1:]:
            cell = json.loads(line)
            self.values[cell["name"]] = cell["value"]
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(about) + "\n")

    def measure(self, name: str, measurement: Any) -> Any:
        """The value of a cell; measured unless it is there."""
        if name not in self.values:
            self.values[name] = measurement()
            with self.path.open("a") as lines:
                lines.write(json.dumps({"name": name, "value": self.values[name]}) + "\n")
        return self.values[name]


def blocks_of(losses: Tensor, start: int) -> list[float]:
    """Mean losses of blocks of tokens after `start`, all texts."""
    return [block.mean().item() for row in losses[:, start:] for block in row.split(BLOCK)]


def passcode(model: Any, ids: Tensor, answers: int, config: EvictionConfig) -> list[float]:
    """Log-probability of each passcode."""
    return (-token_losses(model, ids, config)[:, -answers:].sum(-1)).tolist()


def measure(settings: Settings) -> dict[str, Any]:
    """All results; what is in the output directory is not measured again."""
    if settings.model is None:
        command = [sys.executable, "recipes/smollm2/convert.py", "runs/smollm2"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            sys.exit("the model could not be converted; give one with --model")
        settings.model = str(ROOT / "runs/smollm2/model")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32, attn_implementation="vkvtrain")
    model.eval()
    texts = long_texts(tokenizer, settings.texts, settings.tokens)
    codes, answers = passcode_rows(tokenizer, settings.codes, settings.distance)
    about = {
        "model": Path(settings.model).parent.name if Path(settings.model).exists() else settings.model,
        "texts": list(texts.shape), "passcodes": list(codes.shape), "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }  # fmt: skip
    cells = Cells(settings.output / "cells.jsonl", about)
    window, start = min(settings.budgets) // 4, settings.tokens // 3
    results: dict[str, Any] = {**about, "window": window, "machine": platform.machine(), "rows": []}
    results["value_ranges"] = cells.measure("value ranges", lambda: value_ranges(model, texts))
    wanted: list[tuple[str, int | None, EvictionConfig]] = [("full", None, EvictionConfig(policy="full"))]
    for setting in settings_to_probe():
        for budget in settings.budgets:
            wanted.append((setting.label, budget, EvictionConfig(**setting.fields, budget=budget, window=window)))
    full: dict[str, Any] = {}
    for label, budget, config in tqdm(wanted, desc="policy x budget"):
        name = f"{label} @ {budget}"
        loss = cells.measure(
            f"loss, {name}", lambda config=config: blocks_of(token_losses(model, texts, config), start)
        )
        code = cells.measure(f"passcode, {name}", lambda config=config: passcode(model, codes, answers, config))
        full = full or {"loss": loss, "code": code}
        events = [0, 0] if budget is None else [
            evictions_by(PROMPT, ids.shape[1], budget, window) for ids in (texts, codes)
        ]  # fmt: skip
        results["rows"].append(
            {
                "setting": label, "budget": budget, "loss": interval(loss),
                "above_full": paired_interval(loss, full["loss"]), "passcode_log_probability": interval(code),
                "passcode_kept": float(np.mean([c > f - 1 for c, f in zip(code, full["code"], strict=True)])),
                "evictions": events[0], "passcode_evictions": events[1],
            }
        )  # fmt: skip
    pairs = {
        "evict_large - random": ("evict_large", "random"),
        **{
            f"{name}: without sinks - with": (f"{name}, no sinks", name)
            for name in ("vase_attnv", "random", "streaming")
        },
    }
    results["pairs"] = [
        {
            "pair": label, "budget": budget,
            "difference": paired_interval(*(cells.values[f"loss, {side} @ {budget}"] for side in sides)),
        }
        for label, sides in pairs.items() for budget in settings.budgets
    ]  # fmt: skip
    return results


def report(results: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown, line by line."""
    texts, length = results["texts"]
    yield (
        f"{results['model']}, torch {results['torch']}, transformers {results['transformers']}; window "
        f"{results['window']}. Loss: {texts} texts of {length} tokens, mean over the tokens after the first "
        f"{length // 3}; intervals are 95% bootstrap intervals over blocks of {BLOCK} tokens. Passcode: "
        f"{results['passcodes'][0]} codes; kept: log-probability at most 1 below that with the full cache."
    )
    yield ""
    full = results["rows"][0]
    code = full["passcode_log_probability"]["value"]
    yield f"Full cache: loss {full['loss']['value']:.3f}, passcode log-probability {code:.2f}."
    yield ""
    yield "| policy | budget | evictions | loss above full [95%] | passcode log-probability | passcode kept |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ordered = sorted(results["rows"][1:], key=lambda row: (row["budget"], row["above_full"]["value"]))
    for row in ordered:
        above = row["above_full"]
        yield (
            f"| {row['setting']} | {row['budget']} | {row['evictions']} | {above['value']:+.3f} [{above['low']:+.3f}, "
            f"{above['high']:+.3f}] | {row['passcode_log_probability']['value']:.2f} | {row['passcode_kept']:.0%} |"
        )
    yield ""
    for pair in results["pairs"]:
        d = pair["difference"]
        yield f"- {pair['pair']}, budget {pair['budget']}: {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
    yield ""
    yield "| layer | median range | 99% / median | largest / median | excess kurtosis | first token / median |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in results["value_ranges"]:
        yield (
            f"| {row['layer']} | {row['median']:.3f} | {row['p99_over_median']:.2f} | {row['max_over_median']:.2f} | "
            f"{row['excess_kurtosis']:.1f} | {row['first_token_over_median']:.2f} |"
        )


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss above the full cache by setting and budget."""
    rows = results["rows"][1:]
    budgets = sorted({row["budget"] for row in rows})
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    order = sorted(
        {row["setting"] for row in rows},
        key=lambda label: (
            -next(r for r in rows if (r["setting"], r["budget"]) == (label, budgets[0]))["above_full"]["value"]
        ),
    )
    for shift, budget in enumerate(budgets):
        cells = [
            next(r for r in rows if (r["setting"], r["budget"]) == (label, budget))["above_full"] for label in order
        ]
        values = np.array([cell["value"] for cell in cells])
        ends = np.array([[cell["value"] - cell["low"], cell["high"] - cell["value"]] for cell in cells]).T
        place = np.arange(len(order)) + (shift - (len(budgets) - 1) / 2) * 0.25
        axes.errorbar(values, place, xerr=np.abs(ends), fmt="o", label=f"budget {budget}")
    axes.set_yticks(range(len(order)), order)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("next-token loss above the full cache (symmetric logarithm)")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    results = measure(settings)
    text = "\n".join(report(results))
    (settings.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (settings.output / "report.md").write_text(text + "\n")
    draw(results, settings.output / "loss.png")
    print(text)
    print(f"\nwritten: {settings.output}/results.json, report.md, loss.png")


if __name__ == "__main__":
    main()
