"""`vkvtrain chat`: talk to a model whose cache is evicted, over several turns of one sequence."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from transformers import TextStreamer

from vkvtrain.cache import EvictionCache
from vkvtrain.config import EvictionConfig
from vkvtrain.ends import encode, end_tokens
from vkvtrain.loading import Loaded, load
from vkvtrain.versions import cache_argument

_MARK = "\u241e"
"""Stands for an answer when a chat template is asked for what comes after it."""


@dataclass
class ChatArguments:
    """Talk to a published model or a finished run; its cache is evicted and goes on from turn to turn.

    Every line is a message; after each answer it is said what was evicted. `/new` starts afresh, `/exit` or the end of
    the input stops. A model without a chat template continues the text of the line.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory or Hub repository that `vkvtrain publish` or a recipe wrote."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    budget: int | None = None
    """Entries kept after an event, instead of the number it was trained for; 0 is the full cache."""
    max_new_tokens: int = 1024
    """Most tokens of one answer."""
    temperature: float = 0.6
    """Sampling temperature; 0 is greedy."""
    top_p: float = 0.95
    """Share of the probability that is sampled from."""
    seed: int = 0
    """Seed of sampling."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights."""


class Conversation:
    """One sequence that grows by messages and answers, and its cache."""

    def __init__(self, loaded: Loaded, eviction: EvictionConfig) -> None:
        self.model, self.tokenizer, self.eviction = loaded.model, loaded.tokenizer, eviction
        self.tokens: list[int] = []
        self.cache = EvictionCache(eviction, self.model.config)

    def message_tokens(self, text: str) -> list[int]:
        """The tokens that a message adds to the sequence, up to where the answer begins."""
        if self.tokenizer.chat_template is None:
            if not self.tokens:
                return encode(self.tokenizer, [text])[0]
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        added = self._rendered(text)
        return added[self._shared(added) :]

    def _rendered(self, text: str) -> list[int]:
        """What the template writes of a message, and before it behind the last answer to close that."""
        turns = [{"role": "user", "content": text}]
        if self.tokens:
            turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _MARK}, *turns]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        after = rendered.partition(_MARK)[2] if self.tokens else rendered
        return self.tokenizer(after, add_special_tokens=False)["input_ids"]

    def _shared(self, added: list[int]) -> int:
        """Tokens with which the sequence ends and `added` begins: an answer that ended by itself has closed itself."""
        longest = min(len(added), len(self.tokens))
        return next((count for count in range(longest, 0, -1) if self.tokens[-count:] == added[:count]), 0)

    def _leave_the_closing_to_the_template(self, text: str) -> None:
        """Drop an end token that is not the template's (an end of sequence in ChatML, gpt-oss' `<|return|>`).

        It is the last token, which no cache has seen yet.
        """
        if not self.tokens or self.tokenizer.chat_template is None or self._shared(self._rendered(text)):
            return
        if self.tokens[-1] in end_tokens(self.tokenizer, self.model.generation_config):
            self.tokens.pop()

    def answer(self, text: str, streamer: Any, **settings: Any) -> int:
        """Generate the answer to a message; returns the number of its tokens."""
        self._leave_the_closing_to_the_template(text)
        self.tokens += self.message_tokens(text)
        given = len(self.tokens)
        out = self.model.generate(
            input_ids=torch.tensor([self.tokens], device=self.model.device),
            attention_mask=torch.ones(1, given, dtype=torch.int64, device=self.model.device),
            use_cache=True,
            streamer=streamer,
            **cache_argument(self.cache),
            **settings,
        )
        self.tokens = out[0].tolist()
        return len(self.tokens) - given

    def state(self, new: int) -> str:
        """What was generated, and what the cache holds of the sequence, in one line."""
        stats = self.cache.stats()[0]
        return (
            f"[{new} tokens; {stats['evictions']} evictions so far; {stats['live_entries']} of {len(self.tokens) - 1} "
            f"entries held, {stats['bytes'] / 2**20:.1f} MiB]"
        )


def messages() -> Iterator[str]:
    """Lines of the input; a prompt is shown to people, not to pipes."""
    people = sys.stdin.isatty()
    while True:
        if people:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.rstrip("\n")


def run(arguments: ChatArguments) -> None:
    """Load, then answer line after line.

    Raises:
        ValueError: what cannot be loaded, or settings that do not hold.
    """
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 (greedy) or more, got {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {arguments.top_p}")
    loaded = load(arguments.model, revision=arguments.revision, dtype=arguments.dtype)
    eviction = loaded.eviction
    if arguments.budget == 0:
        eviction = EvictionConfig(policy="full")
    elif arguments.budget is not None:
        eviction = EvictionConfig(**{**eviction.model_dump(), "budget": arguments.budget})
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        settings |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
    torch.manual_seed(arguments.seed)
    print(f"{arguments.model}: {described(eviction)}. /new starts afresh, /exit stops.", flush=True)
    talk(loaded, eviction, settings)


def described(eviction: EvictionConfig) -> str:
    """An eviction setting in a few words."""
    if not eviction.evicts:
        return "full cache"
    return f"{eviction.policy}, budget {eviction.budget}, window {eviction.window}"


def talk(loaded: Loaded, eviction: EvictionConfig, settings: dict[str, Any]) -> None:
    """Answer the input, line after line."""
    conversation = Conversation(loaded, eviction)
    for message in messages():
        if message.strip() == "/new":
            conversation = Conversation(loaded, eviction)
            continue
        streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            print(conversation.state(conversation.answer(message, streamer, **settings)), flush=True)
        except KeyboardInterrupt:
            print("\n[interrupted: the next message starts afresh]", flush=True)
            conversation = Conversation(loaded, eviction)


def main(rest: list[str]) -> None:
    """The command line of `vkvtrain chat`."""
    run(tyro.cli(ChatArguments, args=rest, prog="vkvtrain chat"))
