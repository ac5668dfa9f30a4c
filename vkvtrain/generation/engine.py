"""The slot engine's loop: fixed slots, each refilled with the next prompt as its sequence ends.

A decode step is one forward of all slots, one token each. A prompt is read alone, in a forward of its own between two
steps, and its cache row moves into the free slot; so nothing of a sequence depends on which others it shares a step
with.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vkvtrain.cache import EvictionCache, grows
from vkvtrain.config import EvictionConfig
from vkvtrain.generation.decoders import Compiled, Eager
from vkvtrain.generation.journal import Journal, context_of
from vkvtrain.generation.requests import Completion, Request, check_requests
from vkvtrain.generation.sampling import Sampler
from vkvtrain.generation.stops import Stops
from vkvtrain.modules import virtual_tokens
from vkvtrain.support import layer_kinds
from vkvtrain.versions import cache_argument


def generate(
    model: Any,
    config: EvictionConfig,
    requests: Sequence[Request],
    *,
    slots: int,
    end_tokens: Collection[int],
    tokenizer: Any = None,
    progress: str | None = None,
    journal: Path | None = None,
    compile: bool = False,
) -> list[Completion]:
    """Answer requests with the evicting cache; the answers, in the requests' order.

    An answer depends on its own request and on the eviction setting alone: not on `slots`, not on the other requests or
    their order (up to rounding, which differs between forwards of different numbers of rows).

    Args:
        model: a causal language model with `attn_implementation="vkvtrain"`, in evaluation mode; with adapters or not.
        config: the eviction setting; `full` keeps everything.
        requests: prompts with their limits, streams and sampling.
        slots: sequences that are decoded at once.
        end_tokens: tokens that end a response.
        tokenizer: decodes responses for requests with stop strings.
        progress: what a progress bar is labelled; None shows none.
        journal: a JSON Lines file of finished completions; a rerun takes from it what it holds and goes on.
        compile: decode steps by `torch.compile`, on a GPU as a CUDA graph: all slots at every step, those without a
            request too, and storage for the longest prompt from the start.

    Raises:
        ValueError: a request that cannot be answered, a model that cannot evict or is in training mode, `slots` below
            1, a file that is no journal, or `compile` with a layer that keeps everything.
    """
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    if model.training:
        raise ValueError("the model is in training mode, where dropout is random: call model.eval() first")
    if virtual_tokens(model):
        raise ValueError(
            "the model has a prompt-tuning adapter, whose virtual tokens PEFT would put before every decoded token "
            "here: decode with model.generate(...) and an EvictionCache"
        )
    check_requests(requests, model.config, tokenizer)
    if compile and grows(layer_kinds(model.config, config)):
        raise ValueError(
            "compile needs storage of fixed size, but a layer keeps everything (policy 'full', or skip_layers): leave "
            "compile out"
        )
    engine = _Engine(model, config, slots, frozenset(end_tokens), tokenizer, compile)
    book = None
    if journal is not None:
        stops = any(request.stop for request in requests)
        book = Journal(journal, context_of(model, config, end_tokens, tokenizer if stops else None), requests)
    with book or nullcontext():
        found = {} if book is None else {place: book.find(request) for place, request in enumerate(requests)}
        results = {place: completion for place, completion in found.items() if completion is not None}
        rest = {place: request for place, request in enumerate(requests) if place not in results}
        bar = tqdm(total=len(requests), initial=len(results), desc=progress, disable=progress is None, mininterval=2)
        with bar:
            for place, completion in engine.run(rest):
                if book is not None:
                    book.add(requests[place], completion)
                results[place] = completion
                bar.update()
    return [results[place] for place in range(len(requests))]


@dataclass
class _Sequence:
    """A sequence in a slot."""

    place: int | None
    """Number of its request; None in a slot that has nothing to do."""
    request: Request
    stops: Stops
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class _Engine:
    def __init__(
        self, model: Any, config: EvictionConfig, slots: int, ends: frozenset[int], tokenizer: Any, compile: bool
    ) -> None:
        self.model, self.config, self.slots, self.ends, self.tokenizer = model, config, slots, ends, tokenizer
        self.compile = compile
        EvictionCache(config, model.config)  # refuses a model that cannot evict

    @torch.no_grad()
    def run(self, requests: dict[int, Request]) -> Iterator[tuple[int, Completion]]:
        """Completions as they finish, each with its request's number."""
        waiting = iter(requests.items())
        rows: list[_Sequence | None] = [None] * min(self.slots, len(requests))
        longest = max((len(request.prompt) for request in requests.values()), default=0)
        decoder = batch = None
        while True:
            changed = False
            for slot, occupant in enumerate(rows):
                while occupant is None and (row := self._following(waiting)) is not None:
                    own = EvictionCache(self.config, self.model.config, [row.request.stream])
                    self._prefill(row, own)
                    if row.place is not None and self._ended(row) is not None:
                        yield row.place, self._complete(row, own, 0)
                        continue
                    if decoder is None:
                        decoder = self._decoder(EvictionCache.join([own] * len(rows), self.model.config), longest)
                    decoder.replace_row(slot, own)
                    rows[slot] = occupant = row
                    changed = True
            active = [row for row in rows if row is not None]
            if all(row.place is None for row in active):
                return
            assert decoder is not None
            if len(active) < len(rows):  # nobody is waiting
                decoder.cache.keep_rows([slot for slot, row in enumerate(rows) if row is not None])
                rows = list(active)
                changed = True
            if batch is None or changed:
                batch = _Sequences(active, self.model.device)
            batch.choose(decoder.forward(batch.last[:, None], batch.length[:, None] - 1))
            for slot, row in enumerate(active):
                if row.place is not None and self._ended(row) is not None:
                    yield row.place, self._complete(row, decoder.cache, slot)
                    rows[slot] = None

    def _following(self, waiting: Iterator[tuple[int, Request]]) -> _Sequence | None:
        """What a free slot takes up: the next request, and then nothing, or what keeps a compiled batch's shape."""
        for place, request in waiting:
            return _Sequence(place, request, Stops(request, self.tokenizer))
        idle = Request((0,), 1, 0)
        return _Sequence(None, idle, Stops(idle, None)) if self.compile else None

    def _decoder(self, cache: EvictionCache, longest: int) -> "Eager | Compiled":
        if not self.compile:
            return Eager(self.model, cache)
        assert self.config.budget is not None
        return Compiled(self.model, cache, max(self.config.budget, longest) + self.config.window)

    def _prefill(self, row: _Sequence, cache: EvictionCache) -> None:
        """Give the prompt to an empty cache and choose the first token."""
        ids = torch.tensor([row.request.prompt], device=self.model.device)
        logits = self.model(input_ids=ids, **cache_argument(cache), logits_to_keep=1).logits
        _Sequences([row], self.model.device).choose(logits)

    def _ended(self, row: _Sequence) -> bool | None:
        """Whether a row ended by itself (True) or by its limit (False); None while it goes on."""
        if row.tokens[-1] in self.ends or row.stops.reached(row.tokens):
            return True
        return False if len(row.tokens) >= row.request.max_new_tokens else None

    def _complete(self, row: _Sequence, cache: EvictionCache, slot: int) -> Completion:
        stats = cache.stats()[slot]
        return Completion(row.tokens, bool(self._ended(row)), row.log_probs, stats["evictions"], stats["peak_entries"])


