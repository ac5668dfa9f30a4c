"""Eviction policies by the field's names. To add one: a file in this folder with a class under `@register("name")`.

Knows nothing of models, caches or training: tensors in, tensors out.
"""

import difflib
import importlib
import pkgutil

from vkvtrain.policies.base import MEASURES, POLICIES, Candidates, Policy, round_mantissa, value_size, window_attention

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def get_policy(name: str) -> type[Policy]:
    """The policy class of a name; raises ValueError with the nearest name if there is none."""
    if name not in POLICIES:
        close = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(POLICIES)}"
        raise ValueError(f"policy: there is no policy {name!r} ({hint})")
    return POLICIES[name]


__all__ = [
    "MEASURES",
    "POLICIES",
    "Candidates",
    "Policy",
    "get_policy",
    "round_mantissa",
    "value_size",
    "window_attention",
]
