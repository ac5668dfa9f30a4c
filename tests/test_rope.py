"""Rotary frequencies that depend on the length of a forward: refused, or fixed for all sequences in both passes."""

import copy

import pytest
import torch
from families import FAMILIES, tiny_family
from passes import decode, simulate
from transformers import AutoConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vkvtrain import EvictionCache, EvictionConfig, fixed_rope, load, simulated_eviction
from vkvtrain.evaluation.lm import EvictionLM
from vkvtrain.evaluation.scoring import Continuation, score
from vkvtrain.generation import Request, generate
from vkvtrain.generation.requests import positions

SWITCH, HALF = 24, 8
CONFIG = EvictionConfig(policy="snapkv", budget=16, window=4, sinks=1)
LONG = [1.0 + 3 * place for place in range(HALF)]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * HALF, "long_factor": LONG,
    "original_max_position_embeddings": SWITCH,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
MOVING = {
    "Phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH},
    "Llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH},
    "Qwen3": {"rope_parameters": LONGROPE | {"factor": 100.0, "attention_factor": 1.3}},
    "Gemma3": {"rope_parameters": {"sliding_attention": DYNAMIC, "full_attention": LONGROPE | {"factor": 2.0}}},
}
STATIC = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SWITCH},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": SWITCH,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip
TOKENS = torch.randint(2, 40, (1, 60), generator=torch.Generator().manual_seed(5))[0].tolist()


def moving(family):
    return tiny_family(family, **copy.deepcopy(MOVING[family]))


def fixed(family, length=None):
    """The same model, loaded with one set of frequencies."""
    model = moving(family)
    config = fixed_rope(model.config, length)
    other = FAMILIES[family].model(config).to(torch.float64).eval()
    other.load_state_dict(model.state_dict())
    return other


def check_both_passes(model):
    """One parallel pass is decoding token by token, for rows on both sides of the switch in one batch."""
    rows, prompts = [TOKENS[:28], TOKENS[:46], TOKENS[4:54]], [10, 28, 32]
    expected, held, _ = decode(model, CONFIG, rows, prompts, [0, 1, 2])
    logits, evict_at = simulate(model, CONFIG, rows, prompts, [0, 1, 2])
    assert held[0]
    assert max((ours - theirs).abs().max() for ours, theirs in zip(logits, expected, strict=True)) < 1e-9
    assert evict_at


@pytest.mark.parametrize("family", MOVING)
def test_frequencies_by_length_are_refused_by_name(family):
    model = moving(family)
    sentence = f"{model.config.model_type}: its rotary frequencies .* depend on the longest row.*vkvtrain.fixed_rope"
    with pytest.raises(ValueError, match=sentence):
        EvictionCache(CONFIG, model.config)
    with pytest.raises(ValueError, match=sentence), simulated_eviction(model, CONFIG, [4]):
        pass
    with pytest.raises(ValueError, match=sentence):
        generate(model, CONFIG, [Request((3, 4), 2, 0)], slots=1, end_tokens=set())
    with pytest.raises(ValueError, match=sentence):
        score(model, CONFIG, [Continuation((3, 4), (5,), 0)], 100)


@pytest.mark.parametrize("length", [None, SWITCH, 60])
@pytest.mark.parametrize("family", MOVING)
def test_fixed_frequencies_are_one_set_in_both_passes(family, length):
    check_both_passes(fixed(family, length))


@pytest.mark.parametrize("rope_type", sorted({"default", *ROPE_INIT_FUNCTIONS} - {"longrope", "dynamic"}))
def test_every_other_kind_is_left_alone(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **STATIC[rope_type]}
    model = tiny_family("Llama", rope_parameters=rope, max_position_embeddings=4 * SWITCH)
    assert fixed_rope(model.config) is model.config
    check_both_passes(model)


@pytest.mark.parametrize("family", MOVING)
def test_fixed_frequencies_are_those_of_a_sequence_of_that_length(family):
    """Without eviction: what transformers makes of a forward of so many tokens, and shorter sequences share the set."""
    for length in (SWITCH, 50):
        model, ids = moving(family), torch.tensor([TOKENS[:length]])
        same = fixed(family, length)
        assert (model(input_ids=ids).logits - same(input_ids=ids).logits).abs().max() < 1e-6  # theta is rounded
        part = same(input_ids=ids[:, :20]).logits
        assert (same(input_ids=ids).logits[:, :20] - part).abs().max() < 1e-9
        assert positions(same.config) == length


