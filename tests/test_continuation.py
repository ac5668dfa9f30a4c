"""What a used cache is given: the sequences' next tokens, or a refusal that says what happened instead."""

import copy
import pickle

import pytest
import torch
import transformers
from families import FAMILIES, tiny_family
from packaging.version import Version
from passes import simulate
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.generation import Request, generate

CONFIG = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=1)
STALE = r"has seen \d+ tokens.*call cache\.reset\(\), or make a new one"
DROPPED = r"its layers run without one.*gradient checkpointing.*call model\.eval\(\)"
AGAIN = r"every token again: set use_cache=True"
KEEPS_THE_CACHE = Version(transformers.__version__) >= Version("5.24")


def drawn(rows, length, seed=5):
    return torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def answer(model, prompt, cache, tokens=30, **settings):
    mask = torch.ones_like(prompt)
    return model.generate(
        input_ids=prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, do_sample=False, **settings
    )


def checkpointing(model):
    """The model in training mode, its layers checkpointed."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


# A cache that was asked for and never written


@pytest.mark.parametrize("family", ["Qwen3", "gpt-oss", "Gemma3", "Phi3"])
def test_checkpointing_in_training_mode_is_refused_at_the_first_forward(family):
    model = tiny_family(family)
    expected = answer(model, drawn(2, 10), fresh(model))
    checkpointing(model)
    cache = fresh(model)
    for length in (10, 1):
        with pytest.raises(ValueError, match=DROPPED):
            model(input_ids=drawn(2, length), past_key_values=cache)
    refused_or(expected, lambda: answer(model, drawn(2, 10), cache))
    model.eval()
    assert torch.equal(answer(model, drawn(2, 10), fresh(model)), expected)


def refused_or(expected, generated):
    """Newer transformers checkpoint nothing without gradients, so that generation keeps its cache in training mode."""
    if KEEPS_THE_CACHE:
        assert torch.equal(generated(), expected)
        return
    with pytest.raises(ValueError, match=DROPPED):
        generated()


def fresh(model):
    return EvictionCache(CONFIG, model.config)


def test_checkpointing_under_an_adapter_is_refused():
    model = get_peft_model(tiny_family("Qwen3"), LoraConfig(task_type="CAUSAL_LM"))
    expected = answer(model, drawn(1, 10), fresh(model))
    checkpointing(model)
    refused_or(expected, lambda: answer(model, drawn(1, 10), fresh(model)))
    with pytest.raises(ValueError, match=DROPPED):
        model(input_ids=drawn(1, 10), past_key_values=fresh(model))


def test_the_slot_engine_refuses_layers_in_training_mode():
    model = tiny_family("Qwen3")
    request = Request((3, 4, 5), 8, 0)

    def tokens():
        return torch.tensor(generate(model, CONFIG, [request], slots=1, end_tokens=set())[0].tokens)

    expected = tokens()
    checkpointing(model.model)
    assert not model.training
    refused_or(expected, tokens)


def test_training_mode_without_checkpointing_decodes():
    model = tiny_family("Qwen3")
    expected = answer(model, drawn(2, 10), fresh(model))
    assert torch.equal(answer(model.train(), drawn(2, 10), fresh(model)), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_a_forward_without_a_cache_is_not_blamed_for_one_that_was_given_up(padded):
    """A cached forward that fails between its masks and its layers, or is refused, leaves nothing behind."""
    model = tiny_family("Qwen3")
    ids, cache = drawn(1, 8), fresh(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]) if padded else torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    hook.remove()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


# use_cache=False


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_without_caching_is_named(family):
    model = tiny_family(family)
    with pytest.raises(ValueError, match=AGAIN):
        answer(model, drawn(2, 10), fresh(model), use_cache=False)


def test_caching_switched_off_elsewhere_is_named():
    model = tiny_family("Qwen3")
    with pytest.raises(ValueError, match=AGAIN):
        answer(model, drawn(1, 10), fresh(model), generation_config=GenerationConfig(use_cache=False))
    cache = fresh(model)
    first = answer(model, drawn(1, 10), cache)
    with pytest.raises(ValueError, match=AGAIN):
        answer(model, torch.cat([first, drawn(1, 3)], 1), cache, use_cache=False)
    model.config.use_cache = False  # as training leaves it; the slot engine does not care
    request = Request(tuple(drawn(1, 10)[0].tolist()), 30, 0)
    assert generate(model, CONFIG, [request], slots=1, end_tokens=set())[0].tokens == first[0, 10:].tolist()


# A used cache and another prompt


@pytest.mark.parametrize("length", [1, 2, 12, 20, 30, 38, 39])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_another_prompt_for_a_used_cache_is_named(family, length):
    """Of no more tokens than were seen, whatever generate makes of them: none, one, some or all."""
    model = tiny_family(family)
    cache = fresh(model)
    answer(model, drawn(1, 10), cache)
    with pytest.raises(ValueError, match=STALE):
        answer(model, drawn(1, length, seed=6), cache)
    cache.reset()
    expected = answer(model, drawn(1, length, seed=6), fresh(model))
    assert torch.equal(answer(model, drawn(1, length, seed=6), cache), expected)


def test_another_prompt_after_forwards_by_hand_is_named():
    model = tiny_family("Qwen3")
    cache = fresh(model)
    model(input_ids=drawn(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match=STALE):
        answer(model, drawn(1, 12), cache)
    with pytest.raises(ValueError, match="holds 1 rows and was given 2"):
        answer(model, drawn(2, 30), cache)


def test_padded_rows_are_continued_where_they_were():
    """Rows of other lengths in one batch: each one's positions count from its own first token."""
    model = tiny_family("Qwen3")
    cache = fresh(model)
    prompts = drawn(2, 10)
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    arguments = {"past_key_values": cache, "max_new_tokens": 20, "do_sample": False}
    first = model.generate(input_ids=prompts, attention_mask=mask, **arguments)
    mask = torch.cat([mask, torch.ones(2, 25, dtype=torch.int64)], 1)
    second = model.generate(input_ids=torch.cat([first, drawn(2, 5, seed=6)], 1), attention_mask=mask, **arguments)
    rows = [second[0, 4:].tolist(), second[1].tolist()]
    logits, _ = simulate(model, CONFIG, rows, [[(0, 6), (25, 31)], [(0, 10), (29, 35)]], [0, 1])
    for row, own in enumerate(rows):
        predicted = logits[row].argmax(-1).tolist()
        assert predicted[len(own) - 21 : len(own) - 1] == own[-20:]
    with pytest.raises(ValueError, match=STALE):
        model.generate(input_ids=prompts, attention_mask=mask[:, :10], **arguments)


# Turns


@pytest.mark.parametrize("family", ["gpt-oss", "Gemma3", "Olmo3", "Qwen3"])
@pytest.mark.parametrize("answered", [1, 2, 9])
def test_later_messages_of_any_length(family, answered):
    """Longer than the model's own window of 12, after answers as short as one token, which no cache was given."""
    model = tiny_family(family)
    cache, sequence, chunks = fresh(model), drawn(2, 5), []
    for turn, message in enumerate([0, 11, 12, 13, 40]):
        held = cache.get_seq_length()
        sequence = torch.cat([sequence, drawn(2, message, seed=turn)], 1)
        chunks.append((held, sequence.shape[1]))
        sequence = answer(model, sequence, cache, tokens=answered)
    logits, evict_at = simulate(model, CONFIG, sequence.tolist(), [chunks] * 2, [0, 1])
    predicted = torch.stack([own.argmax(-1) for own in logits])
    for _, end in chunks:
        for place in range(end, end + answered):
            assert torch.equal(predicted[:, place - 1], sequence[:, place])
    seen = cache.get_seq_length()
    assert seen == sequence.shape[1] - 1
    layer = len(evict_at) - 1
    for row in range(2):
        alive = [(held > seen).nonzero().flatten() for held in evict_at[layer][row, :, :seen]]
        assert [own.tolist() for own in alive] == cache.positions(layer, row).tolist()


def test_padding_in_a_message_longer_than_the_window_is_refused():
    model = tiny_family("gpt-oss")
    cache = fresh(model)
    first = answer(model, drawn(2, 5), cache, tokens=4)
    longer = torch.cat([first, drawn(2, 30)], 1)
    mask = torch.ones_like(longer)
    mask[1, 10] = 0
    with pytest.raises(ValueError, match="padding among tokens that continue"):
        model.generate(input_ids=longer, attention_mask=mask, past_key_values=cache, max_new_tokens=3)


def test_positions_that_leave_a_gap_are_named():
    """A padded prompt without position ids counts its padding, which positions by the mask do not."""
    model = tiny_family("Qwen3")
    cache = fresh(model)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model(input_ids=drawn(2, 5), attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, mask.new_ones(2, 3)], 1)
    with pytest.raises(ValueError, match="seen 3 tokens of row 0, so that position 5 is next, and was given 3 to 5"):
        model(
            input_ids=drawn(2, 3), attention_mask=mask, past_key_values=cache, position_ids=(mask.cumsum(-1) - 1)[:, 5:]
        )


# What a cache holds


@pytest.mark.parametrize("family", ["Qwen3", "gpt-oss"])
def test_a_cache_holds_its_entries_and_nothing_of_a_forward(family):
    """A pickle is little more than the entries, after a padded prompt, a chunk, and tokens."""
    model = tiny_family(family, dtype=torch.float32)
    cache = fresh(model)
    prompts = drawn(2, 400)
    mask = torch.ones_like(prompts)
    mask[0, :50] = 0
    with torch.no_grad():
        for length in (400, 1, 300, 1):
            if length < 400:
                mask = torch.cat([mask, mask.new_ones(2, length)], 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
            given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            model(input_ids=prompts[:, :length], **given)
            assert overhead(cache) < 2 * 300 * 300 / 4  # a fourth of the smallest mask


def overhead(cache):
    """Bytes of a pickle beside what its layers store."""
    stored = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.row_layers
        for _, tensor in layer.storage.tensors()
    }
    return len(pickle.dumps(cache)) - sum(stored.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("family", ["Qwen3", "gpt-oss"])
def test_a_copied_cache_goes_on_by_itself(family, copied):
    model = tiny_family(family)
    cache = fresh(model)
    first = answer(model, drawn(2, 10), cache)
    other, longer = copied(cache), torch.cat([first, drawn(2, 20, seed=6)], 1)
    expected = answer(model, longer, cache)
    assert torch.equal(answer(model, longer, other), expected)
    assert other.stats() == cache.stats()
