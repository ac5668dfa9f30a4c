"""Entries that are equal: which of them is kept is decided by position in both passes, never by rounding."""

import pytest
import torch
from passes import decode, replayed, rows_of, sets_equal, simulate, tiny_model

from vkvtrain import EvictionConfig
from vkvtrain.policies import POLICIES

EVICTING = [name for name, policy in POLICIES.items() if not policy.keeps_everything]
ROWS = {"one token": [5] * 60, "two alternating": [5, 9] * 30, "three in turn": [5, 9, 2] * 20}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("policy", EVICTING)
def test_repeated_tokens(policy, row, dtype):
    """End to end: prefill, simulation and decoding round equal tokens in different ways."""
    model = tiny_model(dtype=dtype)
    config = EvictionConfig(policy=policy, budget=16, window=4, sinks=2)
    simulated, evict_at = simulate(model, config, [row], [6], [0])
    decoded, held, _ = decode(model, config, [row], [6], [0])
    assert sets_equal(evict_at, held) == (44, 44)
    assert (simulated[0] - decoded[0]).abs().max() < (1e-9 if dtype == torch.float64 else 1e-4)


def first_repeated(tensor):
    return tensor[:, :, :1].expand_as(tensor).contiguous()


def two_in_turn(tensor):
    return tensor[:, :, torch.arange(tensor.shape[2]) % 2]


EDITS = {
    "equal keys": (first_repeated, ["key"]),
    "equal values": (first_repeated, ["value"]),
    "equal keys and values": (first_repeated, ["key", "value"]),
    "all equal": (first_repeated, ["query", "key", "value"]),
    "two entries in turn": (two_in_turn, ["query", "key", "value"]),
    "values of zero": (torch.zeros_like, ["value"]),
    "keys of zero": (torch.zeros_like, ["key"]),
}
"""Without RoPE whole entries can be equal, not only values."""


@pytest.mark.parametrize(("dtype", "smooth"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("policy", EVICTING)
def test_equal_entries(policy, dtype, smooth):
    model = tiny_model(dtype=dtype, vocab=6, layers=1)
    config = EvictionConfig(policy=policy, budget=16, window=4, sinks=2, smooth=smooth)
    for name, (edit, edited) in EDITS.items():
        events = 0
        for walked, held in replayed(model, config, rows_of([5], steps=40, vocab=6), [5], edit, edited):
            assert walked == held, name
            events += len(held[0]) == 16
        assert events > 6


@pytest.mark.parametrize("smooth", [True, False])
def test_the_newest_of_equal_values_are_kept_by_caote(smooth):
    """No entry changes the output where all values are equal."""
    model = tiny_model(dtype=torch.float32, vocab=6)
    config = EvictionConfig(policy="caote", budget=16, window=4, sinks=2, smooth=smooth)
    rows = rows_of([5], steps=50, vocab=6)
    *_, (walked, _) = replayed(model, config, rows, [5], first_repeated, ["value"])
    assert all(head == [0, 1, *range(len(rows[0]) - len(head) + 2, len(rows[0]))] for head in walked)


@pytest.mark.parametrize("retention", ["sampled", "top_k"])
@pytest.mark.parametrize("measure", ["range", "variance", "l2", "random"])
@pytest.mark.parametrize("policy", ["vase_attnv", "h2o", "value_l2", "nexus"])
def test_measures_and_retentions_in_both_passes(policy, measure, retention):
    """Few distinct tokens: sizes of values tie everywhere, from prefill products and from one-token products."""
    config = EvictionConfig(
        policy=policy, budget=24, window=8, sinks=2, protected_fraction=0.4, measure=measure, retention=retention
    )
    for dtype in (torch.float64, torch.float32):
        model = tiny_model(dtype=dtype)
        rows = rows_of([5, 40], steps=40)
        _, evict_at = simulate(model, config, rows, [5, 40], [3, (4, 1)])
        _, held, _ = decode(model, config, rows, [5, 40], [3, (4, 1)])
        equal, compared = sets_equal(evict_at, held)
        assert equal == compared > 20
