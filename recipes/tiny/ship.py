"""Put the adapters that `make demo` trained into the package, with what was measured of them.

    python recipes/tiny/ship.py            # from runs/demo to vkvtrain/tiny/adapters

`vkvtrain quickstart` answers with them. Shipped are the adapter, the eviction setting that it was trained for, its
tokenizer, recipe and metrics, and its rows of the demo's results.json, with the numbers of the very weights.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml

from vkvtrain.identity import adapter_hash
from vkvtrain.tiny import ADAPTERS, ADAPTERS_PATH
from vkvtrain.training.run_directory import FINISHED, RECIPE

FILES = (
    *(FINISHED, "eviction_config.json", "generation_config.json", "metrics.jsonl"),
    *("tokenizer.json", "tokenizer_config.json"),
)
LIMIT = 5 * 10**6
"""Bytes of both adapters together."""


@dataclass
class Settings:
    source: Path = Path(__file__).parents[2] / "runs/demo"
    """Output directory of the demo."""
    target: Path = ADAPTERS_PATH
    """Directory to write; what it holds of the adapters is replaced."""


def ship(source: Path, target: Path, adapter: str) -> int:
    """Copy a finished adapter without paths of the machine that trained it; returns the bytes.

    Raises:
        ValueError: a run that is not finished, or results of other weights.
    """
    run, shipped = source / adapter, target / adapter
    if not (run / FINISHED).exists():
        raise ValueError(f"{run} holds no finished run: make demo trains it")
    results = json.loads((source / "results.json").read_text())
    rows = [row for row in results if row["model"] == adapter]
    if not rows or {row["adapter"] for row in rows} != {adapter_hash(run)}:
        raise ValueError(f"{source}/results.json was measured with another {adapter}: make demo measures it")
    shutil.rmtree(shipped, ignore_errors=True)
    shipped.mkdir(parents=True)
    for name in FILES:
        shutil.copy(run / name, shipped / name)
    config = json.loads((run / "adapter_config.json").read_text()) | {"base_model_name_or_path": "tiny"}
    recipe = yaml.safe_load((run / RECIPE).read_text()) | {"output": f"runs/demo/{adapter}"}
    (shipped / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (shipped / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    rows = [{**row, "adapter": adapter_hash(shipped)} for row in rows]  # the same weights under another base's name
    (shipped / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    return sum(path.stat().st_size for path in shipped.iterdir())


def main(settings: Settings) -> int:
    try:
        size = sum(ship(settings.source, settings.target, adapter) for adapter in ADAPTERS)
    except (ValueError, OSError) as error:
        print(f"ship: {error}", file=sys.stderr)
        return 2
    print(f"{settings.target}: {size / 1e6:.2f} MB")
    if size > LIMIT:
        print(f"ship: more than {LIMIT / 1e6:.0f} MB are not to be committed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
