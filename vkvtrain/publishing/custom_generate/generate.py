"""Decode with the evicting cache that this model was trained for. Needs `pip install vkvtrain`.

    model.generate(**inputs, custom_generate=repository, trust_remote_code=True, max_new_tokens=1024)

Takes the arguments of `generate`, and `eviction={"budget": 4096}` to change fields of the setting below. The cache is
returned with `return_dict_in_generate=True`; passing it again continues the sequence.
"""

from typing import Any

from transformers import GenerationMixin

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.versions import cache_argument, take_cache

_MIXIN: Any = GenerationMixin  # `model.generate` may be this very function

EVICTION: dict[str, Any] = {"policy": "full"}
END_TOKENS: list[int] = []
"""Where training taught the model to stop; an adapter is loaded with the generation configuration of its base model."""


def generate(
    input_ids: Any = None,
    *,
    model: Any,
    eviction: dict[str, Any] | None = None,
    streams: Any = None,
    **arguments: Any,
) -> Any:
    """`model.generate`, with an `EvictionCache` for its cache.

    Args:
        input_ids: the prompts, left-padded, [rows, tokens].
        model: the model; its attention implementation is set, and put back afterwards.
        eviction: fields of `EvictionConfig` that replace this repository's.
        streams: what names each prompt's randomness; default 0, 1, ...
        arguments: of `generate`; an `EvictionCache` continues its sequences, the default is a new one.
    """
    for name in ("custom_generate", "trust_remote_code"):
        arguments.pop(name, None)
    cache = take_cache(arguments)
    if input_ids is not None:
        arguments["input_ids"] = input_ids
    if END_TOKENS and "generation_config" not in arguments:
        arguments.setdefault("eos_token_id", END_TOKENS)
    before = model.config._attn_implementation
    model.set_attn_implementation("vkvtrain")
    try:
        if cache is None:
            cache = EvictionCache(EvictionConfig(**{**EVICTION, **(eviction or {})}), model.config, streams)
        return _MIXIN.generate(model, **cache_argument(cache), **arguments)
    finally:
        model.set_attn_implementation(before)
