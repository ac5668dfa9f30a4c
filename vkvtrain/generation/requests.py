"""What is asked of the slot engine, and what it answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vkvtrain.ends import Thoughts
from vkvtrain.noise import Stream, canonical_stream


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.

    Raises:
        ValueError: a parameter out of its range, by name.
    """

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Likeliest tokens whose probabilities add up to this; 1 is all of them."""
    top_k: int = 0
    """This many likeliest tokens; 0 is all of them."""
    min_p: float = 0.0
    """Tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that prompt or response hold; 1 is none."""
    seed: int = 0
    """Seed of the tokens drawn; beside it the request's stream and the position decide."""

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0 (0 is greedy), and finite"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 is off), and finite"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it."""

    prompt: tuple[int, ...]
    """Tokens."""
    max_new_tokens: int
    """Most tokens of the response, its end token included."""
    stream: Stream
    """Names the sequence's randomness, of eviction and of sampling."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts that end the response as soon as its answer contains one."""
    thoughts: Thoughts | None = None
    """Where the answer begins, before which stop strings mean nothing; None: the whole response is answer."""


@dataclass(frozen=True)
class Completion:
    """The answer to a request."""

    tokens: list[int]
    """The response, its end token included."""
    finished: bool
    """Whether it ended by itself, with an end token or a stop string, and not by the limit."""
    log_probs: list[float]
    """Log-probability of each token under the model at temperature 1, in float32 (float64 for a float64 model)."""
    evictions: int
    """Eviction events of the sequence; its last token is never given to the cache."""
    peak_entries: int
    """Most entries that a KV head of an evicting layer held."""


def positions(model_config: Any) -> int:
    """Most tokens of a sequence: `max_position_embeddings`, or what RoPE scaling makes of it."""
    text = model_config.get_text_config(decoder=True)
    own: int = text.max_position_embeddings
    rope = getattr(text, "rope_parameters", None) or {}
    scaled = [part for part in (rope, *rope.values()) if isinstance(part, dict) and part.get("factor")]
    return max([own, *(int(part["factor"] * (part.get("original_max_position_embeddings") or own)) for part in scaled)])


def check_requests(requests: Sequence[Request], model_config: Any, tokenizer: Any) -> None:
    """Raise ValueError for the first request that cannot be answered, by its place in the list."""
    limit = positions(model_config)
    entries = model_config.get_text_config(decoder=True).vocab_size
    for place, request in enumerate(requests):
        if not request.prompt:
            raise ValueError(f"request {place}: the prompt is empty, give it at least one token")
        if max(request.prompt) >= entries:
            raise ValueError(
                f"request {place}: the prompt holds token {max(request.prompt)}, but the model's embedding has "
                f"{entries} entries: use the model's own tokenizer, or resize the embedding first"
            )
        if request.max_new_tokens < 1:
            raise ValueError(f"request {place}: max_new_tokens must be at least 1, got {request.max_new_tokens}")
        if len(request.prompt) + request.max_new_tokens > limit:
            raise ValueError(
                f"request {place}: a prompt of {len(request.prompt)} tokens and max_new_tokens "
                f"({request.max_new_tokens}) exceed the model's {limit} positions: shorten the prompt or lower "
                "max_new_tokens"
            )
        if "" in request.stop:
            raise ValueError(f"request {place}: a stop string is empty, remove it")
        if request.stop and tokenizer is None:
            raise ValueError(f"request {place}: stop strings need the tokenizer, pass tokenizer=...")
        canonical_stream(request.stream)
