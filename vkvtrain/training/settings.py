"""The recipe: every setting of a training run, validated before anything is loaded.

A recipe is a YAML file with the sections below; `base: other.yaml` (relative to the file) takes that recipe and changes
only what is written. Knows nothing of models, data or devices.
"""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from vkvtrain.chat_templates import check_text_booleans
from vkvtrain.config import EvictionConfig, Settings
from vkvtrain.training.budgets import BudgetSchedule, budget_schedule
from vkvtrain.yaml_files import read_mapping

REWRITES_BASE = ("pissa", "olora")
"""How the names of initialisations begin that move part of the base weights into the adapter."""


def refuse_without_effect(settings: Settings, names: Sequence[str], why: str) -> None:
    """Raise ValueError if one of the settings that are without effect, as `why` says, is not left at its default."""
    for name in names:
        default = type(settings).model_fields[name].get_default(call_default_factory=True)
        if getattr(settings, name) != default:
            value = getattr(settings, name)
            raise ValueError(
                f"{name} ({value!r}) is without effect, as {why}: leave it out (its default is {default!r})"
            )


class ModelSettings(Settings):
    name: str
    """Directory or Hub name of the base model; `tiny` is the embedded one."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base weights; the adapter is trained in float32 whatever it is."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Base weights in 4-bit NormalFloat (QLoRA, Dettmers et al. 2023) or 8-bit integers; needs bitsandbytes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


DataFormat = Literal["prompt_completion", "messages", "conversations", "problem_generations"]


class DataSettings(Settings):
    source: str
    """A JSONL or Parquet file, a data set on the Hub (`org/name`), a directory that `datasets` loads, or generated:
    `tiny:keyed_sum`, or `ledger:people=4,events=6` (`vkvtrain/ledger.py`)."""
    config: str | None = None
    """Configuration of a data set on the Hub."""
    split: str = "train"
    """Split of a data set on the Hub or in a directory."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    format: Literal["auto"] | DataFormat = "auto"
    """How a row states prompt and response; `auto` tells it by the columns."""
    choose: Literal["first_correct", "random_correct", "all_correct", "first"] = "first_correct"
    """Which generations of a problem are trained on; correct is what `correctness_math_verify` says."""
    turns: Literal["last", "each"] = "last"
    """Responses of a conversation that are trained on; `each` makes a row of every assistant turn."""
    system: str | None = None
    """System prompt in place of the data's own; an empty text removes it."""
    instruction: str = ""
    """Said after a problem in the user's message, of `problem_generations`."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, for example `{enable_thinking: true}`."""
    date: datetime.date | None = None
    """The day that the chat template takes for today, if it writes one: by default the day that the run begins."""
    response: Literal["checked", "written", "rendered"] = "checked"
    """What the model writes behind its generation prompt: the completion as `written` (without a tag that the prompt
    opened already), what the chat template has `rendered`, or `checked`: an error unless the two are the same."""
    rows: int | None = Field(default=None, ge=1)
    """Rows of the source to train on, the first ones; all by default. Required for generated data."""
    held_out: int = Field(default=32, ge=0)
    """Rows for the loss that is printed during training: the last ones of a source, or the validation split."""
    max_length: int | None = Field(default=None, ge=2)
    """Longer rows (tokens, prompt and response) are left out and counted; nothing is truncated."""
    group_by_length: bool = False
    """Steps of rows of similar length: less padding, but short steps may never reach the budget."""
    packing: bool = False
    """Pack several rows into each sequence of a forward pass; they never see each other, and each is evicted alone."""
    packing_length: int | None = Field(default=None, ge=2)
    """Tokens of a packed sequence; the longest row's by default."""
    seed: int = 0
    """Seed of `random_correct`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_text_booleans(self.template_kwargs, "template_kwargs")
        if self.packing_length is not None and not self.packing:
            raise ValueError(f"packing_length ({self.packing_length}) is set without packing: set packing to true")
        if self.source.startswith("tiny:") or Path(self.source).suffix in (".jsonl", ".json", ".parquet"):
            refuse_without_effect(self, ("config", "split", "revision"), f"source {self.source!r} is no data set")
        if self.choose != "random_correct":
            refuse_without_effect(self, ("seed",), f"choose {self.choose!r} draws nothing")
        return self


class LoraSettings(Settings):
    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: int = Field(default=32, ge=1)
    """Scale: the update is multiplied by alpha / r (by alpha / sqrt(r) with `rslora`)."""
    rslora: bool = False
    """Rank-stabilised scale (Kalajdzievski 2023): what suits one rank suits a larger one."""
    dora: bool = False
    """Train the magnitude of each weight column apart from its direction (Liu et al. 2024); slower."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter, as peft names them."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole and stored with the adapter, for example `[lm_head]`."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """Initialisation; `pissa` and `olora` rewrite the base weights, which rules out `distill`."""
    continue_from: str | None = None
    """Directory or Hub name of an adapter to train on from; its own rank, targets and kind hold."""

    @property
    def rewrites_base(self) -> bool:
        """Whether the initialisation changes the base weights, so that disabling the adapter gives another model."""
        return self.init.startswith(REWRITES_BASE)


class TrainingSettings(Settings):
    objective: Literal["sft", "distill", "on_policy"] = "sft"
    """`sft`: cross-entropy. `distill`: a divergence to the teacher, which is the base model with the full cache, and
    cross-entropy. `on_policy`: the divergence on what the model itself generates with the evicting cache."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """With p the teacher and q the student: KL(p || q), KL(q || p), or the generalised Jensen-Shannon divergence."""
    jsd_weight: float = Field(default=0.5, gt=0, lt=1)
    """Weight w of `jsd`: w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both logits in the divergence, which is multiplied by its square to keep the gradient's size."""
    top_k: int | None = Field(default=None, ge=1)
    """Outcomes of the teacher that the divergence tells apart; all others count as one. null: all."""
    ce_weight: float | None = Field(default=None, ge=0)
    """Weight of the cross-entropy beside the divergence: by default 1 in `distill`, and none `on_policy`."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Tokens weigh 1 + this times the teacher's entropy in nats: more where the teacher sees several ways to go on."""
    rollout_tokens: int | None = Field(default=None, ge=1)
    """Most tokens that a response generated `on_policy` has; required there."""
    rollout_temperature: float = Field(default=1.0, ge=0)
    """Temperature of the tokens that are generated `on_policy`; 0 is greedy."""
    dense_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps without eviction; 1 trains the dense control."""
    steps: int = Field(ge=1)
    """Optimiser steps."""
    global_batch: int = Field(default=16, ge=1)
    """Sequences of one optimiser step over all devices and accumulation: it does not change with the process count."""
    batch_per_device: int = Field(default=16, ge=1)
    """Most sequences of one forward pass on one device; the rest of the global batch is accumulated."""

    @property
    def has_teacher(self) -> bool:
        """Whether the loss needs the base model's logits."""
        return self.objective != "sft"

    @property
    def cross_entropy_weight(self) -> float:
        """`ce_weight`, or what it is by default."""
        return (1.0 if self.objective == "distill" else 0.0) if self.ce_weight is None else self.ce_weight

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.objective == "sft" and self.entropy_weight:
            raise ValueError("entropy_weight weighs by the teacher's entropy, and sft has no teacher: use distill")
        if self.objective == "sft":
            of_teacher = ("divergence", "jsd_weight", "temperature", "top_k", "ce_weight")
            refuse_without_effect(self, of_teacher, "objective 'sft' has no divergence to a teacher")
        if self.divergence != "jsd":
            refuse_without_effect(self, ("jsd_weight",), f"divergence is {self.divergence!r} and not 'jsd'")
        if self.objective != "on_policy":
            generated = ("rollout_tokens", "rollout_temperature")
            refuse_without_effect(self, generated, f"objective {self.objective!r} generates nothing")
        if self.objective == "on_policy" and self.rollout_tokens is None:
            raise ValueError("rollout_tokens is required on_policy: say how long a generated response may be")
        if self.objective == "on_policy" and self.ce_weight:
            raise ValueError(
                "ce_weight: on_policy has no cross-entropy, its tokens are the model's own: leave ce_weight out"
            )
        return self


