"""The lm-eval model `vkv`: an `HFLM` that generates with the evicting cache and scores under simulated eviction.

Model arguments are HFLM's and the fields of `EvictionConfig` (`policy=vase_attnv,budget=64,window=16`), or
`eviction_config=<directory or repository>`. Without either the cache is full. `pretrained=tiny` is the embedded model,
`peft=tiny/eviction_lora` and `peft=tiny/dense_lora` its shipped adapters. A PEFT directory's own eviction_config.json
is never read silently: what an adapter was trained for and what it is evaluated under are separate settings.
`journal=<directory>` keeps finished generations there: an interrupted run, given again, goes on.
`date=2026-11-24` is the day that a chat template takes for today, if it writes one.
`compile=true` decodes by a compiled step, on a GPU as a CUDA graph, where the setting bounds every layer's cache.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from vkvtrain.adapters import check_fits, read_adapter
from vkvtrain.clock import day_of, fix_day
from vkvtrain.ends import Thoughts, encode, end_tokens, saved_ends, stop_at
from vkvtrain.evaluation.arguments import (
    check_arguments,
    check_template,
    own_generation_settings,
    take_compile,
    take_eviction_config,
)
from vkvtrain.evaluation.records import (
    RECORD,
    Generation,
    Score,
    Totals,
    attach,
    distinct,
    generation_record,
    no_eviction,
    sequence_record,
    texts,
    totals,
)
from vkvtrain.evaluation.sampling import check_generation, sampling_of
from vkvtrain.evaluation.scoring import Continuation, batches, score
from vkvtrain.evaluation.thinking import divided
from vkvtrain.generation import Completion, Request, generate
from vkvtrain.loading import load_config
from vkvtrain.noise import canonical_stream
from vkvtrain.rope import fixed_rope
from vkvtrain.support import ATTENTION, layer_kinds
from vkvtrain.threads import choose_threads
from vkvtrain.tiny import embedded
from vkvtrain.training.launch import asked_processes, check_replicated

logger = logging.getLogger(__name__)


RANK_TIMEOUT = timedelta(hours=12)
"""How long ranks wait for each other, the slowest one's generation included; lm-eval's own is a year."""

_HFLM: Any = HFLM  # lm-eval's registry leaves it without a type


@dataclass(frozen=True)
class _Job:
    """A request of lm-eval's and what it becomes."""

    asked: Instance
    repeat: int
    request: Request
    until: list[str]
    """Texts before which lm-eval cuts the answer."""
    is_cut: bool
    """Whether the prompt was too long."""


