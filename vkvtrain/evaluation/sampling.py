"""From lm-eval's generation settings, and a model's own, to the sampling parameters of the slot engine."""

from typing import Any

from vkvtrain.generation import Sampling

_NO_FILTER = "the slot engine has no such filter"
_REFUSED: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "beam search reorders rows"),
    "num_beam_groups": (1, "beam search reorders rows"),
    "constraints": (None, "beam search reorders rows"),
    "prompt_lookup_num_tokens": (None, "assisted decoding crops the cache"),
    "assistant_model": (None, "assisted decoding crops the cache"),
    "prefill_chunk_size": (None, "the prompt must arrive at once"),
    "num_return_sequences": (1, "repeats are the task's"),
    "guidance_scale": (1, "it needs a second forward of the prompt"),
    "penalty_alpha": (0, "contrastive search goes back in the cache"),
    "dola_layers": (None, "it reads hidden states of other layers"),
    "typical_p": (1, _NO_FILTER),
    "epsilon_cutoff": (0, _NO_FILTER),
    "eta_cutoff": (0, _NO_FILTER),
    "top_h": (None, _NO_FILTER),
    "no_repeat_ngram_size": (0, _NO_FILTER),
    "bad_words_ids": (None, _NO_FILTER),
    "sequence_bias": (None, _NO_FILTER),
    "suppress_tokens": (None, _NO_FILTER),
    "begin_suppress_tokens": (None, _NO_FILTER),
    "forced_bos_token_id": (None, _NO_FILTER),
    "forced_eos_token_id": (None, _NO_FILTER),
    "min_length": (0, _NO_FILTER),
    "min_new_tokens": (0, _NO_FILTER),
    "exponential_decay_length_penalty": (None, _NO_FILTER),
    "watermarking_config": (None, _NO_FILTER),
}
"""Settings of transformers' `generate` that change the tokens and are not served: their neutral value, and why not."""
_SERVED = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_ELSEWHERE = (
    "until",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
    "max_length",
    "use_cache",
)
"""Settings that a task may name and that are read by others, or change no token."""


def check_generation(settings: dict[str, Any]) -> None:
    """Raise ValueError for generation settings that an evicting cache cannot serve."""
    for name, (neutral, reason) in _REFUSED.items():
        value = settings.get(name)
        if value is not None and value != neutral:
            raise ValueError(f"{name}={value!r} does not work with an evicting cache ({reason}): remove it")


def sampling_of(settings: dict[str, Any], own: Any, seed: int) -> Sampling:
    """The sampling of a request, as `model.generate` would read it: the task's settings, else the model's own.

    Args:
        settings: lm-eval's normalised generation settings.
        own: the model's `generation_config`.
        seed: of the tokens drawn.

    Raises:
        ValueError: a setting that is not served, by name.
    """
    check_generation(settings)
    unknown = sorted(set(settings) - set(_SERVED) - set(_ELSEWHERE) - set(_REFUSED))
    if unknown:
        raise ValueError(
            f"{unknown[0]}={settings[unknown[0]]!r} is not a setting of generation with an evicting cache (known: "
            f"{', '.join(_SERVED)}): remove it"
        )

    def value(name: str, default: float) -> float:
        given = settings.get(name)
        given = getattr(own, name) if given is None else given
        return default if given is None else float(given)

    penalty = value("repetition_penalty", 1.0)
    if not settings["do_sample"]:
        return Sampling(repetition_penalty=penalty, seed=seed)
    temperature = value("temperature", 1.0)
    if temperature == 0:
        raise ValueError("do_sample=True with temperature=0 draws nothing: raise temperature, or set do_sample=False")
    return Sampling(
        temperature=temperature,
        top_p=value("top_p", 1.0),
        top_k=int(value("top_k", 50)),  # transformers' default
        min_p=value("min_p", 0.0),
        repetition_penalty=penalty,
        seed=seed,
    )