class OptimSettings(Settings):
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine and linear end at zero."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapter."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates, each from 0 to below 1."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"AdamW's decay rates are from 0 to below 1, got {list(value)}")
        return value


class CheckpointSettings(Settings):
    every: int = Field(default=100, ge=1)
    """Steps between two checkpoints; one is also written on SIGTERM and on Ctrl-C."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


Tracker = Literal[
    "auto", "none", "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"
]


_SAMPLES = 16


class LogSettings(Settings):
    evaluate_every: int = Field(default=100, ge=1)
    """Steps between two evaluations of the loss on the held-out rows, with the full cache and evicted."""
    generate_every: int | None = Field(default=None, ge=1)
    """Steps between two generations of held-out responses with the evicting cache; null: none."""
    generate_samples: int = Field(default=_SAMPLES, ge=1)
    """Held-out prompts that are answered then, greedily."""
    tracker: Tracker = "auto"
    """An accelerate tracker beside `metrics.jsonl`; `auto` is TensorBoard where it is installed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generate_every is None:
            refuse_without_effect(self, ("generate_samples",), "generate_every is null")
        return self


class Recipe(Settings):
    """Everything that decides a training run.

    Raises:
        ValueError: one sentence that names the setting and the fix.
    """

    model: ModelSettings
    data: DataSettings
    lora: LoraSettings = Field(default_factory=LoraSettings)
    eviction: dict[str, Any] | None = None
    """Fields of `EvictionConfig`. `policy` may be a list, from which every step draws one; `budget` a list,
    `{low: ..., high: ...}` (any multiple of the window between) or `{from: ..., to: ...}` (moves over the steps).
    null: no eviction."""
    training: TrainingSettings
    optim: OptimSettings = Field(default_factory=OptimSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    output: Path
    """Directory to write."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the adapter's initial weights, the data order and the schedule (the policy's is `eviction.seed`)."""
    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What was left out or shortened beside what the command line asked for; said before training."""
        return list(self._notes)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self._check_eviction(self.eviction_configs())
        except ValueError as error:
            raise ValueError(f"eviction: {error}") from None
        if self.training.has_teacher and self.lora.rewrites_base:
            raise ValueError(
                f"lora.init {self.lora.init!r} rewrites the base weights, so the model without its adapter is no "
                "teacher: use 'default' or 'gaussian', or objective 'sft'"
            )
        if self.training.objective == "on_policy" and self.lora.dropout:
            raise ValueError(
                f"lora.dropout ({self.lora.dropout}) would make training see another model than the one that generated "
                "its tokens: set it to 0 for objective 'on_policy'"
            )
        if self.training.objective == "on_policy" and self.data.packing:
            raise ValueError("data.packing packs rows whose length is known: set it to false for objective 'on_policy'")
        if self.log.generate_every is not None and not self.data.held_out:
            raise ValueError("log.generate_every needs held-out rows: raise data.held_out, or leave it out")
        samples = self.log.generate_samples
        if self.log.generate_every is not None and samples > self.data.held_out and samples != _SAMPLES:
            raise ValueError(
                f"log.generate_samples ({samples}) is more than data.held_out ({self.data.held_out}): lower it, or "
                "hold out more"
            )
        if not self.data.held_out:
            refuse_without_effect(self.log, ("evaluate_every",), "data.held_out is 0")
        if self.optim.warmup_steps > self.training.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is more than training.steps ({self.training.steps}): "
                "lower it or train longer"
            )
        return self

    def _check_eviction(self, configs: Sequence[EvictionConfig]) -> None:
        """Raise ValueError for eviction settings that change nothing under any of the policies."""
        given = {name: value for name, value in (self.eviction or {}).items() if name != "policy"}
        if self.eviction is not None and not configs and given:
            raise ValueError(f"{next(iter(given))} is without effect under policy 'full': write eviction: null")
        policies = [config.make_policy() for config in configs]
        names = ", ".join(dict.fromkeys(config.policy for config in configs))
        if configs and not configs[0].smooth and not any(policy.smooths for policy in policies):
            raise ValueError(f"smooth (False) is without effect, as {names} reads no window attention: leave it out")
        if configs and configs[0].seed and not any(config.draws for config in configs):
            raise ValueError(f"seed ({configs[0].seed}) is without effect, as {names} draws nothing: leave it out")

    def policies(self) -> list[Any]:
        """The policies that steps draw from."""
        policy = (self.eviction or {}).get("policy", EvictionConfig.model_fields["policy"].default)
        if policy == []:
            raise ValueError("policy is an empty list: give at least one name")
        return policy if isinstance(policy, list) else [policy]

    def budgets(self) -> BudgetSchedule:
        """The budgets that steps have."""
        window = (self.eviction or {}).get("window", EvictionConfig.model_fields["window"].default)
        return budget_schedule((self.eviction or {}).get("budget"), window)

    def eviction_configs(self) -> list[EvictionConfig]:
        """The settings that the run is judged at, in the order of the recipe; empty without eviction.

        Each policy at each listed budget, at both ends of a range, or at the last and the first of an annealed one.
        """
        if self.eviction is None:
            return []
        configs = [
            EvictionConfig(**{**self.eviction, "policy": policy, "budget": budget})
            for policy in self.policies()
            for budget in self.budgets().ends()
        ]
        if len({config.evicts for config in configs}) > 1:
            raise ValueError("policy 'full' evicts nothing: take it out of the list and set training.dense_fraction")
        return configs if configs[0].evicts else []

    def trained_for(self) -> EvictionConfig:
        """What the adapter was foremost trained for; `full` where no step evicts."""
        configs = self.eviction_configs()
        return configs[0] if configs and self.training.dense_fraction < 1 else EvictionConfig(policy="full")


def recipe_values(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe file as nested values, on top of the recipe that `base` names.

    Raises:
        ValueError: a missing file, or one that is no YAML mapping.
    """
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ValueError(f"{path}: base recipes form a circle")
    if not path.is_file():
        raise ValueError(f"there is no recipe {str(path)!r}: give the path of a YAML file")
    values = read_mapping(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must be the path of another recipe, got {base!r}")
    merged = _read(path.parent / base, (*above, path.resolve()))
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged
