"""Packed documents are evicted as if each were alone in its row: the same logits, gradients and decisions."""

import pytest
import torch
from families import tiny_family
from hypothesis import given
from hypothesis import strategies as st
from passes import right_padded, rows_of, simulate, tiny_model

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.attention.packing import Layout
from vkvtrain.policies import POLICIES

CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
DOCUMENTS = [[31, 9], [48], [3, 20, 17]]
PROMPTS = [6, 2, 20, 1, [(0, 3), (10, 14)], 17]
STREAMS = [3, (4, 1), 0, 9, (2, 0, 5), 6]
TEXTS = rows_of([length for row in DOCUMENTS for length in row], steps=0, vocab=12)


def packed(documents=DOCUMENTS, texts=TEXTS):
    """(ids, mask, position_ids) of the documents in their rows."""
    rest = list(texts)
    rows = [[token for _ in row for token in rest.pop(0)] for row in documents]
    ids, mask = right_padded(rows)
    positions = [[i for length in row for i in range(length)] for row in documents]
    return ids, mask, right_padded(positions)[0]


def split(values, documents=DOCUMENTS):
    """[B, S, ...] -> one tensor a document."""
    return [part for row, its in zip(values, documents, strict=True) for part in row[: sum(its)].split(its)]


def loss_of(logits, targets):
    return torch.nn.functional.cross_entropy(logits, torch.tensor(targets))


def unpacked_step(model, config, backend="auto"):
    """(logits of each document, gradients, evict_at of each layer and document) with a row for each document."""
    model.zero_grad()
    ids, mask = right_padded(TEXTS)
    with simulated_eviction(model, config, PROMPTS, STREAMS, backend) as trace:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        parts = [logits[row, : len(text)] for row, text in enumerate(TEXTS)]
        torch.stack([loss_of(part, text) for part, text in zip(parts, TEXTS, strict=True)]).sum().backward()
    return parts, gradients(model), trace.evict_at


def packed_step(model, config, backend="auto", with_mask=True):
    model.zero_grad()
    ids, mask, positions = packed()
    with simulated_eviction(model, config, PROMPTS, STREAMS, backend, DOCUMENTS) as trace:
        logits = model(
            input_ids=ids, attention_mask=mask if with_mask else None, position_ids=positions, use_cache=False
        ).logits
        parts = split(logits)
        torch.stack([loss_of(part, text) for part, text in zip(parts, TEXTS, strict=True)]).sum().backward()
    assert [row.length for row in trace.rows] == [len(text) for text in TEXTS]
    return parts, gradients(model), trace.evict_at


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(ours, theirs):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert (mine - other).abs().max() < 1e-10
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        rounding = 1e-9 if gradient.dim() > 1 else 1e-6  # norms compute in float32
        assert (ours[1][name] - gradient).abs().max() < rounding * max(1.0, gradient.abs().max()), name
    assert ours[2].keys() == theirs[2].keys()
    assert all(torch.equal(ours[2][layer], theirs[2][layer]) for layer in theirs[2])


@pytest.mark.parametrize("policy", POLICIES)
def test_packed_equals_unpacked(policy):
    model = tiny_model()
    config = CONFIG.model_copy(update={"policy": policy})
    ours, theirs = packed_step(model, config), unpacked_step(model, config)
    assert_same(ours, theirs)
    width = max(map(len, TEXTS))
    assert all(at.shape == (len(TEXTS), 2, width) for at in ours[2].values())
    evicted = any(((at > 0) & (at <= width)).any() for at in ours[2].values())
    assert evicted == config.evicts


@pytest.mark.parametrize("family", ["Olmo3", "Gemma2", "gpt-oss"])
@pytest.mark.parametrize("policy", ["vase_attnv", "h2o", "full"])
def test_sliding_layers_soft_caps_and_sinks(family, policy):
    model = tiny_family(family)
    config = CONFIG.model_copy(update={"policy": policy})
    for backend in ("segments", "reference"):
        assert_same(packed_step(model, config, backend), unpacked_step(model, config))


