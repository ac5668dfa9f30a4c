"""How far `vkvtrain plan` is from measured peaks of memory.

    python benchmarks/plan_error.py                 # random Qwen3-shaped models on the CPU, about two minutes
    python benchmarks/plan_error.py --device cuda   # a Qwen3-1.7B shape in bfloat16 on a GPU

Each case trains two steps through the recipe's own loop in a process of its own: a random model of the shape is
written, loaded and adapted, and a JSONL of rows of the length is read. On the CPU the peak is that of resident
memory above what the process held before the model was loaded, sampled every 5 ms; on a GPU it is torch's peak
of allocated memory. Prints plan, peak and error, and writes JSON.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import tyro
from rich.console import Console
from rich.table import Table

from vkvtrain.planning.architecture import architecture_of
from vkvtrain.planning.devices import Device
from vkvtrain.planning.training import Item, Workload, memory
from vkvtrain.planning.training import peak as peak_of

NO_OVERHEAD = Device("measured", 1.0, 1.0, 1.0, "", overhead=0.0)
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A shape and a step."""

    hidden: int = 512
    intermediate: int = 1536
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 8192
    seq: int = 1024
    budget: int | None = 256
    window: int = 64
    rows: int = 1
    dtype: str = "float32"
    checkpointing: bool = True

    @property
    def config(self) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=self.seq, tie_word_embeddings=False, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip


CPU = [
    Case(),
    Case(checkpointing=False),
    Case(vocab=512, seq=2048, budget=512),
    Case(vocab=512, seq=2048, budget=None),
    Case(vocab=512, rows=4, seq=512, budget=128),
    Case(vocab=512, dtype="bfloat16"),
    Case(vocab=32768, hidden=1024, intermediate=3072, layers=4),
]
GPU_SHAPE: dict[str, Any] = {
    "hidden": 2048, "intermediate": 6144, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "vocab": 151936,
    "dtype": "bfloat16",
}  # fmt: skip
CUDA = [
    Case(**GPU_SHAPE, seq=16384, budget=2048),
    Case(**GPU_SHAPE, seq=16384, budget=None),
    Case(**GPU_SHAPE, seq=4096, budget=1024, checkpointing=False),
]


@dataclass
class Settings:
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to measure."""
    cases: list[int] = field(default_factory=list)
    """Numbers of the cases to run, from 0; all by default."""
    output: Path = Path("runs/benchmarks/plan_error.json")
    """JSON file to write."""
    run: str | None = None
    """Used by the script itself: measure one case, given as JSON, in this process."""


def resident() -> int:
    """Bytes of this process's resident memory; weights are mapped from their file, so file-backed pages count."""
    return psutil.Process().memory_info().rss


class Peak:
    """The largest growth of resident memory while it runs."""

    def __enter__(self) -> "Peak":
        self.before = self.largest = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.largest = max(self.largest, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.largest - self.before


def measure(case: Case, device: str) -> int:
    """Peak bytes of two training steps in this process."""
    from transformers import AutoModelForCausalLM

    from vkvtrain.tiny import MODEL_PATH
    from vkvtrain.training.loop import train
    from vkvtrain.training.settings import Recipe

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(case.config, dtype=getattr(torch, case.dtype))
        model.save_pretrained(directory / "model")
        del model
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / "model" / file).write_bytes((MODEL_PATH / file).read_bytes())
        row = {"prompt": "a" * 63, "completion": "1" * (case.seq - 65)}  # with their first and last tokens
        (directory / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
        eviction = None
        if case.budget is not None:
            eviction = {"policy": "vase_attnv", "budget": case.budget, "window": case.window}
        values: dict[str, Any] = {
            "model": {
                "name": str(directory / "model"), "dtype": case.dtype, "gradient_checkpointing": case.checkpointing
            },
            "data": {"source": str(directory / "rows.jsonl"), "held_out": 0},
            "eviction": eviction,
            "training": {"steps": 2, "global_batch": case.rows, "batch_per_device": case.rows},
            "optim": {"warmup_steps": 0},
            "output": str(directory / "run"),
        }  # fmt: skip
        recipe = Recipe(**values)
        if device == "cuda":
            train(recipe)
            return torch.cuda.max_memory_allocated()
        with Peak() as peak:
            train(recipe)
        return peak.growth


def planned(case: Case) -> list[Item]:
    """The plan, item by item."""
    w = Workload(
        case.seq, case.budget, case.window, rows=case.rows, global_batch=case.rows, weights=case.dtype,
        compute=case.dtype, checkpointing=case.checkpointing,
    )  # fmt: skip
    return memory(architecture_of(case.config, "random"), w, NO_OVERHEAD)


def main(settings: Settings) -> None:
    if settings.run is not None:
        print(json.dumps({"peak": measure(Case(**json.loads(settings.run)), settings.device)}))
        return
    known = CPU if settings.device == "cpu" else CUDA
    found, console = [], Console(width=150)
    table = Table("case", "plan, MiB", "peak, MiB", "error")
    for number, case in enumerate(known):
        if settings.cases and number not in settings.cases:
            continue
        began = time.monotonic()
        command = [sys.executable, __file__, "--device", settings.device, "--run", json.dumps(asdict(case))]
        # glibc keeps what is freed; trimming at once makes resident memory what is in use
        environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, env=environment, check=True)
        peak = json.loads(done.stdout.splitlines()[-1])["peak"]
        plan = planned(case)
        total = peak_of(plan)
        error = total / peak - 1
        found.append({"case": asdict(case), "plan": [asdict(item) for item in plan], "peak": peak, "error": error})
        name = (
            f"{number}: {case.layers} layers of {case.hidden}, {case.rows} x {case.seq} tokens, budget {case.budget}, "
            f"{case.dtype}, {'checkpointing' if case.checkpointing else 'no checkpointing'}"
        )
        table.add_row(name, f"{total / MIB:,.0f}", f"{peak / MIB:,.0f}", f"{error:+.1%}")
        print(f"{name}: {error:+.1%} ({time.monotonic() - began:.0f} s)", flush=True)
    console.print(table)
    machine = torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor() or platform.machine()
    console.print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(
        json.dumps({"machine": machine, "torch": torch.__version__, "cases": found}, indent=1) + "\n"
    )
    console.print(f"written: {settings.output}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
