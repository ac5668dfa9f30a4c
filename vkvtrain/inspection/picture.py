"""The survival picture: layer by position, what share of the heads still holds each token at the end."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vkvtrain.inspection.survival import Survival


def title_of(survival: Survival) -> str:
    """The setting in one line."""
    config = survival.config
    extra = ", prompt protected" if config.protect_prompt else ""
    return f"{config.policy}: budget {config.budget}, window {config.window}, {config.sinks} sinks{extra}"


def draw(survivals: Sequence[Survival], path: Path) -> None:
    """Write a PNG with a panel for each setting, and one of their difference if there are two."""
    panels = len(survivals) + (len(survivals) == 2)
    layers = len(survivals[0].layers)
    figure = Figure(figsize=(11, 0.9 + panels * (1.4 + 0.09 * layers)), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    extent = (-0.5, survivals[0].length - 0.5, layers - 0.5, -0.5)
    for axis, survival in zip(axes, survivals, strict=False):
        image = axis.imshow(
            survival.share().numpy(),
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            vmax=1,
            cmap="viridis",
            extent=extent,
        )
        mean = survival.share().mean().item()
        axis.set_title(
            f"{title_of(survival)}; {len(survival.events)} evictions, {mean:.0%} held at the end", fontsize=10
        )
        figure.colorbar(image, ax=axis, label="share of heads", pad=0.01)
        _mark(axis, survival)
    if len(survivals) == 2:
        ours, theirs = survivals
        difference = (theirs.share() - ours.share()).numpy()
        image = axes[-1].imshow(
            difference, aspect="auto", interpolation="nearest", vmin=-1, vmax=1, cmap="RdBu", extent=extent
        )
        axes[-1].set_title(f"{theirs.config.policy} less {ours.config.policy}", fontsize=10)
        figure.colorbar(image, ax=axes[-1], label="difference", pad=0.01)
        _mark(axes[-1], ours)
    axes[-1].set_xlabel("position (red line: end of the prompt; dashed: start of the window)")
    figure.savefig(path, dpi=130)


def _mark(axis, survival: Survival) -> None:
    """Layers on the y axis, the end of the prompt and the start of the window."""
    step = max(1, len(survival.layers) // 10)
    axis.set_yticks(range(0, len(survival.layers), step), survival.layers[::step])
    axis.set_ylabel("layer")
    axis.axvline(survival.prompt - 0.5, color="red", linewidth=1)
    axis.axvline(survival.length - survival.config.window - 0.5, color="white", linestyle="--", linewidth=1)
