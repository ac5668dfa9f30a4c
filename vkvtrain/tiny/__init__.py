"""The embedded tiny reasoning model and its task: small enough for a CPU, real enough to break under eviction."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""Directory of the embedded Qwen3-shaped model, its tokenizer and its card."""
