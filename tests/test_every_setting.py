"""Every setting of a recipe changes something, or is refused: a field that is not listed here fails the test."""

import json
import shutil

import pytest
import torch
import yaml
from chat_templates import chat_tokenizer
from peft import LoraConfig
from recipe_files import values, write
from sweeps import adapter
from test_oracles import candidates

from vkvtrain.generation import Completion
from vkvtrain.policies import POLICIES
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.data import load_data, step_batches
from vkvtrain.training.data.sources import read_records
from vkvtrain.training.loop import train
from vkvtrain.training.models import check_model, load_model, load_tokenizer
from vkvtrain.training.overrides import apply_overrides, load_recipe, setting_names
from vkvtrain.training.settings import DataSettings, Recipe

DISTILL = {"training.objective": "distill"}
JSD = {**DISTILL, "training.divergence": "jsd"}
ON_POLICY = {"training.objective": "on_policy", "training.rollout_tokens": 20}

CHANGES: dict[str, tuple[object, dict]] = {
    "model.dtype": ("bfloat16", {}),
    "data.rows": (5, {}),
    "data.held_out": (1, {}),
    "data.group_by_length": (True, {}),
    "lora.r": (2, {}),
    "lora.alpha": (5, {}),
    "lora.rslora": (True, {}),
    "lora.dora": (True, {}),
    "lora.dropout": (0.5, {}),
    "lora.target_modules": (["q_proj"], {}),
    "lora.modules_to_save": (["norm"], {}),
    "lora.init": ("gaussian", {}),
    "eviction.policy": ("snapkv", {}),
    "eviction.budget": (80, {}),
    "eviction.window": (8, {}),
    "eviction.sinks": (1, {}),
    "eviction.protected_fraction": (0.6, {}),
    "eviction.smooth": (False, {}),
    "eviction.measure": ("l2", {}),
    "eviction.retention": ("top_k", {}),
    "eviction.policy_args": ({"lam": 0.9}, {"eviction.policy": "rkv"}),
    "eviction.protect_prompt": (True, {}),
    "eviction.skip_layers": ([0], {}),
    "eviction.seed": (3, {}),
    "training.objective": ("distill", {}),
    "training.divergence": ("reverse_kl", DISTILL),
    "training.jsd_weight": (0.2, JSD),
    "training.temperature": (2.0, DISTILL),
    "training.top_k": (3, DISTILL),
    "training.ce_weight": (0.1, DISTILL),
    "training.entropy_weight": (1.0, DISTILL),
    "training.rollout_tokens": (12, ON_POLICY),
    "training.rollout_temperature": (9.0, ON_POLICY),
    "training.dense_fraction": (0.5, {}),
    "training.steps": (2, {}),
    "training.global_batch": (1, {}),
    "optim.learning_rate": (1e-2, {}),
    "optim.schedule": ("linear", {}),
    "optim.warmup_steps": (2, {}),
    "optim.weight_decay": (0.5, {}),
    "optim.betas": ([0.1, 0.9], {}),
    "optim.max_grad_norm": (1e-3, {}),
    "log.evaluate_every": (1, {}),
    "log.generate_every": (1, {}),
    "seed": (1, {}),
}  # fmt: skip

"""By setting, another value, and other settings that it needs: the adapter or the log of a short run changes."""

