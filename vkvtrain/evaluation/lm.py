"""The lm-eval model `vkv`: an `HFLM` whose generation uses the evicting cache.

Model arguments are HFLM's and the fields of `EvictionConfig` (`policy=vase_attnv,budget=64,window=16`), or
`eviction_config=<directory or repository>`. Without either the cache is full. A PEFT directory's own
eviction_config.json is never read silently: what an adapter was trained for and what it is evaluated under are separate
settings.
"""

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from vkvtrain.cache import EvictionCache
from vkvtrain.config import EvictionConfig
from vkvtrain.evaluation.metrics import is_looping
from vkvtrain.events import evictions_by, peak_entries
from vkvtrain.support import ATTENTION, layer_kinds

logger = logging.getLogger(__name__)

RECORD = "vkvtrain"
"""Key of a generation's record in the arguments of its logged sample."""
_REFUSED = {
    "num_beams": "beam search reorders rows",
    "prompt_lookup_num_tokens": "assisted decoding crops the cache",
    "assistant_model": "assisted decoding crops the cache",
    "prefill_chunk_size": "the prompt must arrive at once",
}


class Generation(str):
    """Generated text with the record of how it came about, which a task's `process_results` can read."""

    record: dict[str, Any]


def check_generation(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for generation settings that an evicting cache cannot serve."""
    for name, reason in _REFUSED.items():
        value = kwargs.get(name)
        if value is not None and not (name == "num_beams" and int(value) == 1):
            raise ValueError(f"{name}={value!r} does not work with an evicting cache ({reason}): remove it")


def own_generation_settings(pretrained: str, revision: str) -> dict[str, Any]:
    """What a model's generation_config.json sets; empty without the file."""
    try:
        return transformers.GenerationConfig.from_pretrained(pretrained, revision=revision).to_diff_dict()
    except OSError:
        return {}


def take_eviction_config(arguments: dict[str, Any]) -> EvictionConfig:
    """The eviction setting among model arguments, which are removed from them."""
    given = {name: arguments.pop(name) for name in EvictionConfig.model_fields if name in arguments}
    source = arguments.pop("eviction_config", None)
    if source is not None and given:
        raise ValueError(f"give eviction_config or {', '.join(given)}, not both")
    if source is not None:
        return EvictionConfig.from_pretrained(source)
    if given and "policy" not in given:
        raise ValueError(f"{', '.join(given)} given without a policy: add policy=vase_attnv, or remove them")
    return EvictionConfig(**given) if given else EvictionConfig(policy="full")


_HFLM: Any = HFLM  # lm-eval's registry leaves it without a type


@register_model("vkv")
class EvictionLM(_HFLM):
    """`HFLM` that generates with `EvictionCache`."""

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        self.eviction = take_eviction_config(arguments)
        revision = arguments.get("revision") or "main"
        trust = bool(arguments.get("trust_remote_code", False))
        try:
            config = transformers.AutoConfig.from_pretrained(pretrained, revision=revision, trust_remote_code=trust)
        except OSError as error:
            raise ValueError(f"pretrained={pretrained} cannot be loaded: {' '.join(str(error).split())}") from None
        layer_kinds(config, self.eviction)
        check_generation(own_generation_settings(pretrained, revision))
        self.records: list[dict[str, Any]] = []
        super().__init__(pretrained, backend="causal", **arguments)
        accelerator = Accelerator()
        if accelerator.num_processes > 1 and self._world_size == 1:
            # HFLM looks at visible GPUs only: on CPU, or with one GPU a rank, every rank would do all the work
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            self._device = accelerator.device
            self._model.to(self._device)

    def _create_model(self, pretrained: str, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        super()._create_model(pretrained, *args, **kwargs, attn_implementation=ATTENTION)
        if peft:
            from peft import PeftModel  # HFLM's own loading resizes embeddings that are meant to be padded

            self._model = PeftModel.from_pretrained(self._model, peft, revision=kwargs.get("revision"))
            self._model.eval()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate with the evicting cache; what is evicted depends on (document, repeat), not on the batch.

        So greedy answers do not depend on the batch; sampled ones draw from one generator per batch. Each request's
        logged arguments gain a list of records (one a repeat): tokens, evictions, peak entries and bytes, counted to
        the sample's own end.
        """
        repeats: dict[int, int] = {}
        jobs = []
        for place, request in enumerate(requests):
            repeat = repeats.get(id(request), 0)
            repeats[id(request)] = repeat + 1
            arguments: Any = request.args
            settings = normalize_gen_kwargs(arguments[1], self.max_gen_toks)
            jobs.append((place, request, repeat, self.tok_encode(arguments[0]), settings))
        size = self.batch_size if isinstance(self.batch_size, int) else 16
        groups: dict[str, list[Any]] = {}
        for job in jobs:
            check_generation(job[4])
            groups.setdefault(repr(sorted(job[4].items(), key=lambda item: item[0])), []).append(job)
        results: list[str] = [""] * len(requests)
        bar = tqdm(total=len(jobs), disable=disable_tqdm or self.rank != 0, desc="generating", mininterval=2)
        for group in groups.values():
            group.sort(key=lambda job: -len(job[3]))
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                for (place, request, repeat, *_), text in zip(batch, self._generate_batch(batch), strict=True):
                    results[place] = text
                    if repeat < (request.repeats or 1):  # a lagging rank is given its last request again
                        request.args[1].setdefault(RECORD, []).append(text.record)
                        self.records.append(text.record)
                bar.update(len(batch))
        bar.close()
        self._report()
        return results

    def _generate_batch(self, batch: Sequence[Any]) -> list[Generation]:
        settings = dict(batch[0][4])
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(settings.pop("until", None), eos=end)
        ends = self._end_tokens()
        limit = settings.pop("max_gen_toks")
        settings.pop("max_length", None)
        if not settings.get("do_sample"):
            settings.pop("temperature", None)  # lm-eval sets 0, which transformers warns about
        longest = self.max_length - limit
        if longest < 1:
            raise ValueError(f"max_gen_toks ({limit}) must be less than the model's max_length ({self.max_length})")
        prompts = [job[3][-longest:] for job in batch]
        cut = sum(len(job[3]) > longest for job in batch)
        if cut:
            logger.warning("%d prompts were cut to their last %d tokens to leave room for the answer", cut, longest)
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        streams = [(job[1].doc_id, job[2]) for job in batch]
        if settings.get("do_sample"):
            digest = hashlib.blake2b(repr((self.eviction.seed, streams)).encode(), digest_size=7).digest()
            torch.manual_seed(int.from_bytes(digest, "little"))
        stops = [stop for stop in until if stop != end]
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=EvictionCache(self.eviction, self.model.config, streams),
            max_new_tokens=limit,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
            **settings,
        )
        texts = []
        for prompt, tokens, stream in zip(prompts, out[:, width:].tolist(), streams, strict=True):
            tokens, cut_off = self._own_tokens(tokens, ends, stops)
            raw = self.tok_decode(tokens)
            text = Generation(postprocess_generated_text(raw, until, self.think_end_token))
            text.record = self._record(len(prompt), tokens, cut_off) | {"stream": list(stream), "text": raw}
            texts.append(text)
        return texts

    def _end_tokens(self) -> set[int]:
        """Tokens that end a generation: the tokenizer's, and the model's own (some have several)."""
        own = self.model.generation_config.eos_token_id
        return {self.eot_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}

    def _own_tokens(self, tokens: list[int], ends: set[int], stops: Sequence[str]) -> tuple[list[int], bool]:
        """A row's tokens up to its own end, without what the batch went on for; and whether it was cut off."""
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if end is None else tokens[: end + 1]

        def stopped(count: int) -> bool:
            text = self.tok_decode(tokens[:count])
            return any(stop in text for stop in stops)

        if stops and stopped(len(tokens)):
            return tokens[: bisect_left(range(len(tokens)), True, key=stopped)], False
        return tokens, end is None

    def _record(self, prompt: int, tokens: list[int], cut_off: bool) -> dict[str, Any]:
        """What happened to one sequence; its last token is never given to the cache."""
        seen = prompt + len(tokens) - 1
        evictions, peak = 0, seen
        if self.eviction.budget is not None and self.eviction.evicts:
            rule = (prompt, seen, self.eviction.budget, self.eviction.window)
            evictions, peak = evictions_by(*rule), peak_entries(*rule)
        held = [
            min(seen, kind.sliding_window) if kind.sliding_window is not None else peak if kind.evicts else seen
            for kind in layer_kinds(self.model.config, self.eviction)
        ]
        text = self.model.config.get_text_config(decoder=True)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        entry = text.num_key_value_heads * 2 * head_dim * self.model.dtype.itemsize
        return {
            "tokens": len(tokens),
            "final_length": seen,
            "evictions": evictions,
            "peak_entries": peak,
            "peak_kv_bytes": entry * sum(held),
            "looping_or_cut_off": bool(cut_off or is_looping(tokens)),
        }

    def _report(self) -> None:
        if self.eviction.evicts and not any(record["evictions"] for record in self.records):
            logger.warning(
                "NO EVICTION HAPPENED: no sequence exceeded budget %s, so this run measured the full cache",
                self.eviction.budget,
            )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        self._refuse_scoring()
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        self._refuse_scoring()
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _refuse_scoring(self) -> None:
        if self.eviction.evicts:
            raise ValueError(
                "this task scores continuations in one forward pass, where nothing is evicted: use a task that "
                "generates, or policy=full"
            )

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's information, the eviction setting and what it did on this rank."""
        evictions = sum(record["evictions"] for record in self.records)
        info = {
            "setting": self.eviction.model_dump(mode="json"),
            "generations": len(self.records),
            "evictions": evictions,
        }
        if self.eviction.evicts and self.records and not evictions:
            info["warning"] = "no eviction happened"
        return {**super().get_model_info(), "eviction": info}
