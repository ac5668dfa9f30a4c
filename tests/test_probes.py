"""The probe script's pieces, on numbers with known answers and on tiny models."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from passes import tiny_model

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.policies import POLICIES

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "probe_pretrained.py"


@pytest.fixture(scope="module")
def probe():
    spec = importlib.util.spec_from_file_location("probe_pretrained", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["probe_pretrained"] = module
    spec.loader.exec_module(module)
    return module


def test_every_policy_is_probed(probe):
    assert {setting.fields["policy"] for setting in probe.settings_to_probe()} == set(POLICIES) - {"full"}


def test_cells_are_measured_once_and_only_under_the_same_settings(probe, tmp_path):
    cells = probe.Cells(tmp_path / "cells.jsonl", {"model": "a"})
    assert cells.measure("x", lambda: [1.5]) == [1.5]
    again = probe.Cells(tmp_path / "cells.jsonl", {"model": "a"})
    assert again.measure("x", lambda: pytest.fail("measured again")) == [1.5]
    with pytest.raises(SystemExit, match="other settings"):
        probe.Cells(tmp_path / "cells.jsonl", {"model": "b"})


def test_blocks_are_means_of_consecutive_tokens(probe):
    losses = torch.arange(600.0).view(2, 300)
    blocks = probe.blocks_of(losses, 100)
    assert blocks == [losses[row, start:end].mean() for row in (0, 1) for start, end in ((100, 228), (228, 300))]


def test_losses_are_those_of_decoding(probe):
    model = tiny_model(vocab=40)
    config = EvictionConfig(policy="vase_attnv", budget=24, window=8, sinks=2)
    ids = torch.randint(1, 40, (1, 60), generator=torch.Generator().manual_seed(0))
    cache = EvictionCache(config, model.config)
    pieces = [(0, probe.PROMPT), *((i, i + 1) for i in range(probe.PROMPT, 60))]
    with torch.no_grad():
        logits = torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pieces], 1)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    assert (probe.token_losses(model, ids, config)[0] - expected).abs().max() < 1e-9


def test_value_ranges_of_a_known_layer(probe):
    model = tiny_model(vocab=40, layers=1)
    ids = torch.randint(1, 40, (2, 50), generator=torch.Generator().manual_seed(0))
    (row,) = probe.value_ranges(model, ids)
    values = torch.cat([model(one[None]).past_key_values.layers[0].values for one in ids])
    ranges = (values.max(-1).values - values.min(-1).values).flatten()
    assert row["median"] == pytest.approx(ranges.median().item())
    assert row["max_over_median"] == pytest.approx((ranges.max() / ranges.median()).item())
    assert json.dumps(row)
