"""A base model that learns to end its turns stops there wherever it is loaded; and rows must fit their model."""

import json
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_templates import chat_tokenizer
from lm_eval.api.instance import Instance
from tokenizers import processors
from transformers import BloomConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import vkvtrain
from vkvtrain import ends
from vkvtrain.cli import main
from vkvtrain.evaluation.lm import EvictionLM
from vkvtrain.generation import Completion
from vkvtrain.training.data import Row, TrainingData
from vkvtrain.training.fit import check_positions, check_vocabulary, fitting_data
from vkvtrain.training.generated import requests, right
from vkvtrain.training.loop import train
from vkvtrain.training.models import load_tokenizer
from vkvtrain.training.settings import Recipe

TURNS = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "<think>\nseven\n</think>\n\n7"}]


def write_base(folder, **config):
    """A ChatML base model: the template ends turns with <|im_end|>, tokenizer and model with <|endoftext|>."""
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"vocab_size": len(tokenizer) + 8, "max_position_embeddings": 96, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **settings, **config}, num_key_value_heads=1, bos_token_id=None))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)  # every token is about as likely
    model.save_pretrained(folder)
    return tokenizer


def recipe(root, turns=TURNS, **sections):
    (root / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    chosen = {
        "model": {"name": str(root / "base")}, "data": {"source": str(root / "rows.jsonl"), "held_out": 1},
        "lora": {"r": 2}, "training": {"steps": 1, "global_batch": 2}, "optim": {"warmup_steps": 0},
        "log": {"tracker": "none", "generate_every": 1, "generate_samples": 1}, "output": root / "run",
    }  # fmt: skip
    return Recipe(**{**chosen, **sections})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory, end of a turn, end of sequence, what was said before training)"""
    root = tmp_path_factory.mktemp("ends")
    tokenizer = write_base(root / "base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(recipe(root))
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    return root, end, eos, [str(one.message) for one in caught]


def test_it_is_said_before_training(finished):
    _, end, eos, said = finished
    (told,) = [one for one in said if "<|im_end|>" in one]
    assert "the base model's generation config stops at '<|endoftext|>'" in told
    assert f"eos_token_id=[{eos}, {end}]" in told


def test_what_was_trained_stops_where_it_was_taught_to(finished):
    root, end, eos, _ = finished
    loaded = vkvtrain.load(root / "run")
    assert loaded.model.generation_config.eos_token_id == [eos, end]
    assert GenerationConfig.from_pretrained(root / "run").eos_token_id == [eos, end]
    base = vkvtrain.ends.saved_ends(str(root / "base"))
    assert base == [eos]  # the base model is left as it was


def test_publications_stop_there_too(finished, capsys):
    root, end, eos, _ = finished
    for name, arguments in {"adapter": [], "merged": ["--merge"]}.items():
        command = ["publish", str(root / "run"), "--to", str(root / name), "--base-name", "acme/base", *arguments]
        assert main([*command, "--license", "mit", "--not-evaluated"]) == 0, capsys.readouterr().err
        assert ends.saved_ends(str(root / name)) == [eos, end]
        code = runpy.run_path(str(root / name / "custom_generate/generate.py"))
        seen = SimpleNamespace(generate=lambda model, **arguments: arguments)
        code["generate"].__globals__["_MIXIN"] = seen  # an adapter's base model has its own generation configuration
        model = LlamaForCausalLM.from_pretrained(root / "base")
        assert code["generate"](torch.tensor([[1]]), model=model)["eos_token_id"] == [eos, end]
        assert code["generate"](torch.tensor([[1]]), model=model, eos_token_id=3)["eos_token_id"] == 3


@pytest.mark.parametrize("template", [True, False])
def test_an_evaluated_adapter_stops_there_too(finished, template, monkeypatch):
    """Whether the tokenizer still has its template or not."""
    root, end, eos, _ = finished
    lm = EvictionLM(str(root / "base"), peft=str(root / "run"), device="cpu")
    if not template:
        lm.tokenizer.chat_template = None
    assert lm._end_tokens() == {end, eos}
    plain = EvictionLM(str(root / "base"), device="cpu")
    plain.tokenizer.chat_template = None
    assert plain._end_tokens() == {eos}
    asked = Instance(
        "generate_until", {}, ("3+4?", {"until": [], "max_gen_toks": 80, "do_sample": True}), 0, ("x", 0, 1)
    )
    seen = []
    monkeypatch.setattr("vkvtrain.evaluation.lm.divided", lambda tokens, *_: seen.append(tokens) or ("", ""))
    lm.generate_until([asked], disable_tqdm=True)
    assert not {end, eos} & set(seen[0][:-1])


def test_a_rendered_request_says_its_own_special_tokens(finished):
    root, *_ = finished
    lm = EvictionLM(str(root / "base"), device="cpu")
    tokenizer = lm.tokenizer
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert lm.tok_encode("3+4?") == ends.encode(tokenizer, ["3+4?"])[0]
    assert lm.tok_encode("3+4?")[0] == lm.tok_encode("<bos>3+4?")[0] == bos
    assert lm.tok_encode("<bos>3+4?")[1] != bos
    assert lm._encode_pair("<bos>3+4?", " 7")[0].count(bos) == 1
    rendered = lm.apply_chat_template(TURNS[:1])
    given = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert lm.tok_encode(rendered) == given
    with pytest.raises(ValueError, match=r"chat_template_args: .*'enable_thinkng' \(did you mean 'enable_thinking'"):
        EvictionLM(str(root / "base"), device="cpu", chat_template_args={"enable_thinkng": False})


def test_channels_may_be_named_by_special_tokens(tmp_path):
    tokenizer = chat_tokenizer("gpt_oss")
    write_base(tmp_path, vocab_size=len(tokenizer) + 8, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(tmp_path)
    final = "<|channel|>final<|message|>"
    assert EvictionLM(str(tmp_path), device="cpu", think_end_token=final).think_end_token == final
    with pytest.raises(ValueError, match="does not appear in decoded text before an answer"):
        EvictionLM(str(tmp_path), device="cpu", think_end_token="<|return|>")


def test_rows_beyond_the_model_s_positions(tmp_path):
    tokenizer = write_base(tmp_path / "base")
    long = [TURNS[0], {"role": "assistant", "content": f"<think>\n{'so ' * 40}\n</think>\n\n7"}]
    with pytest.raises(
        ValueError, match=r"4 of 4 rows have more tokens than the model's 96 positions \(row 0: 1\d\d, "
    ):
        fitting_data(recipe(tmp_path, long), tokenizer)
    with pytest.raises(ValueError, match=r"leave them out with data.max_length 96"):
        train(recipe(tmp_path, long))
    few = recipe(tmp_path)
    assert len(fitting_data(few, tokenizer).train) == 3
    eviction = {"policy": "streaming", "budget": 64, "window": 16}
    training = {"steps": 1, "global_batch": 2, "objective": "on_policy", "rollout_tokens": 80}
    with pytest.raises(ValueError, match=r"training.rollout_tokens \(80\) behind the longest prompt \(\d+ tokens\)"):
        fitting_data(recipe(tmp_path, training=training, eviction=eviction), tokenizer)
    assert requests([Row(0, range(60), 20)], 64)[0].max_new_tokens == 44


def test_models_without_a_limit_take_rows_of_any_length(tmp_path):
    check_positions(recipe(tmp_path), TrainingData([Row(0, range(99999), 2)], [], []), BloomConfig())


def test_tokens_beyond_the_embedding(tmp_path):
    tokenizer = write_base(tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<new{n}>" for n in range(12)]})
    tokenizer.save_pretrained(tmp_path / "base")
    turns = [{"role": "user", "content": "3+4?<new11>"}, TURNS[1]]
    with pytest.raises(
        ValueError, match=r"training row 0 holds token \d+ \('<new11>'\), but the model's embedding has"
    ):
        train(recipe(tmp_path, turns))
    assert not Path(tmp_path / "run").exists()
    check_vocabulary(
        fitting_data(recipe(tmp_path), load_tokenizer(recipe(tmp_path))), LlamaConfig(vocab_size=999), tokenizer
    )
    with pytest.raises(ValueError, match="held-out row 4 holds token 7 "):
        check_vocabulary(TrainingData([Row(0, [1], 1)], [Row(4, [7], 1)], []), LlamaConfig(vocab_size=7), tokenizer)


def test_a_response_may_stop_with_any_end(finished):
    """A held-out answer that ends with the other end token is right all the same."""
    root, end, eos, _ = finished
    run = SimpleNamespace(recipe=recipe(root), tokenizer=None)
    row = Row(0, [5, 6, 7, end], 1)
    for tokens, is_right in (([6, 7, end], True), ([6, 7, eos], True), ([6, 7, 8], False), ([6, end], False)):
        assert right(run, row, Completion(tokens, tokens[-1] != 8, [], 0, 0), {end, eos}) == is_right
    assert not right(run, Row(0, [5, 6, 7, 8], 1), Completion([6, 7, 8], False, [], 0, 0), {end, eos})  # cut off