def test_skipped_layers():
    model = tiny_model(layers=3)
    config = CONFIG.model_copy(update={"skip_layers": (0, 2)})
    assert_same(packed_step(model, config), unpacked_step(model, config))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    ours = packed_step(model, CONFIG)
    assert_same(ours, unpacked_step(tiny_model().train(), CONFIG))


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_without_an_attention_mask(family):
    """transformers then finds the documents in position_ids and passes its own mask function."""
    documents, texts = [[14, 18], [32]], rows_of([14, 18, 32], steps=0)
    ids, _, positions = packed(documents, texts)
    model = tiny_family(family)
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad(), simulated_eviction(model, CONFIG, [6, 2, 20], documents=documents) as trace:
        logits = model(**arguments).logits
    alone, evict_at = simulate(model, CONFIG, texts, [6, 2, 20], [0, 1, 2])
    for ours, theirs in zip(split(logits, documents), alone, strict=True):
        assert (ours - theirs).abs().max() < 1e-10
    assert all(torch.equal(trace.evict_at[layer], evict_at[layer]) for layer in evict_at)
    with (
        pytest.raises(ValueError, match="name the documents of packed sequences"),
        simulated_eviction(model, CONFIG, [6, 6]),
    ):
        model(**arguments)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_full_is_isolated_dense_attention(family):
    """Policy `full`, and a teacher in a suspended simulation: the plain model on each document alone."""
    model = tiny_family(family)
    ids, mask, positions = packed()
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        plain = [model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in TEXTS]
        full = EvictionConfig(policy="full")
        with simulated_eviction(model, full, PROMPTS, documents=DOCUMENTS):
            dense = model(**arguments).logits
        with simulated_eviction(model, CONFIG, PROMPTS, STREAMS, documents=DOCUMENTS) as trace:
            with trace.suspended():
                teacher = model(**arguments).logits
            assert not trace.evict_at
            student = model(**arguments).logits
            decided = dict(trace.evict_at)
            with trace.suspended():
                again = model(**arguments).logits
        alone, evict_at = simulate(model, CONFIG, TEXTS, PROMPTS, STREAMS)
    for number, theirs in enumerate(plain):
        for ours in (dense, teacher, again):
            assert (split(ours)[number] - theirs).abs().max() < 1e-10
        assert (split(student)[number] - alone[number]).abs().max() < 1e-10
    assert all(torch.equal(decided[layer], evict_at[layer]) for layer in evict_at)


def test_documents_do_not_see_each_other():
    """Another first document changes nothing of the second one, not even through gradients."""
    model = tiny_model()
    documents = [[20, 25]]
    texts = rows_of([20, 25], steps=0)
    results = []
    for first in (texts[0], [3] * 20):
        ids, mask, positions = packed(documents, [first, texts[1]])
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        with simulated_eviction(model, CONFIG, [4, 4], documents=documents) as trace:
            logits = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits
            logits[:, 20:].square().sum().backward()
        assert (embeddings.grad[:, :20] == 0).all()
        results.append((logits[:, 20:], embeddings.grad[:, 20:], *(at[1] for at in trace.evict_at.values())))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 3))
def test_there_and_back(documents, padding):
    lengths = [sum(row) for row in documents]
    width = max(lengths) + padding
    layout = Layout(documents, lengths, width)
    values = torch.arange(1, len(documents) * width + 1)[:, None].unflatten(0, (len(documents), width))
    apart = layout.apart(values[:, :, None].transpose(1, 2))
    expected = split(values, documents)
    assert apart.shape == (len(expected), 1, max(map(len, expected)), 1)
    for row, part in zip(apart[:, 0], expected, strict=True):
        assert torch.equal(row[: len(part)], part)
        assert (row[len(part) :] == 0).all()
    back = layout.together(apart.transpose(1, 2))[:, :, 0]
    for row, length in enumerate(lengths):
        assert torch.equal(back[row, :length], values[row, :length])
        assert (back[row, length:] == 0).all()


@pytest.mark.parametrize(
    ("documents", "prompts", "message"),
    [
        ([[12, 9]], [3, 2], "documents of row 0 add up to 21 tokens, but the row has 20"),
        ([[12, 8], [4]], [3, 2, 1], "documents has 2 rows for a batch of 1"),
        ([[12, 8]], [3], "prompt_lengths has 1 entries for 2 documents"),
        ([[12, 8]], [3, 9], "the prompt of document 1 ends at 9, after the document's 8 tokens"),
        ([[12, 8]], [[(0, 2), (5, 13)], 1], "the prompt of document 0 ends at 13, after the document's 12 tokens"),
        ([[12, 0, 8]], [3, 1, 2], "at least one document of at least one token, row 0"),
        ([[]], [3], "at least one document of at least one token, row 0"),
        ([12, 8], [3, 2], "a list of token lengths for each row"),
        ([[12, 8.0]], [3, 2], "a list of token lengths for each row"),
    ],
)
def test_refusals(documents, prompts, message):
    model = tiny_model(layers=1)
    ids = torch.tensor([rows_of([20], steps=0)[0]])
    with pytest.raises(ValueError, match=message), simulated_eviction(model, CONFIG, prompts, documents=documents):
        model(input_ids=ids, use_cache=False)
