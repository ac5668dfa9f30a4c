"""A whole training step under eviction against a dense one: LoRA, gradient checkpointing, loss in chunks, optimiser.

    python benchmarks/training_step.py                                  # CPU: a small model, about a minute
    python benchmarks/training_step.py --device cuda --model qwen3-1.7b  # S=16k, budget 2048, bfloat16

A Qwen3-shaped model with random weights; both sides take steps in turn in one process, from the same batch. Ratios are
dense / evicted, above 1 is faster; peak memory is that of one step beyond weights, adapter and batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measure import in_turn, machine, peak_bytes, write
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from vkvtrain import EvictionConfig
from vkvtrain.training.data import Batch
from vkvtrain.training.objectives import ModelWithLoss
from vkvtrain.training.passes import simulation
from vkvtrain.training.settings import TrainingSettings
from vkvtrain.versions import enable_checkpointing

MODELS: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 8192,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    model: Literal["small", "qwen3-1.7b"] = "small"
    """Shape of the model; its weights are random."""
    tokens: int | None = None
    """Tokens of the sequence; default 4096, on CUDA 16384."""
    budget: int | None = None
    """Entries that a KV head keeps; default 512, on CUDA 2048."""
    window: int = 64
    """Newest entries, and tokens between two events."""
    prompt: int = 128
    """Tokens of the prompt; the others are trained on."""
    batch: int = 1
    """Rows."""
    policy: str = "vase_attnv"
    """Eviction policy."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the base weights; default float32, on CUDA bfloat16."""
    rounds: int = 3
    """Timed steps of each side, after one to warm up."""
    output: Path = Path("runs/training_step.json")
    """Results as JSON."""

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and budget."""
        on_cuda = self.device == "cuda"
        return self.tokens or (16384 if on_cuda else 4096), self.budget or (2048 if on_cuda else 512)


def steps(settings: Settings, tokens: int) -> dict[str, Callable[[], None]]:
    """A training step of each side on one model, which shares its adapter."""
    torch.manual_seed(0)
    device = torch.device(settings.device)
    dtype = getattr(torch, settings.dtype or ("bfloat16" if settings.device == "cuda" else "float32"))
    shape = MODELS[settings.model]
    arguments: dict[str, Any] = {**shape, "max_position_embeddings": tokens, "attn_implementation": "vkvtrain"}
    config = Qwen3Config(**arguments)
    with device:
        base = Qwen3ForCausalLM(config).to(dtype)
    enable_checkpointing(base, use_reentrant=False)
    base.enable_input_require_grads()
    adapted: Any = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = ModelWithLoss(adapted, TrainingSettings(steps=1)).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    ids = torch.randint(5, shape["vocab_size"], (settings.batch, tokens), device=device)
    trained = torch.arange(settings.prompt - 1, tokens - 1, device=device)
    batch = Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        predicting=(torch.arange(settings.batch, device=device)[:, None] * tokens + trained).flatten(),
        targets=ids[:, settings.prompt :].flatten(),
        prompt_lengths=[settings.prompt] * settings.batch,
        streams=[(row, 0, 0) for row in range(settings.batch)],
    )
    eviction = EvictionConfig(policy=settings.policy, budget=settings.shape[1], window=settings.window)

    def step(config: EvictionConfig | None) -> None:
        with simulation(model, config, batch) as trace:
            loss = model(batch, trace)["loss"] / len(batch.targets)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"dense": lambda: step(None), "evicted": lambda: step(eviction)}


_prepared: dict[str, Callable[[], None]] = {}


def one_step(settings: Settings, side: str, warm_up: bool = False) -> None:
    """One step of a side: what the peak memory is measured of. The model is made, and used once, by the warm-up."""
    if warm_up:
        _prepared.clear()
        _prepared.update(steps(settings, settings.shape[0]))
        short = steps(settings, settings.prompt + settings.window)
        short[side]()
    else:
        _prepared[side]()


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    device = torch.device(settings.device)
    tokens, budget = settings.shape
    results: dict[str, Any] = {
        "machine": machine(device),
        "settings": {**vars(settings), "output": str(settings.output)},
    }
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    print(f"{settings.model}, S={tokens}, B={budget}, window {settings.window}, {settings.policy}; seconds a step\n")
    times = in_turn(steps(settings, tokens), settings.rounds, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    peaks = {side: peak_bytes(one_step, settings, side, device=device) for side in ("dense", "evicted")}
    results |= {
        "times": times,
        "ratio": times["dense"]["seconds"] / times["evicted"]["seconds"],
        "cpu_ratio": times["dense"]["cpu_seconds"] / times["evicted"]["cpu_seconds"],
        "peak_bytes": peaks,
        "peak_ratio": peaks["evicted"] / peaks["dense"],
    }
    print("| dense | evicted | ratio | ratio of CPU time | peak dense | peak evicted, of dense |")
    print("| --- | --- | --- | --- | --- | --- |")
    cells = [
        f"{times['dense']['seconds']:.3f}", f"{times['evicted']['seconds']:.3f}", f"{results['ratio']:.2f}",
        f"{results['cpu_ratio']:.2f}", f"{peaks['dense'] / 2**20:.0f} MiB", f"{results['peak_ratio']:.2f}",
    ]  # fmt: skip
    print(f"| {' | '.join(cells)} |")
    write(results, settings.output)


if __name__ == "__main__":
    main()
