"""The description of an eviction setting: one frozen, validated object with a JSON round trip.

Knows the names and arguments of the policies; knows nothing of models, caches or training.
"""

import dataclasses
import difflib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vkvtrain.policies import POLICIES, Policy, get_policy

CONFIG_NAME = "eviction_config.json"


class Settings(BaseModel):
    """A frozen settings object that refuses unknown keys; its errors are one sentence that names the setting."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if name in type(self).model_fields:
                _check_number(name, value, type(self).model_fields[name].annotation)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(one_sentence(error, list(type(self).model_fields))) from None


def _check_number(name: str, value: Any, annotation: Any) -> None:
    """Raise ValueError for true or false instead of a number (pydantic takes them for 1 and 0), or one past 64 bits."""
    kinds = (annotation, *get_args(annotation))
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise ValueError(f"setting {name!r}: must be a number, got {value!r}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"setting {name!r}: {str(value)[:20]}... does not fit 64 bits")


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)` for the known name nearest to `name`, else the list of all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def one_sentence(error: ValidationError, fields: list[str]) -> str:
    """The first problem of a pydantic error, said in one sentence; a misspelt name before the one it leaves missing."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{nearest(name.rpartition('.')[2], fields)}"
    if first["type"] == "missing":
        return f"setting {name!r} is required"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"setting {name!r}: {message}, got {first['input']!r}"


class EvictionConfig(Settings):
    """How a KV cache is bounded: which policy keeps which entries, and how many.

    Raises:
        ValueError: one sentence that names the setting and the fix.
    """

    policy: str = "vase_attnv"
    """Name of the eviction policy (`vkvtrain.policies.POLICIES`)."""
    budget: int | None = None
    """Entries that a KV head keeps after an event, the window included; required unless the policy is `full`."""
    window: int = Field(default=64, ge=1)
    """Newest entries, always kept; also the number of tokens between two eviction events."""
    sinks: int = Field(default=4, ge=0)
    """First positions of the sequence, always kept."""
    protected_fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the budget that is protected as sinks or large values; None is the policy's own default."""
    measure: Literal["range", "variance", "l2", "random"] = "range"
    """What makes a value large: range, variance or Euclidean norm over the head dimension; `random` protects any."""
    retention: Literal["sampled", "top_k"] | None = None
    """Whether the unprotected are sampled in proportion to their scores or the highest kept; None: the policy's own."""
    smooth: bool = True
    """Average-pool the window attention over five neighbours."""
    policy_args: dict[str, Any] = Field(default_factory=dict)
    """The policy's own parameters, for example `{"rank": 20}` for `vase_dkv`."""
    protect_prompt: bool = False
    """Keep the (first) prompt; one longer than `budget - window - 1` is clipped to that many tokens."""
    skip_layers: tuple[int, ...] = ()
    """Layers that keep everything."""
    seed: int = 0
    """Seed of the policy's noise."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        policy = self.make_policy()
        if any(layer < 0 for layer in self.skip_layers):
            raise ValueError(f"skip_layers must hold layer indices from 0, got {list(self.skip_layers)}")
        if policy.keeps_everything:
            return self
        if self.budget is None:
            raise ValueError(
                f"budget is required for policy {self.policy!r}: set it to the number of entries to keep, "
                f"a multiple of window ({self.window})"
            )
        if self.budget <= self.window:
            raise ValueError(
                f"budget ({self.budget}) must be greater than window ({self.window}): raise budget or lower window"
            )
        if self.budget % self.window:
            below = self.budget // self.window * self.window
            around = " or ".join(str(b) for b in (below, below + self.window) if b > self.window)
            raise ValueError(
                f"budget ({self.budget}) must be a multiple of window ({self.window}): use {around}, or change window"
            )
        if self.sinks >= self.budget - self.window:
            raise ValueError(
                f"sinks ({self.sinks}) must be less than budget - window ({self.budget - self.window}): lower sinks"
            )
        self._check_retention(policy)
        if self.measure != "range" and not self.large_values:
            raise ValueError(
                f"measure {self.measure!r}: policy {self.policy!r} protects no large values, as "
                f"floor(protected_fraction * budget) = {self._protected} is not more than sinks ({self.sinks}): raise "
                "protected_fraction, or leave measure out"
            )
        return self

    def _check_retention(self, policy: Policy) -> None:
        if policy.has_weights or self.samples == policy.samples:
            return
        if policy.samples:
            raise ValueError(
                f"retention 'top_k': the weights of policy {self.policy!r} are all equal, so none is the highest: "
                "leave retention out"
            )
        weighted = ", ".join(name for name, other in POLICIES.items() if other.has_weights)
        raise ValueError(
            f"retention 'sampled': the scores of policy {self.policy!r} are no weights to sample by: leave retention "
            f"out, or use one of {weighted}"
        )

    @property
    def _protected(self) -> int:
        """Entries protected as sinks or large values, if they fit."""
        own = get_policy(self.policy).protected_fraction
        fraction = own if self.protected_fraction is None else self.protected_fraction
        return math.floor(fraction * (self.budget or 0))

    @property
    def large_values(self) -> int:
        """Entries protected for their large values, beside the sinks."""
        return max(0, self._protected - self.sinks)

    @property
    def samples(self) -> bool:
        """Whether unprotected candidates are sampled in proportion to their scores, else the highest kept."""
        return get_policy(self.policy).samples if self.retention is None else self.retention == "sampled"

    @property
    def draws(self) -> bool:
        """Whether the seed decides anything."""
        randomly_protected = self.measure == "random" and self.large_values > 0
        return self.evicts and (self.samples or randomly_protected or get_policy(self.policy).needs_noise)

    def make_policy(self) -> Policy:
        """The policy with its arguments; raises ValueError for an unknown policy or argument."""
        return get_policy(self.policy)(**self._checked_policy_args())

    def _checked_policy_args(self) -> dict[str, Any]:
        known = [argument.name for argument in dataclasses.fields(get_policy(self.policy))]
        for name in self.policy_args:
            if name not in known:
                hint = nearest(name, known) if known else " (it takes none)"
                raise ValueError(f"policy_args: policy {self.policy!r} has no argument {name!r}{hint}")
        return self.policy_args

    @property
    def evicts(self) -> bool:
        """Whether anything is ever evicted under this setting."""
        return not self.make_policy().keeps_everything

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write `eviction_config.json` into `directory` (made if missing); returns its path."""
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")
        return path

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], revision: str | None = None) -> Self:
        """Read `eviction_config.json` from a directory or a Hub repository.

        Raises:
            FileNotFoundError: a local directory without the file.
            ValueError: a file whose settings do not hold.
        """
        directory = Path(name_or_path)
        if directory.is_dir():
            path = directory / CONFIG_NAME
            if not path.is_file():
                raise FileNotFoundError(f"{directory} has no {CONFIG_NAME}: was it written by vkvtrain?")
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME, revision=revision))
        try:
            values = json.loads(path.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
