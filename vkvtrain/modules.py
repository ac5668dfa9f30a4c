"""The modules of a model that a simulation has to know: its attention layers, and adapters that add tokens.

Knows modules, and nothing of simulations.
"""

from typing import Any

from torch import nn

_KNOWN_BY = ("is_causal", "scaling")
"""What attention modules have and others have not: transformers' own attention functions read them, and the names of
the arguments of a forward, which releases rename, are not asked for."""


def attention_modules(model: nn.Module) -> list[Any]:
    """The decoder's attention modules of a transformers model: they know their layer and their configuration.

    Encoders of other media, whose attention is not causal, are left out.
    """
    return [module for module in model.modules() if _is_decoder_attention(vars(module))]


def _is_decoder_attention(attributes: dict[str, Any]) -> bool:
    known = "layer_idx" in attributes and "config" in attributes and any(name in attributes for name in _KNOWN_BY)
    return known and attributes.get("is_causal", True) is not False


def virtual_tokens(model: nn.Module) -> int:
    """Tokens that an adapter of PEFT puts before every row (prompt tuning, p-tuning); 0 without one.

    Raises:
        ValueError: an adapter that puts entries into the cache instead (prefix tuning), by name.
    """
    for module in model.modules():
        if not hasattr(type(module), "active_peft_config"):
            continue
        adapter: Any = module.active_peft_config
        if adapter.is_prompt_learning and module.has_active_enabled_adapter:
            kind = getattr(adapter.peft_type, "value", adapter.peft_type)
            if kind in ("PREFIX_TUNING", "CARTRIDGE"):
                raise ValueError(
                    f"a {kind} adapter puts entries into the cache that no token wrote, which eviction does not "
                    "support: use LoRA or prompt tuning"
                )
            return adapter.num_virtual_tokens
    return 0
