"""What happened to each sequence of an evaluation, and to the whole run: evictions, entries, bytes, tokens.

A record reaches lm-eval's logged samples through the request's own arguments, for any task and any kind of request.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lm_eval.api.instance import Instance

from vkvtrain.config import EvictionConfig
from vkvtrain.evaluation.metrics import compression_ratio, ends_in_a_repetition, is_looping
from vkvtrain.events import evictions_by, peak_entries
from vkvtrain.support import layer_kinds

logger = logging.getLogger(__name__)

RECORD = "vkvtrain"
"""Key of the records, a list with one of each repeat, in the arguments of a logged sample."""


class Generation(str):
    """Generated text with the record of how it came about, which a task's `process_results` can read."""

    record: dict[str, Any]


class Score(tuple[float, bool]):
    """lm-eval's (log-likelihood, whether greedy decoding gives it) with the record of its sequence."""

    record: dict[str, Any]


def sequence_record(model: Any, eviction: EvictionConfig, prompt: int, seen: int) -> dict[str, Any]:
    """What the cache did with one sequence: evictions, peak entries of a KV head, peak bytes of all layers and heads.

    Args:
        model: a transformers model, for its layers, heads and dtype.
        eviction: the setting that it ran under.
        prompt: tokens that are written without eviction.
        seen: tokens that the cache has seen at the end, the prompt's included.
    """
    evictions, peak = 0, seen
    if eviction.budget is not None and eviction.evicts:
        rule = (prompt, seen, eviction.budget, eviction.window)
        evictions, peak = evictions_by(*rule), peak_entries(*rule)
    held = [
        min(seen, kind.sliding_window) if kind.sliding_window is not None else peak if kind.evicts else seen
        for kind in layer_kinds(model.config, eviction)
    ]
    text = model.config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    entry = text.num_key_value_heads * 2 * head_dim * model.dtype.itemsize
    return {"final_length": seen, "evictions": evictions, "peak_entries": peak, "peak_kv_bytes": entry * sum(held)}


def generation_record(tokens: Sequence[int], raw: str, answer: str, cut_off: bool) -> dict[str, Any]:
    """How one generation ended: its tokens, whether it answered, and whether it looped.

    Args:
        tokens: the response, its end token included.
        raw: its text, thinking included.
        answer: what is left after the thinking; empty if the thinking never ended.
        cut_off: whether the limit ended it.
    """
    looping = is_looping(tokens, raw)
    return {
        "tokens": len(tokens),
        "answered": not cut_off and bool(answer.strip()),
        "looping": looping,
        "looping_or_cut_off": cut_off or looping,
        "repeated_ngram": ends_in_a_repetition(tokens),
        "compression_ratio": round(compression_ratio(raw), 3),
        "text": raw,
        "answer": answer,
    }


def attach(request: Instance, record: dict[str, Any]) -> None:
    """Put a record into the arguments of a request, from where lm-eval logs it with the sample."""
    arguments: Any = request.args
    if not isinstance(arguments[-1], dict):
        request.arguments = arguments = (*arguments, {})
    arguments[-1].setdefault(RECORD, []).append(record)


def texts(request: Instance) -> tuple[str, ...]:
    """The texts among a request's arguments, without what was attached to it."""
    return tuple(argument for argument in request.args if isinstance(argument, str))


def records_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Every record of a logged sample, a row of lm-eval's `samples_*.jsonl`; empty for a model that keeps none."""
    arguments = [argument for request in sample["arguments"].values() for argument in request.values()]
    return [record for argument in arguments if isinstance(argument, dict) for record in argument.get(RECORD, [])]


def distinct(requests: Sequence[Instance]) -> tuple[list[tuple[Instance, int]], list[int]]:
    """The (request, repeat) pairs to run, and for each of the requests which pair it is.

    lm-eval gives a request as often as it is repeated, and a lagging rank its last one again: those are run once.
    """
    pairs: dict[tuple[int, int], int] = {}
    jobs, places, seen = [], [], Counter()
    for request in requests:
        key = (id(request), seen[id(request)] % (request.repeats or 1))
        seen[id(request)] += 1
        if key not in pairs:
            pairs[key] = len(jobs)
            jobs.append((request, key[1]))
        places.append(pairs[key])
    return jobs, places


@dataclass
class Totals:
    """Totals of a run, over all ranks once they were gathered."""

    generations: int = 0
    """Generated responses."""
    scored: int = 0
    """Scored continuations and rolling windows."""
    evictions: int = 0
    tokens: int = 0
    """Generated tokens."""
    longest: int = 0
    """Most tokens that a sequence's cache had seen at its end."""
    seconds: float = 0.0
    """Wall time of generation, of the slowest rank."""
    by_kind: dict[str, int] = field(default_factory=dict)
    """Evictions of each kind of request."""

    def add(self, parts: Sequence["Totals"]) -> None:
        """Add what the ranks did at the same time."""
        for part in parts:
            self.generations += part.generations
            self.scored += part.scored
            self.evictions += part.evictions
            self.tokens += part.tokens
            self.longest = max(self.longest, part.longest)
            for kind, evictions in part.by_kind.items():
                self.by_kind[kind] = self.by_kind.get(kind, 0) + evictions
        self.seconds += max(part.seconds for part in parts)

    def summary(self) -> dict[str, Any]:
        """For the results file."""
        rate = {"tokens_per_second": round(self.tokens / self.seconds, 2)} if self.seconds else {}
        return asdict(self) | {"seconds": round(self.seconds, 3)} | rate


def totals(kind: str, records: Sequence[dict[str, Any]], seconds: float = 0.0) -> Totals:
    """Totals of the records of one kind of request (`generate_until`, `loglikelihood`, `loglikelihood_rolling`)."""
    evictions = sum(record["evictions"] for record in records)
    generated = kind == "generate_until"
    return Totals(
        generations=len(records) if generated else 0,
        scored=0 if generated else len(records),
        evictions=evictions,
        tokens=sum(record["tokens"] for record in records) if generated else 0,
        longest=max((record["final_length"] for record in records), default=0),
        seconds=seconds,
        by_kind={kind: evictions},
    )


def no_eviction(kind: str, part: Totals, eviction: EvictionConfig) -> str | None:
    """The warning that a run under eviction evicted nothing, or None."""
    if not eviction.evicts or part.evictions or not part.generations + part.scored:
        return None
    said = (
        f"NO EVICTION HAPPENED in {kind}: no sequence exceeded budget {eviction.budget} while it was decoded (the "
        f"longest had {part.longest} tokens), so this run measured the full cache"
    )
    if kind == "loglikelihood":
        said += (
            ". A context is written without eviction, like a prompt: a task of short contexts and answers, as multiple "
            "choice mostly is, says nothing about this policy"
        )
    return said