PROBLEM = {"problem": "2+2", "generations": ["5", "4", "four"], "correctness_math_verify": [False, True, True]}
CHAT = {"messages": [
    {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
]}  # fmt: skip
PLAIN = {"prompt": "a", "completion": "b"}
THOUGHT = {"prompt": [{"role": "user", "content": "a"}], "completion": "\n<think>\nx\n</think>\n\nb"}
ROWS: dict[str, tuple[list[dict], dict, object]] = {
    "data.format": ([{**PLAIN, **CHAT}], {"format": "prompt_completion"}, "messages"),
    "data.choose": ([PROBLEM], {}, "first"),
    "data.turns": ([CHAT], {}, "each"),
    "data.system": ([CHAT], {}, "other"),
    "data.instruction": ([PROBLEM], {}, "Think."),
    "data.template_kwargs": ([PROBLEM], {"response": "rendered"}, {"enable_thinking": False}),
    "data.response": ([THOUGHT], {"response": "written"}, "rendered"),
    "data.max_length": ([PLAIN, {**PLAIN, "completion": "bcdef"}], {}, 4),
    "data.seed": ([{**PROBLEM, "generations": list("abcdef"), "correctness_math_verify": [True] * 6}] * 4,
                  {"choose": "random_correct"}, 5),
}  # fmt: skip
"""By setting, records, settings of the data, and another value: the tokenised rows change."""

ELSEWHERE = (
    "model.name", "model.revision", "model.quantization", "model.gradient_checkpointing", "data.source", "data.config",
    "data.split", "data.revision", "data.date", "lora.continue_from", "training.batch_per_device", "checkpoint.every",
    "checkpoint.keep", "log.tracker", "output", "data.packing", "data.packing_length", "log.generate_samples",
)  # fmt: skip
"""Settings with a test of their own below."""

SMALL = {
    "data.rows": 6, "training.steps": 3, "training.global_batch": 2, "optim.warmup_steps": 0, "lora.r": 4,
    "lora.target_modules": ["q_proj", "v_proj"], "log.tracker": "none", "log.evaluate_every": 3,
}  # fmt: skip


def recipe(tmp_path, name="run", **settings):
    """A recipe with settings by dotted name."""
    return Recipe(**apply_overrides(values(tmp_path, output=str(tmp_path / name)), list(settings.items())))


def outcome(tmp_path, name, settings):
    """What a run leaves: its adapter's bytes, and its log without clocks and memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vkvtrain.training.ending.write_report", lambda _: None)  # takes longer than the steps
        train(recipe(tmp_path, name, **{**SMALL, **settings}))
    kept = ("tokens_per_second", "peak_memory_gib")
    rows = [yaml.safe_load(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in row.items() if key not in kept} for row in rows]
    return (tmp_path / name / "adapter_model.safetensors").read_bytes(), log


def test_every_setting_is_listed():
    leaves = [name for name in setting_names() if "." in name or name in ("output", "seed")]
    assert sorted(leaves) == sorted([*CHANGES, *ROWS, *ELSEWHERE])


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The outcome without a change, by the settings that the change needs."""
    done: dict[str, object] = {}
    place = tmp_path_factory.mktemp("before")

    def call(settings):
        key = repr(settings)
        if key not in done:
            done[key] = outcome(place, f"run{len(done)}", settings)
        return done[key]

    return call


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_the_run(tmp_path, before, name):
    value, needs = CHANGES[name]
    assert outcome(tmp_path, "run", {**needs, name: value}) != before(needs)


@pytest.mark.parametrize("name", ROWS)
def test_a_setting_changes_the_rows(tmp_path, name):
    records, given, value = ROWS[name]
    tokenizer = chat_tokenizer("qwen3" if "response" in given else "phi4")
    source = write(tmp_path / "rows.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def rows(**changes):
        settings = DataSettings(**{"source": str(source), "held_out": 0, **given, **changes})
        return [(row.input_ids, row.prompt_length) for row in load_data(settings, tokenizer).train]

    assert rows() == rows()
    assert rows(**{name.partition(".")[2]: value}) != rows()


def test_the_date_is_what_the_template_says(tmp_path):
    tokenizer = chat_tokenizer("phi4")
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.chat_template
    source = write(tmp_path / "rows.jsonl", json.dumps(CHAT) + "\n")
    for day in ("2024-01-02", "2025-03-04"):
        (row,) = load_data(DataSettings(source=str(source), held_out=0, date=day), tokenizer).train
        assert tokenizer.decode(row.input_ids).startswith(day)


def test_what_is_asked_of_a_data_set(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **settings: asked.append((args, settings)) or [PLAIN])
    read_records(DataSettings(source="org/set", config="c", split="s", revision="r", held_out=0))
    assert asked == [(("org/set", "c"), {"split": "s", "revision": "r"})]


def test_what_is_asked_of_a_model(tmp_path, monkeypatch):
    asked = []

    def load_weights(name, where, **settings):
        asked.append((name, settings["revision"], settings["quantization_config"] is None))
        raise InterruptedError

    monkeypatch.setattr("vkvtrain.training.models.load_weights", load_weights)
    for settings in ({"model.name": "a/b"}, {"model.name": "a/b", "model.revision": "r", "model.quantization": "8bit"}):
        with pytest.raises(InterruptedError):
            load_model(recipe(tmp_path, **settings))
    assert asked == [("a/b", None, True), ("a/b", "r", False)]


def test_gradient_checkpointing_is_switched_on(tmp_path):
    layers = [
        any(getattr(module, "gradient_checkpointing", False) for module in load_model(made).modules())
        for made in (recipe(tmp_path), recipe(tmp_path, **{"model.gradient_checkpointing": True}))
    ]
    assert layers == [False, True]


def test_the_device_batch_divides_the_step(tmp_path):
    made = recipe(tmp_path, **SMALL)
    rows = load_data(made.data, load_tokenizer(made)).train
    counts = []
    for size in (1, 2):
        training = made.training.model_copy(update={"batch_per_device": size})
        batches = step_batches(made.model_copy(update={"training": training}), rows, 0, 0, 1, 0, torch.device("cpu"))
        counts.append(len(batches))
    assert counts == [2, 1]


def test_packing_packs_as_long_as_asked(tmp_path):
    made = recipe(tmp_path, **SMALL)
    rows = load_data(made.data, load_tokenizer(made)).train
    widths = []
    for settings in ({}, {"packing": True, "packing_length": 400}, {"packing": True, "packing_length": 172}):
        data = DataSettings(**{**made.data.model_dump(exclude_unset=True), **settings})
        batches = step_batches(made.model_copy(update={"data": data}), rows, 0, 0, 1, 0, torch.device("cpu"))
        widths.append([tuple(batch.input_ids.shape) for batch in batches])
    assert widths == [[(2, 172)], [(1, 344)], [(2, 172)]]


def test_as_many_prompts_are_answered_as_asked(tmp_path, monkeypatch):
    answered = []

    def generate(model, config, requests, **settings):
        answered.append(len(requests))
        return [Completion([0], True, [0.0], 0, 1) for _ in requests]

    for count in (1, 2):
        monkeypatch.setattr("vkvtrain.training.generated.generate", generate)
        outcome(tmp_path, f"run{count}", {"log.generate_every": 3, "log.generate_samples": count})
    assert answered == [1, 2]


def test_checkpoints_and_trackers_are_written_as_asked(tmp_path):
    for name, settings, kept in (
        ("one", {"checkpoint.every": 1, "checkpoint.keep": 1}, ["step-00000002"]),
        ("two", {"checkpoint.every": 1, "checkpoint.keep": 2}, ["step-00000001", "step-00000002"]),
        ("some", {"checkpoint.every": 2, "checkpoint.keep": 2}, ["step-00000002"]),
    ):
        outcome(tmp_path, name, settings)
        assert sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) == kept
    outcome(tmp_path, "tracked", {"log.tracker": "tensorboard"})
    events = [list((tmp_path / name).rglob("events.out.*")) for name in ("one", "tracked")]
    assert not events[0]
    assert events[1]


@pytest.mark.parametrize("place", ["/proc/nothing/run", "{tmp}/file", "{tmp}/file/run", "/dev/null"])
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, place):
    monkeypatch.setattr("vkvtrain.training.loop.load_model", lambda _: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"^output '.*' cannot be written: .*; choose another place$"):
        train(recipe(tmp_path, **{**SMALL, "output": place.format(tmp=tmp_path)}))
    assert (tmp_path / "file").read_text() == "kept"


