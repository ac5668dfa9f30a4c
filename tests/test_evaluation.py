"""The lm-eval model, its records, and the metrics."""

import json
import logging
from datetime import timedelta
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, Qwen3ForCausalLM

from vkvtrain import EvictionConfig, cli
from vkvtrain.evaluation import lm as lm_module
from vkvtrain.evaluation.arguments import take_eviction_config
from vkvtrain.evaluation.lm import EvictionLM
from vkvtrain.evaluation.records import RECORD
from vkvtrain.evaluation.sampling import check_generation, sampling_of
from vkvtrain.events import evictions_by, peak_entries
from vkvtrain.generation import Sampling
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.tiny.task import problem

ROOT = Path(__file__).parents[1]
EVICTED = {"policy": "vase_attnv", "budget": 48, "window": 16}


def model(batch_size=4, **eviction):
    return EvictionLM(str(MODEL_PATH), device="cpu", batch_size=batch_size, **eviction)


def requests(lengths=(9, 14, 16, 10, 16, 15), repeats=1, **settings):
    settings = {"do_sample": False, "max_gen_toks": 150, "until": [], **settings}
    return [
        Instance(
            "generate_until",
            {},
            (problem("validation", 0, index, pairs).prompt, dict(settings)),
            idx=0,
            metadata=("tiny", index, repeats),
        )
        for index, pairs in enumerate(lengths)
    ]


def generate(lm, asked):
    texts = lm.generate_until(asked, disable_tqdm=True)
    return texts, [request.args[1][RECORD] for request in asked]


def test_answers_and_records_do_not_depend_on_the_batch():
    reference = generate(model(1, **EVICTED), requests())
    for size in (3, 6):
        assert generate(model(size, **EVICTED), requests()) == reference
    assert len(set(reference[0])) == 6


def test_records_say_what_the_cache_did():
    lm = model(**EVICTED)
    texts, records = generate(lm, requests())
    for request, text, (record,) in zip(requests(), texts, records, strict=True):
        prompt = len(lm.tok_encode(request.args[0]))
        assert record["tokens"] == len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1  # the end token
        assert record["final_length"] == prompt + record["tokens"] - 1
        assert record["evictions"] == evictions_by(prompt, record["final_length"], 48, 16)
        assert record["peak_entries"] == peak_entries(prompt, record["final_length"], 48, 16)
        layers, heads, dim = 4, 4, 32
        assert record["peak_kv_bytes"] == record["peak_entries"] * layers * heads * 2 * dim * 4
        assert record["stream"] == [request.doc_id, 0]
    assert sum(record["evictions"] > 0 for (record,) in records) >= 3
    assert lm.get_model_info()["eviction"]["evictions"] == sum(record["evictions"] for (record,) in records)


def test_a_full_cache_answers_as_stock_lm_eval_does():
    stock = HFLM(str(MODEL_PATH), backend="causal", device="cpu", batch_size=3)
    assert generate(model(), requests())[0] == stock.generate_until(requests(), disable_tqdm=True)


def test_tokens_are_counted_to_the_rows_own_end():
    """A stop string ends some rows early; what the batch went on for is not theirs."""
    whole, _ = generate(model(6), requests())
    asked = requests(until=["6"])
    alone = [generate(model(1), [request])[1][0] for request in requests(until=["6"])]
    texts, records = generate(model(6), asked)
    assert records == alone
    answers = [text.partition("</think>")[2] for text in whole]
    assert [text.partition("</think>")[2] for text in texts] == [answer.partition("6")[0] for answer in answers]
    assert sum("6" in answer for answer in answers) in range(1, 6)
    assert sum("6" in text.partition("</think>")[0] for text in texts) >= 4  # within thoughts it means nothing
    for answer, (record,) in zip(answers, records, strict=True):
        assert record["text"].endswith("6") == ("6" in answer)
        assert not record["looping_or_cut_off"]
    named, _ = generate(model(6, think_end_token="</think>"), requests(until=["6"]))
    assert named == [text.partition("</think>")[2] for text in texts]


def test_a_cut_off_generation_is_said_to_be_one():
    _, records = generate(model(), requests(lengths=(9, 16), max_gen_toks=80))
    assert [record["looping_or_cut_off"] for (record,) in records] == [False, True]


def test_repeats_have_their_own_randomness():
    asked = requests(lengths=(16,), repeats=2)
    lm = model(policy="random", budget=32, window=16)
    lm.generate_until([*asked, *asked, *asked], disable_tqdm=True)  # a lagging rank repeats its last request
    records = asked[0].args[1][RECORD]
    assert [record["stream"] for record in records] == [[0, 0], [0, 1]]
    assert records[0]["text"] != records[1]["text"]
    assert lm.run.generations == 2


