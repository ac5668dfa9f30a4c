"""The embedded tiny reasoning model and its task: small enough for a CPU, real enough to break under eviction."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""Directory of the embedded Qwen3-shaped model, its tokenizer and its card."""
ADAPTERS_PATH = Path(__file__).parent / "adapters"
"""Directory of the adapters that `make demo` trained for it (recipes/tiny/ship.py puts them there)."""
ADAPTERS = ("dense_lora", "eviction_lora")


def embedded(name: str) -> str:
    """The directory of the embedded model (`tiny`) or of a shipped adapter of it (`tiny/eviction_lora`); other names
    stay as they are."""
    if name == "tiny":
        return str(MODEL_PATH)
    adapter = name.removeprefix("tiny/")
    return str(ADAPTERS_PATH / adapter) if adapter != name and adapter in ADAPTERS else name