def test_the_run_itself_does_not_change(tmp_path, before):
    assert outcome(tmp_path, "run", {}) == before({})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"training.divergence": "reverse_kl"}, "divergence"),
        ({"training.ce_weight": 0.0}, "ce_weight"),
        ({"training.top_k": 5}, "top_k"),
        ({"training.temperature": 2.0}, "temperature"),
        ({**DISTILL, "training.jsd_weight": 0.2}, "jsd_weight"),
        ({**DISTILL, "training.rollout_tokens": 5}, "rollout_tokens"),
        ({**DISTILL, "training.rollout_temperature": 0.5}, "rollout_temperature"),
        ({"eviction": {"policy": "full", "budget": 64}}, "budget is without effect under policy 'full'"),
        ({"eviction.policy": "streaming", "eviction.smooth": False}, "smooth"),
        ({"eviction.policy": ["knorm", "h2o"], "eviction.smooth": False}, "knorm, h2o"),
        ({"eviction.policy": "snapkv", "eviction.seed": 3}, "draws nothing"),
        ({"log.generate_samples": 3}, "generate_every is null"),
        ({"log.generate_every": 1, "log.generate_samples": 3}, r"generate_samples \(3\) is more than data.held_out"),
        ({"data.held_out": 0, "log.evaluate_every": 3}, "data.held_out is 0"),
        ({"data.split": "test"}, "is no data set"),
        ({"data.config": "x"}, "is no data set"),
        ({"data.source": "x.jsonl", "data.revision": "x"}, "is no data set"),
        ({"data.seed": 4}, "draws nothing"),
        ({"data.packing_length": 500}, "packing"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_setting_without_effect_is_refused(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        recipe(tmp_path, **settings)


def test_a_setting_with_an_effect_under_one_of_several_policies_is_taken(tmp_path):
    recipe(tmp_path, **{"eviction.policy": ["knorm", "snapkv"], "eviction.smooth": False})
    recipe(tmp_path, **{"eviction.policy": ["knorm", "random"], "eviction.seed": 3})


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            r"target_modules: the model has no module 'v_porj' \(did.*v_proj",
        ),
        ({"target_modules": "q_porj"}, r"lora.target_modules 'q_porj'.*did you mean 'q_proj'"),
        ({"target_modules": ["norm"]}, "RMSNorm.* is not supported"),
        ({"target_modules": []}, "is an empty list"),
        ({"target_modules": ["q_proj", ""]}, "no module ''"),
        ({"target_modules": "((("}, "is no regular expression"),
        ({"target_modules": r".*layers\.9\..*"}, "is the whole name of no module"),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, "'lm_head' is without effect"),
        ({"modules_to_save": ["layers"]}, r"modules_to_save \['layers'\]"),
        ({"modules_to_save": ["lm_haed"]}, r"lora.modules_to_save: the model has no module 'lm_haed' \(did.*lm_head"),
        ({"modules_to_save": ["norm", "nothing"]}, "no module 'nothing'"),
        ({"r": 129}, r"lora.r \(129\) is more than the rank of any weight"),
    ],
)
def test_modules_that_are_not_there_are_named_before_weights_are_read(tmp_path, lora, says):
    base = tmp_path / "base"  # without weights
    shutil.copytree(MODEL_PATH, base, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=says):
        check_model(recipe(tmp_path, **{"model.name": str(base), **{f"lora.{name}": v for name, v in lora.items()}}))


