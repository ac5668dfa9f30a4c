"""PEFT's adapters that add tokens or entries: counted in both passes, or refused by name."""

import pytest
import torch
from passes import held_at, right_padded, rows_of, tiny_model
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.generation import Request, generate
from vkvtrain.versions import CACHE_ARGUMENT, cache_argument

CONFIG = EvictionConfig(policy="vase_attnv", budget=24, window=8, sinks=2)
VIRTUAL = 5
COUNTED = {
    "prompt tuning": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
}


def adapted(config):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(dtype=torch.float32), config).eval()


def prefix_tuned():
    return adapted(PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL))


@pytest.mark.parametrize("name", COUNTED)
@torch.no_grad()
def test_virtual_tokens_belong_to_the_prompt(name):
    """What the base model decodes behind the same embeddings is what the simulation sees."""
    model = adapted(COUNTED[name]())
    prompts, rows = [6, 11], rows_of([6, 11], steps=50)
    ids, mask = right_padded(rows)
    with simulated_eviction(model, CONFIG, prompts) as trace:
        simulated = model(input_ids=ids, attention_mask=mask).logits
    assert [row.prompt for row in trace.rows] == [6 + VIRTUAL, 11 + VIRTUAL]
    for row, tokens in enumerate(rows):
        embeddings = torch.cat([model.get_prompt(1), model.word_embeddings(torch.tensor([tokens]))], 1)
        start, cache = prompts[row] + VIRTUAL, EvictionCache(CONFIG, model.config, [row])
        base, parts = model.get_base_model(), [embeddings[:, :start], *embeddings[:, start:].split(1, 1)]
        decoded = torch.cat([base(inputs_embeds=part, **cache_argument(cache)).logits for part in parts], 1)
        assert (decoded[0] - simulated[row, : len(tokens) + VIRTUAL]).abs().max() < 1e-4
        for layer in range(2):
            held = held_at(trace.evict_at[layer], row, len(tokens) + VIRTUAL)
            assert held == cache.positions(layer, 0).tolist()


@torch.no_grad()
def test_chunks_and_disabled_adapters():
    model = adapted(COUNTED["prompt tuning"]())
    ids = torch.tensor(rows_of([6], steps=40))
    with simulated_eviction(model, CONFIG, [[(0, 6), (20, 24)]]) as trace:
        model(input_ids=ids)
    with model.disable_adapter(), simulated_eviction(model, CONFIG, [[(0, 6), (20, 24)]]) as plain:
        model(input_ids=ids)
    assert (trace.rows[0].prompt, plain.rows[0].prompt) == (6 + VIRTUAL, 6)
    assert trace.evict_at[0].shape[-1] == plain.evict_at[0].shape[-1] + VIRTUAL
    with (
        pytest.raises(ValueError, match="virtual tokens"),
        simulated_eviction(model, CONFIG, [6], documents=[[46]]),
    ):
        model(input_ids=ids)


def test_prefix_tuning_is_refused_by_name():
    model, ids = prefix_tuned(), torch.tensor(rows_of([6], steps=40))
    with pytest.raises(ValueError, match="PREFIX_TUNING"), simulated_eviction(model, CONFIG, [6]):
        model(input_ids=ids)
    if CACHE_ARGUMENT == "cache":
        return  # PEFT 0.21 does not know that name and drops the prefix before any cache is asked, a stock one too
    with pytest.raises(ValueError, match="prefix tuning"):
        model.generate(ids, **cache_argument(EvictionCache(CONFIG, model.config)), max_new_tokens=5)


@pytest.mark.parametrize("name", COUNTED)
def test_the_slot_engine_refuses_virtual_tokens(name):
    """It gives the model a token at a time, and PEFT would put the virtual ones before each."""
    request = Request((5, 6, 7), 5, 0)
    with pytest.raises(ValueError, match="virtual tokens"):
        list(generate(adapted(COUNTED[name]()), CONFIG, [request], slots=1, end_tokens=()))
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        list(generate(prefix_tuned(), CONFIG, [request], slots=1, end_tokens=()))
    lora = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(list(generate(lora, CONFIG, [request], slots=1, end_tokens=()))) == 1


@pytest.mark.parametrize("name", COUNTED)
@torch.no_grad()
def test_generation_with_virtual_tokens(name):
    """PEFT's `generate` gives the cache what the simulation sees. Where PEFT does not know the cache's newer name it
    puts the virtual tokens before every token, which the cache refuses."""
    model, ids = adapted(COUNTED[name]()), torch.tensor(rows_of([6], steps=0))
    cache = EvictionCache(CONFIG, model.config)

    def generated():
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=50,
            do_sample=False,
        )  # fmt: skip

    if CACHE_ARGUMENT == "cache":
        with pytest.raises(ValueError, match="second chunk"):
            generated()
        return
    tokens = generated()
    with simulated_eviction(model, CONFIG, [6]) as trace:
        logits = model(input_ids=tokens).logits
    assert torch.equal(logits[0, VIRTUAL + 5 : -1].argmax(-1), tokens[0, 6:])
    for layer in range(2):
        held = held_at(trace.evict_at[layer], 0, tokens.shape[1] - 1 + VIRTUAL)
        assert held == cache.positions(layer, 0).tolist()