class _Sequences:
    """The rows of a step, and what of them lies on the device."""

    def __init__(self, rows: Sequence[_Sequence], device: torch.device) -> None:
        self.rows = rows
        self.sampler = Sampler([row.request for row in rows], device)
        lengths = [len(row.request.prompt) + len(row.tokens) for row in rows]
        self.length = torch.tensor(lengths, device=device)
        """Tokens of each sequence, those not yet given to the cache included."""
        self.last = torch.tensor([row.tokens[-1] if row.tokens else 0 for row in rows], device=device)
        self.seen: Tensor | None = None

    def choose(self, logits: Tensor) -> None:
        """Append the next token of each row and its log-probability; logits [N, 1, V]."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        scores = logits[:, -1].to(self.last.device, dtype)
        if self.sampler.penalised and self.seen is None:
            self.seen = torch.zeros_like(scores, dtype=torch.bool)
            for row, held in zip(self.rows, self.seen, strict=True):
                held[torch.tensor([*row.request.prompt, *row.tokens], device=held.device)] = True
        self.last = self.sampler.choose(scores, self.length, self.seen)
        chosen = scores.gather(-1, self.last[:, None])[:, 0] - scores.logsumexp(-1)
        if self.seen is not None:
            self.seen.scatter_(1, self.last[:, None], True)
        self.length = self.length + 1
        # one transfer a step; float64 holds all of them exactly
        tokens, log_probs = torch.stack([self.last.double(), chosen.double()]).tolist()
        for row, token, log_prob in zip(self.rows, tokens, log_probs, strict=True):
            row.tokens.append(int(token))
            row.log_probs.append(log_prob)