def test_an_adapter_of_another_base_is_not_continued(tmp_path):
    directory = adapter(tmp_path / "adapter")
    check_model(recipe(tmp_path, **{"lora.continue_from": directory}))
    for changed, says in (
        ({"base_model_name_or_path": "acme/other"}, "was trained on 'acme/other', and model.name is"),
        ({"revision": "v2"}, "was trained on revision 'v2'"),
        ({"r": 2}, "has shape"),
        ({"target_modules": ["q_proj", "v_proj"]}, "has no weight"),
        ({"target_modules": ["v_proj"]}, "has no weight"),
        ({"target_modules": ["elsewhere"]}, "does not fit"),
    ):
        shutil.copytree(directory, tmp_path / "changed", dirs_exist_ok=True)
        config = LoraConfig.from_pretrained(directory)
        for name, value in changed.items():
            setattr(config, name, value)
        config.save_pretrained(tmp_path / "changed")
        with pytest.raises(ValueError, match=says):
            check_model(recipe(tmp_path, **{"lora.continue_from": str(tmp_path / "changed")}))


@pytest.mark.parametrize(
    ("name", "value"), [("dropout", 0.1), ("target_modules", ["k_proj"]), ("modules_to_save", ["norm"]), ("alpha", 7)]
)
def test_what_an_adapter_to_continue_from_decides_is_not_set(tmp_path, name, value):
    settings = {"lora.continue_from": adapter(tmp_path / "adapter"), f"lora.{name}": value}
    with pytest.raises(ValueError, match=rf"lora.{name} is .* leave it out"):
        check_model(recipe(tmp_path, **settings))


def test_a_default_that_an_adapter_overrides_is_said(tmp_path):
    settings = {"lora.continue_from": adapter(tmp_path / "adapter"), "lora.r": 16}
    with pytest.warns(UserWarning, match="lora.r is 16, but the adapter .* has 1, which holds"):
        check_model(recipe(tmp_path, **settings))


def test_a_revision_of_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.revision 'main' is of a Hub repository"):
        check_model(recipe(tmp_path, **{"model.revision": "main"}))


def test_a_setting_that_stands_twice_is_refused(tmp_path):
    path = write(tmp_path / "r.yaml", yaml.safe_dump(values(tmp_path)) + "training: {steps: 3}\n")
    with pytest.raises(ValueError, match="'training' is there twice"):
        load_recipe(path)
    path = write(tmp_path / "r.yaml", "training: {steps: 3, steps: 4}\n")
    with pytest.raises(ValueError, match="'steps' is there twice"):
        load_recipe(path)


def test_smoothing_is_declared_where_scores_read_it():
    event = candidates(1, 40, 8, (2, 2))
    for name, policy in POLICIES.items():
        if not policy.keeps_everything:
            smoothed, raw = (policy().score(event, smooth) for smooth in (True, False))
            assert policy.smooths == (not torch.equal(smoothed, raw)), name
