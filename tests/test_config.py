"""The eviction setting: defaults, errors that name the setting and the fix, and its JSON round trip."""

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
        protect_prompt=True, skip_layers=(0, 3), seed=5,
    )  # fmt: skip
    path = config.save_pretrained(tmp_path / "deep" / "er")
    assert path.name == "eviction_config.json"
    assert EvictionConfig.from_pretrained(path.parent) == config


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
