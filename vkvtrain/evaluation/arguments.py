"""What the model arguments of an lm-eval run say, checked before a model is loaded."""

import logging
from collections.abc import Sequence
from typing import Any

import transformers

from vkvtrain import chat_templates
from vkvtrain.cache import grows
from vkvtrain.config import EvictionConfig
from vkvtrain.support import LayerKind

logger = logging.getLogger(__name__)

_REFUSED = {
    "tp_plan": "a head's share of a layer would evict on its own; use data parallelism, or parallelize=True",
    "mixed_precision_dtype": "attention scores follow the weights' dtype; use dtype",
    "delta": "merge the weights first",
    "autogptq": "load a quantised checkpoint as pretrained",
    "gptqmodel": "load a quantised checkpoint as pretrained",
}


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ValueError for arguments of lm-eval's Hugging Face models that would be ignored or break eviction."""
    for name, reason in _REFUSED.items():
        if arguments.get(name):
            raise ValueError(f"{name}={arguments[name]!r} is not supported ({reason})")


def check_template(tokenizer: Any, arguments: dict[str, Any]) -> None:
    """Raise ValueError for `chat_template_args`, or `enable_thinking`, that the tokenizer's template does not read."""
    if tokenizer.chat_template:
        given = {name: arguments[name] for name in ("enable_thinking",) if arguments.get(name) is not None}
        given |= arguments.get("chat_template_args") or {}
        chat_templates.check_arguments(tokenizer, given, "chat_template_args")


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


def take_compile(arguments: dict[str, Any], kinds: Sequence[LayerKind]) -> bool:
    """Whether decode steps are compiled: `compile` among model arguments, which is removed from them.

    A cache that grows is decoded step by step all the same, so that a sweep's full cache stands beside the others.
    """
    asked = arguments.pop("compile", False)
    if not isinstance(asked, bool):
        raise ValueError(f"compile must be true or false, got {asked!r}")
    if asked and grows(kinds):
        logger.warning("compile=true: a layer keeps everything, so decode steps are not compiled in this run")
        return False
    return asked