def test_a_budget_that_was_never_reached_is_loud(caplog):
    lm = model(policy="vase_attnv", budget=256, window=16)
    with caplog.at_level(logging.WARNING):
        generate(lm, requests(lengths=(9,)))
    assert "NO EVICTION HAPPENED" in caplog.text
    assert "256" in caplog.text
    assert lm.get_model_info()["eviction"]["warning"]


def test_a_prompt_that_is_cut_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        generate(model(), requests(lengths=(16,), max_gen_toks=480))
    assert "cut to their last 32 tokens" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 64}, "without a policy"),
        ({"policy": "vase_atnv", "budget": 64}, "vase_attnv"),
        ({"policy": "snapkv", "budget": 60, "window": 16}, "multiple of window"),
        ({"policy": "snapkv", "budget": 64, "eviction_config": "somewhere"}, "not both"),
    ],
)
def test_bad_model_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        take_eviction_config(arguments)


@pytest.mark.parametrize(
    "argument", [{"tp_plan": "auto"}, {"mixed_precision_dtype": "bfloat16"}, {"delta": "x"}, {"autogptq": True}]
)
def test_arguments_that_would_be_ignored_are_refused(argument, monkeypatch):
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=f"{next(iter(argument))}=.* is not supported"):
        model(**argument)


def test_compiled_steps_are_for_caches_that_are_bounded(monkeypatch, caplog):
    reference = generate(model(3, **EVICTED), requests())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with pytest.raises(ValueError, match="compile must be true or false, got 'yes'"):
        model(compile="yes", **EVICTED)
    compiled, full = model(3, compile=True, **EVICTED), model(3, compile=True)
    assert "compile=true: a layer keeps everything" in caplog.text
    assert generate(compiled, requests()) == reference
    assert generate(full, requests()) == generate(model(3), requests())
    assert [lm.get_model_info()["eviction"]["compiled"] for lm in (compiled, full)] == [True, False]


def test_the_end_of_thinking_must_be_seen_in_decoded_text():
    assert model(think_end_token="</think>").think_end_token == "</think>"
    with pytest.raises(ValueError, match="does not appear in decoded text"):
        model(think_end_token="2")  # the end token
    with pytest.raises(ValueError, match="does not appear in decoded text"):
        model(think_end_token="[/THINK]")  # the tokenizer has no such characters


def test_thinking_is_taken_off_and_unfinished_thinking_is_no_answer():
    """With `think_end_token` tasks see what follows it; a response that was cut off in its thinking is empty."""
    asked = requests(lengths=(9, 16), max_gen_toks=80)
    texts, records = generate(model(think_end_token="</think>"), asked)
    whole, _ = generate(model(), requests(lengths=(9, 16), max_gen_toks=80))
    assert texts == [whole[0].rpartition("</think>")[2], ""]
    assert [record["answered"] for (record,) in records] == [True, False]
    assert [record["text"] for (record,) in records] == whole


def test_processes_that_a_launcher_dropped_are_noticed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="asked for 3 processes but this evaluation has 1"):
        model()


def test_ranks_do_not_wait_for_a_year(monkeypatch):
    handlers = []
    real = lm_module.Accelerator

    def accelerator(kwargs_handlers):
        handlers.extend(kwargs_handlers)
        return real(kwargs_handlers=kwargs_handlers)

    monkeypatch.setattr(lm_module, "Accelerator", accelerator)
    model()
    assert handlers[0].timeout == lm_module.RANK_TIMEOUT < timedelta(days=1)


def test_an_eviction_setting_is_read_from_a_directory(tmp_path):
    config = EvictionConfig(policy="snapkv", budget=64, window=16)
    config.save_pretrained(tmp_path)
    arguments = {"eviction_config": str(tmp_path), "dtype": "float32"}
    assert take_eviction_config(arguments) == config
    assert arguments == {"dtype": "float32"}
    assert not take_eviction_config({}).evicts


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 4}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 64}, {"assistant_model": "x"},
        {"no_repeat_ngram_size": 3}, {"typical_p": 0.9}, {"suppress_tokens": [1]},
    ],
)  # fmt: skip
def test_generation_that_cannot_evict_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        check_generation(setting)
    check_generation({"num_beams": 1, "do_sample": True})