@pytest.mark.parametrize("family", ["Phi3", "Llama"])
def test_a_row_is_its_own_beside_a_longer_one(family):
    model = fixed(family, 100)
    short, long = Request(tuple(TOKENS[:6]), 14, (0, 0)), Request(tuple(TOKENS[:38]), 14, (1, 0))
    alone = generate(model, CONFIG, [short], slots=2, end_tokens=set())[0].log_probs
    beside = generate(model, CONFIG, [short, long], slots=2, end_tokens=set())[0].log_probs
    assert alone == pytest.approx(beside, abs=1e-9)
    rows = [Continuation(tuple(TOKENS[:6]), tuple(TOKENS[6:20]), 0), Continuation(tuple(TOKENS[:9]), tuple(TOKENS), 1)]
    together, single = score(model, CONFIG, rows, 100), score(model, CONFIG, rows[:1], 100)
    assert together[0][0] == pytest.approx(single[0][0], abs=1e-9)


@pytest.mark.parametrize("prompt", [10, SWITCH - 1, SWITCH, SWITCH + 1, 40])
def test_generation_keeps_its_cache_across_the_switch(prompt):
    model = fixed("Phi3", 100)
    ids, cache = torch.tensor([TOKENS[:prompt]]), EvictionCache(CONFIG, model.config)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=30, do_sample=False
    )
    assert cache.get_seq_length() == out.shape[1] - 1
    logits, _ = simulate(model, CONFIG, out.tolist(), [prompt], [0])
    assert logits[0].argmax(-1)[prompt - 1 : -1].tolist() == out[0, prompt:].tolist()


def test_a_model_that_generate_would_leave_without_its_cache_is_refused():
    """Phi-3's own `generate` drops the cache at a length that the configuration tells, whatever its RoPE."""
    model = tiny_family("Phi3", original_max_position_embeddings=SWITCH)
    with pytest.raises(ValueError, match=f"would drop the cache beyond {SWITCH} tokens.*fixed_rope"):
        EvictionCache(CONFIG, model.config)
    config = fixed_rope(model.config)
    assert config.original_max_position_embeddings == config.max_position_embeddings == 4096
    assert config.rope_parameters["rope_type"] == "default"
    EvictionCache(CONFIG, config)


def test_a_fixed_configuration_survives_its_file_and_leaves_the_original_alone(tmp_path):
    own = Phi3Config(**copy.deepcopy(MOVING["Phi3"]), hidden_size=64, num_attention_heads=4)
    before = own.to_dict()
    fixed_rope(own).save_pretrained(tmp_path)
    assert own.to_dict() == before
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == fixed_rope(own).rope_parameters
    assert read.rope_parameters["short_factor"] == LONG
    assert fixed_rope(read) is read


def test_hunyuans_alpha_is_a_base_by_itself():
    rope = DYNAMIC | {"alpha": 1000.0}
    config = fixed_rope(LlamaConfig(head_dim=16, rope_parameters=rope, max_position_embeddings=SWITCH))
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rope_parameters["rope_theta"] == 1e4 * 1000 ** (16 / 14)


def test_a_length_that_is_none():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        fixed_rope(LlamaConfig(), 0)


def test_commands_load_such_models_with_one_set_and_say_so(tmp_path, caplog):
    from transformers import AutoTokenizer

    from vkvtrain.tiny import MODEL_PATH

    moving("Phi3").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(tmp_path)
    CONFIG.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    assert "rotary frequencies depend on the length; those for 4096 tokens are used for all" in caplog.text
    assert loaded.model.config.rope_parameters["short_factor"] == LONG
    check_both_passes(loaded.model)
    evaluated = EvictionLM(str(tmp_path), device="cpu", dtype="float64")
    assert evaluated.model.config.rope_parameters == loaded.model.config.rope_parameters
    check_both_passes(evaluated.model)
