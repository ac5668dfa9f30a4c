"""The eviction setting: defaults, errors that name the setting and the fix, and its JSON round trip."""

import json

import pytest

from vkvtrain import EvictionConfig

BAD = {
    "no budget": ({}, ["budget is required", "vase_attnv", "multiple of window (64)"]),
    "budget not above window": ({"budget": 64}, ["budget (64) must be greater than window (64)", "raise budget"]),
    "budget no multiple": ({"budget": 200}, ["multiple of window (64)", "192 or 256"]),
    "budget just above": ({"budget": 100}, ["use 128"]),
    "too many sinks": ({"budget": 128, "sinks": 64}, ["sinks (64)", "less than budget - window (64)", "lower sinks"]),
    "negative sinks": ({"budget": 128, "sinks": -1}, ["'sinks'", "greater than or equal to 0", "-1"]),
    "no window": ({"budget": 128, "window": 0}, ["'window'", "greater than or equal to 1"]),
    "unknown policy": ({"budget": 128, "policy": "vase_attn"}, ["'vase_attn'", "did you mean 'vase_attnv'"]),
    "no such policy": ({"budget": 128, "policy": "xyzzy"}, ["'xyzzy'", "snapkv", "streaming"]),
    "unknown setting": ({"budgets": 128}, ["unknown setting 'budgets'", "did you mean 'budget'"]),
    "unknown argument": (
        {"budget": 128, "policy": "vase_dkv", "policy_args": {"rnk": 3}},
        ["policy 'vase_dkv' has no argument 'rnk'", "did you mean 'rank'"],
    ),
    "argument of a policy without": (
        {"budget": 128, "policy": "snapkv", "policy_args": {"rank": 3}},
        ["no argument 'rank'", "takes none"],
    ),
    "bad rank": ({"budget": 128, "policy": "curdkv", "policy_args": {"rank": 0}}, ["rank must be a positive int"]),
    "measure": ({"budget": 128, "measure": "L2"}, ["'measure'", "'range', 'variance', 'l2' or 'random'", "'L2'"]),
    "retention": ({"budget": 128, "retention": "top"}, ["'retention'", "'sampled' or 'top_k'", "'top'"]),
    "measure of nothing": (
        {"budget": 128, "policy": "snapkv", "measure": "l2"},
        ["measure 'l2': policy 'snapkv' protects no large values", "= 0", "sinks (4)", "raise protected_fraction"],
    ),
    "measure of sinks only": (
        {"budget": 128, "measure": "random", "sinks": 40},
        ["measure 'random'", "= 32", "not more than sinks (40)"],
    ),
    "sampled without weights": (
        {"budget": 128, "policy": "rkv", "retention": "sampled"},
        ["policy 'rkv' are no weights", "snapkv", "h2o"],
    ),
    "streaming sampled": (
        {"budget": 128, "policy": "streaming", "retention": "sampled"},
        ["'streaming'", "no weights"],
    ),
    "highest of equal weights": (
        {"budget": 128, "policy": "random", "retention": "top_k"},
        ["weights of policy 'random' are all equal"],
    ),
    "fraction": ({"budget": 128, "protected_fraction": 1.5}, ["'protected_fraction'", "less than or equal to 1"]),
    "type": ({"budget": "many"}, ["'budget'", "integer", "'many'"]),
    "layer": ({"budget": 128, "skip_layers": (-1,)}, ["skip_layers", "from 0"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_sentence(name):
    values, expected = BAD[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is looked at below
        EvictionConfig(**values)
    text = str(caught.value)
    assert "\n" not in text
    for part in expected:
        assert part in text


def test_defaults():
    config = EvictionConfig(budget=2048)
    assert config.model_dump() == {
        "policy": "vase_attnv",
        "budget": 2048,
        "window": 64,
        "sinks": 4,
        "protected_fraction": None,
        "measure": "range",
        "retention": None,
        "smooth": True,
        "policy_args": {},
        "protect_prompt": False,
        "skip_layers": (),
        "seed": 0,
    }
    assert config.evicts
    assert not EvictionConfig(policy="full").evicts


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        EvictionConfig(budget=128).budget = 64  # type: ignore[misc]


def test_round_trip(tmp_path):
    config = EvictionConfig(
        policy="vase_dkv", budget=96, window=32, sinks=2, protected_fraction=0.1, smooth=False, policy_args={"rank": 8},
        protect_prompt=True, skip_layers=(0, 3), seed=5, measure="variance", retention="sampled",
    )  # fmt: skip
    path = config.save_pretrained(tmp_path / "deep" / "er")
    assert path.name == "eviction_config.json"
    assert EvictionConfig.from_pretrained(path.parent) == config


def test_a_file_without_the_newer_settings_means_what_it_meant(tmp_path):
    config = EvictionConfig(budget=128)
    older = {name: value for name, value in config.model_dump().items() if name not in ("measure", "retention")}
    (tmp_path / "eviction_config.json").write_text(json.dumps(older))
    assert EvictionConfig.from_pretrained(tmp_path) == config
    assert (config.measure, config.samples, config.large_values) == ("range", True, 28)


def test_whether_the_seed_decides_anything():
    def draws(**settings):
        return EvictionConfig(**{"budget": 128, **settings}).draws

    assert draws()
    assert not draws(retention="top_k")
    assert draws(retention="top_k", measure="random")
    assert not draws(policy="snapkv")
    assert draws(policy="snapkv", retention="sampled")
    assert not draws(policy="snapkv", protected_fraction=0.5, measure="l2")
    assert draws(policy="streaming", protected_fraction=0.5, measure="random")
    assert not draws(policy="full")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no eviction_config\.json"):
        EvictionConfig.from_pretrained(tmp_path)
    file = tmp_path / "eviction_config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        EvictionConfig.from_pretrained(tmp_path)
    file.write_text('{"budget": 100, "window": 64}')
    with pytest.raises(ValueError, match="multiple of window"):
        EvictionConfig.from_pretrained(tmp_path)