def test_sampling_is_read_as_generate_would():
    """The task's settings, else the model's own, else transformers' defaults; a penalty also without sampling."""
    own = GenerationConfig(temperature=0.6, top_p=0.95, repetition_penalty=1.05)
    assert sampling_of({"do_sample": False, "temperature": 0.0}, own, 3) == Sampling(repetition_penalty=1.05, seed=3)
    drawn = sampling_of({"do_sample": True, "top_p": 0.8, "until": [], "max_gen_toks": 9, "num_beams": 1}, own, 0)
    assert drawn == Sampling(0.6, top_p=0.8, top_k=50, repetition_penalty=1.05)
    every = {"temperature": 0.5, "top_p": 0.7, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2}
    assert sampling_of({"do_sample": True, **every}, own, 0) == Sampling(**every)
    with pytest.raises(ValueError, match=r"temperature=0 draws nothing.*do_sample=False"):
        sampling_of({"do_sample": True, "temperature": 0}, own, 0)
    with pytest.raises(ValueError, match=r"tempature=0.5 is not a setting.*temperature.*remove it"):
        sampling_of({"do_sample": True, "tempature": 0.5}, own, 0)


def test_sampled_answers_do_not_depend_on_the_batch():
    settings = {"lengths": (9, 5, 7), "do_sample": True, "temperature": 1.2, "top_p": 0.9}
    reference = generate(model(3, **EVICTED), requests(**settings))
    assert generate(model(1, **EVICTED), requests(**settings)) == reference
    assert generate(model(3, **EVICTED, seed=1), requests(**settings)) != reference


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    reference = generate(model(**EVICTED), requests())
    journal = {"journal": str(tmp_path / "journal")}
    generate(model(2, **EVICTED, **journal), requests()[:3])
    path = tmp_path / "journal/completions.jsonl"
    assert len(path.read_text().splitlines()) == 3
    given = []
    forward = Qwen3ForCausalLM.forward
    monkeypatch.setattr(
        Qwen3ForCausalLM, "forward",
        lambda self, input_ids, **rest: given.append(input_ids.shape) or forward(self, input_ids, **rest),
    )  # fmt: skip
    assert generate(model(2, **EVICTED, **journal), requests()) == reference
    assert sum(shape[1] > 1 for shape in given) == 3  # prompts
    assert len(path.read_text().splitlines()) == 6
    given.clear()
    assert generate(model(3, **EVICTED, **journal), requests()) == reference
    assert not given


def test_command_line_errors(capsys):
    assert cli.main(["train"]) == 2
    assert cli.main(["lm-eval", "run", "--use_cache", "x"]) == 2
    assert "does not know the budget" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert "lm-eval" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", [["num_beams=4"], ["do_sample=true,num_beams=4"], ["temperature=0.5", "num_beams=4"], ['{"num_beams": 4}']]
)
def test_beam_search_is_refused_before_a_model_is_loaded(given, capsys, monkeypatch):
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    command = ["lm-eval", "run", "--model", "vkv", "--gen_kwargs", *given, "--tasks", "tiny_keyed_sum"]
    assert cli.main(command) == 2
    assert "num_beams=4 does not work with an evicting cache" in capsys.readouterr().err
    assert cli.generation_settings(["--gen_kwargs=top_p=0.9", "--tasks", "num_beams=4"]) == {"top_p": 0.9}


def test_a_models_own_generation_settings_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "config.json").write_text((MODEL_PATH / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"num_beams": 3}')
    with pytest.raises(ValueError, match="num_beams=3 does not work"):
        EvictionLM(str(tmp_path), **EVICTED)
    with pytest.raises(ValueError, match=r"pretrained=.*missing cannot be loaded"):
        EvictionLM(str(tmp_path / "missing"))


@pytest.mark.slow
def test_the_embedded_model_through_lm_eval(tmp_path):
    """Free generation solves the task with the full cache, and eviction breaks it: through the command."""
    scores = {}
    for name, eviction in (("full", ""), ("evicted", ",policy=vase_attnv,budget=80,window=16")):
        arguments = ["--model_args", f"pretrained={MODEL_PATH}{eviction}", "--tasks", "tiny_keyed_sum"]
        arguments += ["--limit", "60", "--batch_size", "30", "--output_path", str(tmp_path / name), "--log_samples"]
        status, printed = forked.lm_eval(tmp_path / f"{name}.log", *arguments)
        assert status == 0, printed
        (results,) = (tmp_path / name).rglob("results_*.json")
        (samples,) = (tmp_path / name).rglob("samples_*.jsonl")
        scores[name] = json.loads(results.read_text())["results"]["tiny_keyed_sum"]
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        assert len(rows) == 60
        assert all((row["evictions"] > 0) == (name == "evicted") for row in rows)
    assert scores["full"]["exact_match,none"] >= 0.97
    assert scores["evicted"]["exact_match,none"] < 0.4


def test_bad_model_arguments_are_one_sentence(tmp_path):
    arguments = ["--model_args", f"pretrained={MODEL_PATH},policy=snapkv,budget=60,window=16"]
    status, printed = forked.lm_eval(tmp_path / "log", *arguments, "--tasks", "tiny_keyed_sum")
    assert status == 2
    assert "vkvtrain lm-eval: budget (60) must be a multiple of window (16)" in printed.splitlines()[-1]
