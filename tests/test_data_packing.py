"""Packed training: bins, positions and documents; a packed step is the unpacked one, to rounding in float64."""

import json
import random

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vkvtrain.tiny import MODEL_PATH
from vkvtrain.training.data import Row, collate, collate_packed, load_data, pack, step_batches
from vkvtrain.training.loop import train_step
from vkvtrain.training.models import load_model
from vkvtrain.training.objectives import ModelWithLoss
from vkvtrain.training.run import Run
from vkvtrain.training.settings import DataSettings, Recipe
from vkvtrain.training.watch import Watch

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=24), st.integers(1, 4))
def test_bins_hold_every_document_once_and_fit(lengths, multiple):
    lengths = sorted((lengths * multiple)[: len(lengths) // multiple * multiple or multiple], reverse=True)
    bins = pack(lengths, 30, multiple)
    assert sorted(document for one in bins for document in one) == list(range(len(lengths)))
    tokens = [sum(lengths[document] for document in one) for one in bins]
    assert max(tokens) <= 30
    assert tokens == sorted(tokens, reverse=True)
    assert len(bins) % multiple == 0
    if multiple == 1:  # first fit leaves no two bins that would go into one
        assert all(tokens[i] + tokens[j] > 30 for i in range(len(bins)) for j in range(i))
        assert len(bins) <= -(-11 * -(-sum(lengths) // 30) // 9) * 2


def test_bins_by_hand():
    assert pack([7, 5, 4, 3, 1], 10) == [[0, 3], [1, 2, 4]]
    assert pack([7, 5, 4, 3, 1], 7) == [[0], [2, 3], [1, 4]]
    assert pack([3, 3, 3, 3], 12, 2) == [[0, 2], [1, 3]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7), st.randoms())
def test_packed_rows_against_their_documents(lengths, shuffler):
    rows = [
        Row(5 * i, [100 * i + 1 + k for k in range(prompt + response)], prompt)
        for i, (prompt, response) in enumerate(lengths)
    ]
    places = list(range(len(rows)))
    shuffler.shuffle(places)
    cut = len(places) // 2
    bins = [part for part in (places[:cut], places[cut:]) if part]
    epochs = [i % 3 for i in range(len(rows))]
    batch = collate_packed(rows, epochs, bins, 0, CPU)
    assert batch.documents == [[rows[place].length for place in one] for one in bins]
    assert batch.prompt_lengths == [rows[place].prompt_length for place in places]
    assert batch.streams == [(5 * place, 0, epochs[place]) for place in places]
    width, trained = batch.input_ids.shape[1], []
    for b, one in enumerate(bins):
        tokens = [token for place in one for token in rows[place].input_ids]
        positions = [k for place in one for k in range(rows[place].length)]
        pad = [0] * (width - len(tokens))
        assert batch.input_ids[b].tolist() == tokens + pad
        assert batch.attention_mask[b].tolist() == [1] * len(tokens) + pad
        assert batch.position_ids[b].tolist() == positions + pad
        trained += [token for place in one for token in rows[place].input_ids[rows[place].prompt_length :]]
    assert batch.targets.tolist() == trained
    assert batch.input_ids.flatten()[batch.predicting + 1].tolist() == trained
    predicted_from = batch.input_ids.flatten()[batch.predicting]
    assert (batch.targets - predicted_from == 1).all()  # its own document's token before: they count up


def test_a_packed_row_of_one_document_is_a_row():
    rows = [Row(0, [1, 5, 6, 2], 2), Row(1, [1, 7, 2], 2)]
    packed, plain = collate_packed(rows, [0, 0], [[0], [1]], 0, CPU), collate(rows, [0, 0], 0, CPU)
    for name in ("input_ids", "attention_mask", "predicting", "targets"):
        assert torch.equal(getattr(packed, name), getattr(plain, name))
    assert (packed.prompt_lengths, packed.streams) == (plain.prompt_lengths, plain.streams)
    assert (plain.documents, plain.position_ids) == (None, None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Rows of noise with lengths from 10 to 100, some of which reach a budget of 24."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "prompt": "".join(rng.choices("abcdef", k=rng.randint(3, 30))),
            "completion": "".join(rng.choices("0123456789", k=rng.choice([5, 15, 40, 70]))),
        }
        for _ in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def step(source, tmp_path, dense, objective, **data):
    """(log, gradients, batches) of one float64 step of the loop with a plain gradient descent."""
    recipe = Recipe(
        model={"name": "tiny", "gradient_checkpointing": True},
        data={"source": source, "held_out": 0, **data},
        eviction={"policy": "vase_attnv", "budget": 24, "window": 8},
        training={
            "steps": 2, "global_batch": 12, "batch_per_device": 3, "objective": objective,
            "dense_fraction": 1.0 if dense else 0.0,
        },
        optim={"warmup_steps": 0, "max_grad_norm": 1e9},
        output=tmp_path / "run",
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer, accelerator = (
        load_model(recipe).double(),
        AutoTokenizer.from_pretrained(MODEL_PATH),
        Accelerator(),
    )
    with torch.no_grad():  # a fresh adapter would leave half of the gradients at zero, and the KL at its minimum
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    rows = load_data(recipe.data, tokenizer)
    gradients = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            gradients.extend(weight.grad.clone() for group in self.param_groups for weight in group["params"])

    optimizer = Recorder([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    wrapped = ModelWithLoss(model, recipe.training).train()
    logged, _ = train_step(Run(recipe, accelerator, wrapped, optimizer, None, rows, tokenizer, Watch(40)))
    return logged, gradients, step_batches(recipe, rows.train, 0, 0, 1, 0, CPU)


@pytest.mark.parametrize("objective", ["sft", "distill"])
@pytest.mark.parametrize("dense", [False, True], ids=["evicted", "dense"])
def test_a_packed_step_is_the_unpacked_one(source, tmp_path, dense, objective):
    """Loss and gradient in float64, through the loop, with gradient checkpointing; documents never see each other."""
    plain, expected, apart = step(source, tmp_path, dense, objective)
    packed, found, together = step(source, tmp_path, dense, objective, packing=True, packing_length=180)
    assert max(len(one) for batch in together for one in batch.documents) > 1
    assert len(together) < len(apart)  # forward passes
    assert packed.keys() == plain.keys()
    for name in plain:
        assert packed[name] == (plain[name] if isinstance(plain[name], str) else pytest.approx(plain[name], rel=1e-6))
    if not dense:
        assert plain["evictions"] > 1
    assert len(found) == len(expected) > 8
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_a_row_that_does_not_fit_is_named(source):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    settings = DataSettings(source=source, held_out=0, packing=True, packing_length=40)
    with pytest.raises(ValueError, match=r"data.packing_length \(40\) is shorter than the longest row \(\d+ tokens\)"):
        load_data(settings, tokenizer)
    load_data(settings.model_copy(update={"max_length": 40}), tokenizer)
    with pytest.raises(ValueError, match=r"packing_length \(40\) is set without packing"):
        DataSettings(source=source, packing_length=40)
