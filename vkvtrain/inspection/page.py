"""The page: every token of the text, coloured by how many heads still hold it. Self-contained; all text is escaped."""

import json
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vkvtrain.inspection.picture import title_of
from vkvtrain.inspection.survival import Survival, policy_overlap


def percent(value: float) -> str:
    return f"{value:.0%}"


def page(survivals: Sequence[Survival], tokens: Sequence[str], model: str) -> str:
    """HTML of one or two settings on the same text.

    Args:
        survivals: what each setting did.
        tokens: the text of every token.
        model: what the model is called.
    """
    first = survivals[0]
    settings = [
        {
            "policy": survival.config.policy,
            "title": title_of(survival),
            "evictions": len(survival.events),
            "held": percent(survival.share().mean().item()),
            "prompt_held": percent(survival.prompt_share().mean().item()),
            "head_overlap": f"{survival.head_overlap().mean().item():.2f}"
            if first.evict_at.shape[1] > 1
            else "one head",
            "by_chance": f"{survival.overlap_by_chance():.2f}",
        }
        for survival in survivals
    ]
    shares = first.share().mean(0).tolist()
    shown = [{"text": text, "share": share} for text, share in zip(tokens, shares, strict=True)]
    overlap = f"{policy_overlap(*survivals).mean().item():.2f}" if len(survivals) == 2 else None
    # integers only, so that nothing in it can close the script element
    data = Markup(json.dumps([survival.evict_at.tolist() for survival in survivals], separators=(",", ":")))
    environment = Environment(
        loader=PackageLoader("vkvtrain.inspection", "."), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.jinja").render(
        settings=settings, tokens=shown, prompt=first.prompt, layers=first.layers, model=model, data=data,
        policy_overlap=overlap,
    )  # fmt: skip
