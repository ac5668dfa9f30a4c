"""Rotary embeddings whose frequencies depend on the length of what is in a forward. Knows configurations, not modules.

Two kinds of RoPE choose their frequencies in every forward by the greatest position in it (transformers'
`dynamic_rope_update`): longrope takes `long_factor` for all tokens once one lies beyond
`original_max_position_embeddings`, dynamic NTK stretches the base with every token beyond `max_position_embeddings`.
Keys that are cached under one set then meet queries under another, so that decoding is not what one parallel pass is,
and a row depends on the longest row beside it. So one set is fixed for all sequences, by the length of the longest that
is meant to be (as vLLM does by `max_model_len`).
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

_DROPS_ITS_CACHE = ("phi3", "phimoe", "phi4_multimodal")
"""Model types that `generate` without a cache once a sequence exceeds `original_max_position_embeddings`."""


def check_rope(model_config: Any) -> None:
    """Raise ValueError for a model whose rotary frequencies depend on the length of what is in a forward."""
    text = model_config.get_text_config(decoder=True)
    kind = next((parameters["rope_type"] for parameters in _rope_parameters(text) if _moves(parameters)), None)
    if kind is None and not _drops_its_cache(text):
        return
    why = (
        f"its rotary frequencies ({kind}) depend on the longest row of a forward, so that training and decoding would "
        "differ"
        if kind is not None
        else f"generate would drop the cache beyond {text.original_max_position_embeddings} tokens "
        "(original_max_position_embeddings)"
    )
    raise ValueError(
        f"{text.model_type}: {why}: fix them for all sequences, from_pretrained(..., "
        "config=vkvtrain.fixed_rope(AutoConfig.from_pretrained(...)))"
    )


def fixed_rope(model_config: Any, length: int | None = None) -> Any:
    """A copy of a model's configuration whose rotary frequencies are one set for all sequences, to load the model with.

    They are those that transformers uses for a sequence of `length` tokens: of longrope the long factors if that is
    beyond `original_max_position_embeddings`, else the short ones; of dynamic NTK the base for that length. A
    configuration whose frequencies do not depend on a length is returned as it is.

    Args:
        model_config: of a transformers model.
        length: most tokens of a sequence; default `max_position_embeddings`.

    Raises:
        ValueError: a length below 1.
    """
    if length is not None and length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    text = model_config.get_text_config(decoder=True)
    if not any(_moves(parameters) for parameters in _rope_parameters(text)) and not _drops_its_cache(text):
        return model_config
    fixed = copy.deepcopy(model_config)
    text = fixed.get_text_config(decoder=True)
    longest = text.max_position_embeddings if length is None else length
    for parameters in _rope_parameters(text):
        if parameters["rope_type"] == "dynamic":
            _fix_dynamic(parameters, text, longest)
        elif parameters["rope_type"] == "longrope":
            _fix_longrope(parameters, text, longest)
    text.max_position_embeddings = longest
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = longest
    return fixed


def _rope_parameters(text: Any) -> Iterator[dict[str, Any]]:
    """The RoPE parameters of a text model: one set, or one for each type of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in rope:
        yield rope
        return
    yield from (
        parameters for parameters in rope.values() if isinstance(parameters, dict) and "rope_type" in parameters
    )


def _moves(parameters: dict[str, Any]) -> bool:
    """Whether frequencies or their scale depend on the greatest position of a forward."""
    if parameters["rope_type"] != "longrope":
        return "dynamic" in parameters["rope_type"]
    scales = parameters.get("short_mscale"), parameters.get("long_mscale")
    return parameters["short_factor"] != parameters["long_factor"] or scales[0] != scales[1]


def _drops_its_cache(text: Any) -> bool:
    return text.model_type in _DROPS_ITS_CACHE and text.original_max_position_embeddings < text.max_position_embeddings


def _fix_dynamic(parameters: dict[str, Any], text: Any, length: int) -> None:
    trained, factor, alpha = text.max_position_embeddings, parameters.pop("factor"), parameters.pop("alpha", None)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    # Hunyuan's fixed alpha takes the place of what follows from a length
    stretch = alpha or factor * max(length, trained) / trained - (factor - 1)
    parameters |= {"rope_type": "default", "rope_theta": parameters["rope_theta"] * stretch ** (dim / (dim - 2))}


def _fix_longrope(parameters: dict[str, Any], text: Any, length: int) -> None:
    original = parameters["original_max_position_embeddings"]
    which = "long" if length > original else "short"
    factor = parameters.get("factor") or text.max_position_embeddings / original
    if parameters.get("attention_factor") is None:  # or it would be taken from the lengths that are changed here
        parameters["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    for name in ("factor", "mscale"):
        if f"{which}_{name}" in parameters:
            parameters[f"short_{name}"] = parameters[f"long_{name}"] = parameters[f"{which}_{name}"]
    parameters |= {"factor": 1.0, "original_max_position_embeddings": length}