@register_model("vkv")
class EvictionLM(_HFLM):
    """`HFLM` that generates with `EvictionCache` and scores in a simulation of it."""

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        check_arguments(arguments)
        pretrained = embedded(pretrained)
        self.eviction = take_eviction_config(arguments)
        journal = arguments.pop("journal", None)
        self.journal = None if journal is None else Path(str(journal))
        day = arguments.pop("date", None)
        day = day_of(None if day is None else str(day), "date")
        revision = arguments.get("revision") or "main"
        trust = bool(arguments.get("trust_remote_code", False))
        try:
            config = load_config(pretrained, revision, trust_remote_code=trust)
        except OSError as error:
            raise ValueError(f"pretrained={pretrained} cannot be loaded: {' '.join(str(error).split())}") from None
        kinds = layer_kinds(config, self.eviction)
        if peft := arguments.get("peft"):
            peft = arguments["peft"] = embedded(peft)
            check_fits(read_adapter(peft, "peft", arguments.get("revision")), config, "peft", trust)
        self.compile = take_compile(arguments, kinds)
        check_generation(own_generation_settings(pretrained, revision))
        check_replicated()
        self.run = Totals()
        self.warnings: list[str] = []
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=RANK_TIMEOUT)])
        if (asked := asked_processes()) != accelerator.num_processes:
            raise ValueError(
                f"the launcher was asked for {asked} processes but this evaluation has {accelerator.num_processes}: "
                "launch CPU processes with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes"
            )
        self._is_rendered = False
        super().__init__(pretrained, backend="causal", **arguments)
        if (said := choose_threads(self.model)) is not None:
            logger.warning(said)
        self.date = fix_day(self.tokenizer, day, self.journal and self.journal / "date", "date")
        check_template(self.tokenizer, arguments)
        self.think_end_token = self._think_end(self.think_end_token)
        if accelerator.num_processes > 1:
            # HFLM counts the visible GPUs of a machine: wrong on CPU, with one GPU a rank, or on several machines
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            self._device = accelerator.device
            self._model.to(self._device)

    def _think_end(self, tag: Any) -> str | None:
        """The end-of-thinking tag as text, its special tokens included."""
        if tag is None:
            return None
        tokens = [tag] if isinstance(tag, int) else self.tok_encode(tag, add_special_tokens=False)
        text = self.tok_decode(tokens, skip_special_tokens=False) if isinstance(tag, int) else tag
        if text not in self.tok_decode(tokens, skip_special_tokens=False) or self._end_tokens() & set(tokens):
            raise ValueError(
                f"think_end_token={tag!r} does not appear in decoded text before an answer (it is unknown to the "
                "tokenizer, or ends a generation): name the text that the model writes after its thinking"
            )
        return text

    def _get_config(self, pretrained: str, **arguments: Any) -> None:
        super()._get_config(pretrained, **arguments)
        self._config = fixed_rope(self._config)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; from then on requests are such texts, which say all their special tokens."""
        self._is_rendered = True
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that lm-eval names in its results; asked for where requests are rendered by it."""
        self._is_rendered = bool(chat_template)
        return super().chat_template(chat_template)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **arguments: Any) -> list[int]:
        """The tokens of a text, with one beginning of sequence, as in training.

        HFLM adds the tokenizer's special tokens to a rendered conversation too, where its template writes no BOS.
        """
        if add_special_tokens is None and self.add_bos_token is None:
            if not self._is_rendered:
                (tokens,) = encode(self.tokenizer, [string])
                longest = arguments.get("left_truncate_len")
                return tokens[-longest:] if longest else tokens
            add_special_tokens = False
        return super().tok_encode(string, add_special_tokens, **arguments)

    def _create_model(self, pretrained: str, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        super()._create_model(pretrained, *args, **kwargs, config=self._config, attn_implementation=ATTENTION)
        if peft:
            from peft import PeftModel  # HFLM's own loading resizes embeddings that are meant to be padded

            self._model = PeftModel.from_pretrained(self._model, peft, revision=kwargs.get("revision"))
            stop_at(self._model.generation_config, saved_ends(peft, kwargs.get("revision")))
            self._model.eval()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate with the slot engine: `batch_size` sequences at once, each slot refilled as its sequence ends.

        An answer, greedy or sampled, depends on (document, repeat), and not on the batch or the ranks. Each request's
        logged arguments gain a list of records (one a repeat): tokens, evictions, peak entries and bytes, counted to
        the sample's own end (`vkvtrain.evaluation.records`).
        """
        journal = None if self.journal is None else self.journal / "completions.jsonl"
        resumed = journal is not None and journal.exists()
        began = time.perf_counter()
        pairs, places = distinct(requests)
        jobs = [self._job(*pair) for pair in pairs]
        for longest, cut in Counter(len(job.request.prompt) for job in jobs if job.is_cut).items():
            logger.warning("%d prompts were cut to their last %d tokens to leave room for the answer", cut, longest)
        jobs.sort(key=lambda job: -len(job.request.prompt))
        completions = generate(
            self.model,
            self.eviction,
            [job.request for job in jobs],
            slots=self.batch_size if isinstance(self.batch_size, int) else 16,
            end_tokens=self._end_tokens(),
            tokenizer=self.tokenizer,
            progress=None if disable_tqdm or self.rank != 0 else "generating",
            journal=journal,
            compile=self.compile,
        )
        answers = {
            (id(job.asked), job.repeat): self._generation(job, completion)
            for job, completion in zip(jobs, completions, strict=True)
        }
        results = [answers[id(request), repeat] for request, repeat in pairs]
        for (request, _), text in zip(pairs, results, strict=True):
            attach(request, text.record)
        seconds = 0.0 if resumed else time.perf_counter() - began  # what a journal held says nothing about speed
        self._report("generate_until", [text.record for text in results], seconds)
        return [results[place] for place in places]

    def _job(self, asked: Instance, repeat: int) -> "_Job":
        arguments: Any = asked.args
        settings: dict[str, Any] = {**normalize_gen_kwargs(arguments[1], self.max_gen_toks)}
        settings.pop(RECORD, None)
        limit = settings["max_gen_toks"]
        longest = self.max_length - limit
        if longest < 1:
            raise ValueError(f"max_gen_toks ({limit}) must be less than the model's max_length ({self.max_length})")
        end = "" if self.eot_token_id is None else self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(settings["until"], eos=end)
        stop = tuple(text for text in until if text and text != end)
        prompt = tuple(self.tok_encode(arguments[0]))
        sampling = sampling_of(settings, self.model.generation_config, self.eviction.seed)
        thoughts = Thoughts.behind(str(arguments[0]), self.think_end_token)
        request = Request(prompt[-longest:], limit, (asked.doc_id or 0, repeat), sampling, stop, thoughts)
        return _Job(asked, repeat, request, until, len(prompt) > longest)

    def _generation(self, job: "_Job", completion: Completion) -> Generation:
        """A response as lm-eval wants it: its answer cut at stop strings; with `think_end_token` without thoughts."""
        assert job.request.thoughts is not None
        tokens, cut_off, prompt = completion.tokens, not completion.finished, len(job.request.prompt)
        raw = self.tok_decode(tokens)
        thinking, answer = divided(tokens, self.tok_decode, job.request.thoughts, completion.finished)
        said = postprocess_generated_text(answer, job.until, None)
        text = Generation(said if self.think_end_token else thinking + said)
        cache = sequence_record(self.model, self.eviction, prompt, prompt + len(tokens) - 1)
        text.record = {
            "stream": [job.asked.doc_id, job.repeat],
            **cache,
            **generation_record(tokens, raw, answer, cut_off),
        }
        return text

    def _end_tokens(self) -> frozenset[int]:
        return end_tokens(self.tokenizer, self.model.generation_config)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """(log-likelihood, whether it is greedy) of each (context, continuation); the context is a prompt.

        Requests differ in nothing but their texts from lm-eval's own, the empty context included; they gain a record.
        """
        if self.enable_thinking:
            raise ValueError(
                "enable_thinking: this task scores continuations; use a task that generates, or leave it out"
            )
        jobs, places = distinct(requests)
        rows = []
        for request, repeat in jobs:
            context, target = self._encode_request(*texts(request))
            rows.append(Continuation(tuple(context), tuple(target), (request.doc_id or 0, repeat)))
        answers = self._score(rows, disable_tqdm)
        for (request, _), answer in zip(jobs, answers, strict=True):
            attach(request, answer.record)
        self._report("loglikelihood", [answer.record for answer in answers])
        return [answers[place] for place in places]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """Log-likelihood of each text, in lm-eval's windows of `max_length`; a window's first token is its prompt.

        The first window begins with one prefix token, as lm-eval's does with `add_bos_token=False`: its own default
        scores a second one after it where the tokenizer adds one too.
        """
        jobs, places = distinct(requests)
        rows, owners = [], []
        for job, (request, repeat) in enumerate(jobs):
            tokens = self.tok_encode(*texts(request), add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                tokens = tokens[1:]
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window, (context, target) in enumerate(map(make_disjoint_window, windows)):
                stream = (request.doc_id or 0, repeat, window)
                rows.append(Continuation(tuple(context), tuple(target), stream, prompt=1))
                owners.append(job)
        answers = self._score(rows, disable_tqdm)
        sums = [0.0] * len(jobs)
        for job, answer in zip(owners, answers, strict=True):
            sums[job] += answer[0]
            attach(jobs[job][0], answer.record)
        self._report("loglikelihood_rolling", [answer.record for answer in answers])
        return [sums[place] for place in places]

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; an empty context is the prefix token, unless the continuation begins with it (lm-eval's)."""
        if context:
            return self._encode_pair(context, continuation)
        target = self.tok_encode(continuation, add_special_tokens=False)
        return (target[:1], target[1:]) if target[:1] == [self.prefix_token_id] else ([self.prefix_token_id], target)

    def _score(self, rows: Sequence[Continuation], disable_tqdm: bool) -> list[Score]:
        answers: list[Any] = [None] * len(rows)
        size = self.batch_size if isinstance(self.batch_size, int) else 16
        bar = tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc="scoring", mininterval=2)
        for batch in batches(rows, size, self.max_length):
            own = [rows[place] for place in batch]
            scores = score(self.model, self.eviction, own, self.max_length, self.softmax_dtype)
            for place, row, found in zip(batch, own, scores, strict=True):
                tokens, prompt = row.inputs(self.max_length)
                answers[place] = answer = Score(found)
                answer.record = sequence_record(self.model, self.eviction, prompt, len(tokens)) | {
                    "stream": list(canonical_stream(row.stream)),
                    "tokens": len(row.target),
                }
            bar.update(len(batch))
        bar.close()
        return answers

    def _report(self, kind: str, records: Sequence[dict[str, Any]], seconds: float = 0.0) -> None:
        """Add a kind of request to the run's totals, over all ranks, and say if nothing was evicted."""
        parts = self.gather_object(totals(kind, records, seconds))
        if parts is None:
            return
        of_all = Totals()
        of_all.add(parts)
        self.run.add([of_all])
        warning = no_eviction(kind, of_all, self.eviction)
        if warning:
            self.warnings.append(warning)
            logger.warning(warning)

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's information, the eviction setting and what it did, over all ranks."""
        info = {"setting": self.eviction.model_dump(mode="json"), "compiled": self.compile, **self.run.summary()}
        info["generation_config"] = (
            self.model.generation_config.to_diff_dict()
        )  # what tasks do not set is taken from it
        if self.date is not None:
            info["date"] = str(self.date)  # which the chat template writes
        if self.warnings:
            info["warning"] = "; ".join(self.warnings)
        return {**super().get_model_info(), "eviction": info}
