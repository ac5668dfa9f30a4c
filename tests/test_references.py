"""The policies against published code: kept sets that it kept, recorded by `record_references.py`, on the same inputs.

The settings that stand for each reference are in `references.py`. Nothing is fetched here.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from references import BUDGET, FIXTURE, QUARTER, REFERENCES, SEEDS, Inputs, Reference
from torch import Tensor

from vkvtrain import EvictionConfig
from vkvtrain.lifetimes import lifetimes, make_schedule
from vkvtrain.logits import LogitForm
from vkvtrain.noise import NoiseSource
from vkvtrain.policies import POLICIES, Candidates, window_attention
from vkvtrain.policies.redundancy import redundancy
from vkvtrain.selection import Selector

RECORDED = json.loads(FIXTURE.read_text())
EVENTS = [name for name in REFERENCES if name not in ("h2o", "snapkv")]
"""References that evict at one event from what ours is given too."""
WITHOUT_PUBLIC_CODE = {
    "caote": "no repository is named by its paper, none is known",
    "nexus": "the repository that its draft names holds the draft, not the code",
    "random": "Random Attention: uniform, see test_selection.py",
    "value_l2": "VaSE's l2 as a score: its measure is checked, see vase/l2_sink_sample_attn",
    "value_var": "VaSE's variance as a score: its measure is checked, see vase/var_sink_sample_attn",
    "full": "keeps everything",
}


@dataclass(frozen=True)
class RecordedNoise(NoiseSource):
    """The numbers that the reference drew."""

    inputs: Inputs

    def gumbel(self, positions: Tensor) -> Tensor:
        return self.inputs.gumbel.double()

    def uniform(self, positions: Tensor) -> Tensor:
        return self.inputs.uniform.double()

    def projection(self, dim: int, rank: int, per_event: bool) -> Tensor:
        return self.inputs.gaussian / rank**0.5


def config_of(setting: dict[str, Any], window: int) -> EvictionConfig:
    return EvictionConfig(**setting, budget=BUDGET, window=window)


def candidates(inputs: Inputs, attention: Tensor | None = None) -> Candidates:
    window = inputs.queries.shape[2]
    count = inputs.keys.shape[2] - window
    nothing = torch.zeros(1, dtype=torch.int64)
    return Candidates(
        positions=torch.arange(count).expand(1, inputs.keys.shape[1], -1),
        queries=inputs.queries, keys=inputs.keys[:, :, :count], values=inputs.values[:, :, :count],
        scaling=inputs.keys.shape[-1] ** -0.5, noise=RecordedNoise((nothing, nothing), nothing, 0, inputs),
        window_keys=inputs.keys[:, :, count:], attention=attention,
    )  # fmt: skip


def kept(config: EvictionConfig, found: Candidates) -> list[list[int]]:
    return Selector(config)(found, [1])[0].tolist()


def sets_of(setting: dict[str, Any], reference: Reference) -> list[list[list[int]]]:
    """What a setting of ours keeps on the inputs of a reference, of each seed and KV head."""
    sets = [kept(config_of(setting, reference.window), candidates(reference.inputs(seed))) for seed in SEEDS]
    if reference.setting["policy"] != "tova":
        return sets
    return [[[*slots, reference.held - 1] for slots in one] for one in sets]  # TOVA's window is no exception of its own


def test_every_reference_is_recorded_at_its_commit():
    assert {name: (one["repository"], one["commit"], one["function"]) for name, one in RECORDED.items()} == {
        name: (one.repository, one.commit, one.function) for name, one in REFERENCES.items()
    }
    assert all(len(one["kept"]) == len(SEEDS) for one in RECORDED.values())


def test_every_policy_has_a_reference_or_a_reason():
    checked = {reference.setting["policy"] for reference in REFERENCES.values()}
    assert checked.isdisjoint(WITHOUT_PUBLIC_CODE)
    assert checked | set(WITHOUT_PUBLIC_CODE) == set(POLICIES)


@pytest.mark.parametrize("name", EVENTS)
def test_ours_keeps_what_the_reference_kept(name):
    """All 24 sets (twelve inputs, two KV heads)."""
    assert sets_of(REFERENCES[name].setting, REFERENCES[name]) == RECORDED[name]["kept"]


@pytest.mark.parametrize("name", EVENTS)
def test_no_other_setting_keeps_what_the_reference_kept(name):
    """Not vacuous: the setting of every other reference differs somewhere (curdkv and vase_dkv do not, given one G)."""
    leverage = {"curdkv", "vase_dkv"}
    for other in EVENTS:
        settings = REFERENCES[name].setting, REFERENCES[other].setting
        same = settings[0] == settings[1] or {setting["policy"] for setting in settings} <= leverage
        assert (sets_of(settings[1], REFERENCES[name]) == RECORDED[name]["kept"]) == same, other


@pytest.mark.parametrize("name", [name for name, one in RECORDED.items() if "weights" in one])
def test_weights_of_sampling(name):
    """What VaSE samples by: the window attention, zero for what is protected."""
    reference = REFERENCES[name]
    for seed, expected in zip(SEEDS, RECORDED[name]["weights"], strict=True):
        found = candidates(reference.inputs(seed))
        weights, expected = window_attention(found, smooth=True)[0], torch.tensor(expected)
        protected = expected == 0
        assert protected.sum(-1).tolist() == [0 if name == "vase/attn_sample" else 8] * 2
        assert torch.allclose(weights[~protected], expected[~protected], rtol=1e-4)


def test_snapkv_differs_by_its_softmax_alone():
    """SnapKV's own code compresses a prompt: its softmax runs over the window's own keys too, causally, and a query
    head is compressed by itself. With attention weights of that form, ours keeps what it keeps; in decode form, not."""
    reference = REFERENCES["snapkv"]
    config, decode_form = config_of(reference.setting, reference.window), 0
    for seed, expected in zip(SEEDS, RECORDED["snapkv"]["kept"], strict=True):
        inputs = reference.inputs(seed)
        found = candidates(inputs)
        logits = inputs.queries @ inputs.keys.mT * found.scaling
        window, held = logits.shape[-2:]
        later = torch.ones(window, held, dtype=torch.bool).triu(held - window + 1)
        prompt_form = logits.masked_fill(later, -torch.inf).softmax(-1)[..., : held - window].mean(2)
        assert kept(config, candidates(inputs, prompt_form)) == expected
        decode_form += kept(config, found) == expected
    assert decode_form < len(SEEDS)


def test_h2o_over_a_whole_sequence():
    """Evicted token by token after a prompt, as a window of one does, the attention of every query accumulated."""
    reference = REFERENCES["h2o"]
    for seed, expected in zip(SEEDS, RECORDED["h2o"]["kept"], strict=True):
        inputs = reference.inputs(seed)
        config = config_of(reference.setting, 1)
        schedule = make_schedule(config, [BUDGET // 2], [0], [reference.held], reference.held, torch.device("cpu"))
        form = LogitForm(inputs.keys.shape[-1] ** -0.5)
        evict_at = lifetimes(inputs.queries, inputs.keys, inputs.values, schedule, Selector(config), 0, form)
        assert [(head > reference.held).nonzero().flatten().tolist() for head in evict_at[0]] == expected


def test_rkv_vase_measured_among_all_keys_would_differ():
    """What VaSE's code leaves out, the window's keys, decides most of its sets."""
    reference, equal = REFERENCES["vase/attn_rkv"], 0
    for seed, expected in zip(SEEDS, RECORDED["vase/attn_rkv"]["kept"], strict=True):
        found = candidates(reference.inputs(seed))
        among_all = redundancy(found.all_keys(), None)[..., : found.positions.shape[-1]]
        score = 0.5 * window_attention(found, smooth=True) - 0.5 * among_all
        equal += score.topk(BUDGET - reference.window).indices.sort(-1).values[0].tolist() == expected
    assert equal < len(SEEDS) / 2


def test_protection_is_what_vase_protects():
    """Its range_sink_sample_attn counts four sinks among `n_large`; without sinks, all of them are large values."""
    assert config_of({}, 8).large_values == 4
    assert config_of({**QUARTER, "sinks": 0}, 8).large_values == 8
