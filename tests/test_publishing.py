"""Publishing a run: what is written stands on its own, tells nothing of this machine, and decodes as the run did."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_standin import TOKEN, Hub, Repository
from huggingface_hub import ModelCard, metadata_load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import vkvtrain
from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.cli import main
from vkvtrain.identity import adapter_hash
from vkvtrain.publishing.card import escaped
from vkvtrain.publishing.run import is_path
from vkvtrain.tiny import MODEL_PATH, task

EVICTION = EvictionConfig(policy="vase_attnv", budget=48, window=16)
PROMPTS = [problem.prompt for problem in task.problems("test", 0, 2)]


def row(model, budget, value, **changes):
    evicted = budget is not None
    return {
        "model": model, "cache": "evicted" if evicted else "full", "policy": "vase_attnv" if evicted else "full",
        "budget": budget, "compression": 2.5 if evicted else 1.0, "n": 200, "seed": 0,
        "exact_match": {"value": value, "low": value - 0.02, "high": value + 0.02}, "fact_match": value,
        "tokens": 130.0, "looping_or_cut_off": 0.01, "peak_kv_bytes": 65536 if evicted else 131072,
        "evictions": 6.0 if evicted else 0.0, **changes,
    }  # fmt: skip


RESULTS = [
    row("base", None, 0.97), row("base", 48, 0.12), row("dense_lora", 48, 0.2), row("eviction_lora", 48, 0.9),
    row("eviction_lora", None, 0.96),
]  # fmt: skip


def write_run(directory, name):
    """A finished run on the model `name`, as training leaves it, with an adapter that changes the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(MODEL_PATH if name == "tiny" else name)
    directory.mkdir(parents=True)
    recipe = {
        "model": {"name": str(name), "revision": None, "dtype": "auto"},
        "data": {"source": f"{directory}/private/traces.jsonl", "rows": 100},
        "eviction": {"policy": "vase_attnv", "budget": [48, 64], "window": 16},
        "training": {"objective": "sft", "steps": 3},
        "output": str(directory),
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (directory / "environment.json").write_text(json.dumps({"python": "3.11", "torch": "2.13", "git": None}))
    EVICTION.save_pretrained(directory)
    AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(directory)
    adapted.save_pretrained(directory)
    (directory.parent / "results.json").write_text(json.dumps(RESULTS))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which `acme/tiny` names a model, as a repository on the Hub would, and two runs on it."""
    root = tmp_path_factory.mktemp("publishing")
    shutil.copytree(MODEL_PATH, root / "acme/tiny")
    write_run(root / "runs/eviction_lora", "tiny")
    write_run(root / "local/eviction_lora", root / "acme/tiny")
    return root


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def publish(*arguments):
    assert main(["publish", *map(str, arguments)]) == 0


def refused(capsys, *arguments):
    """The one sentence on standard error, beside bars of progress."""
    capsys.readouterr()
    assert main(["publish", *map(str, arguments)]) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert all(bar.lstrip().startswith(("Loading weights", "Writing model")) or not bar.strip() for bar in progress)
    return line


@pytest.fixture(scope="module")
def adapter(place):
    publish(place / "local/eviction_lora", "--to", place / "out/adapter", "--base-name", "acme/tiny")
    return place / "out/adapter"


@pytest.fixture(scope="module")
def merged(place):
    publish(place / "runs/eviction_lora", "--to", place / "out/merged", "--merge")
    return place / "out/merged"


def decode(model, tokenizer, sample=True, **arguments):
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    torch.manual_seed(3)
    settings = {"do_sample": True, "temperature": 0.8} if sample else {"do_sample": False}
    return model.generate(**batch, max_new_tokens=150, **settings, **arguments).tolist()


def evicting(model, eviction):
    return EvictionCache(eviction, model.config)


# What a process that has imported nothing of ours decodes with `custom_generate`, and what `load` then gives.
FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts, directories = json.loads(sys.argv[1]), json.loads(sys.argv[2])
assert "vkvtrain" not in sys.modules
found = {name: {} for name in directories}
def decode(name, kind, model, **arguments):
    torch.manual_seed(3)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=150, do_sample=True, temperature=0.8, **arguments)
    found[name][kind] = out.tolist()
for name, directory in directories.items():
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    decode(name, "custom", model, custom_generate=directory, trust_remote_code=True)
    found[name]["attention"] = model.config._attn_implementation
    if name == "merged":
        decode(name, "replaced", model)
import vkvtrain
assert "vkvtrain.loading" not in sys.modules  # only when it is used
for name, directory in directories.items():
    model, tokenizer, eviction = vkvtrain.load(directory, device="cpu")
    decode(name, "load", model, past_key_values=vkvtrain.EvictionCache(eviction, model.config))
print(json.dumps(found))
"""


def fresh(script, *arguments, cwd=None, **environment):
    """The JSON that a script prints last, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment}, cwd=cwd, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def decoded(place, adapter, merged):
    """By publication, what a fresh process decodes."""
    return fresh(FRESH, json.dumps(PROMPTS), json.dumps({"adapter": str(adapter), "merged": str(merged)}), cwd=place)


@pytest.mark.slow
def test_an_adapter_decodes_the_same_in_a_fresh_process(place, decoded):
    base = AutoModelForCausalLM.from_pretrained("acme/tiny", attn_implementation="vkvtrain")
    model = PeftModel.from_pretrained(base, place / "local/eviction_lora").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "local/eviction_lora")
    expected = decode(model, tokenizer, past_key_values=evicting(model, EVICTION))
    assert decoded["adapter"] == {"custom": expected, "attention": "sdpa", "load": expected}
    assert expected != decode(model, tokenizer)  # the cache made a difference


@pytest.mark.slow
def test_merged_weights_decode_the_same_in_a_fresh_process(place, decoded):
    model, tokenizer, eviction = vkvtrain.load(place / "runs/eviction_lora", device="cpu")
    expected = decode(model.merge_and_unload(), tokenizer, past_key_values=evicting(model, EVICTION))
    wanted = {"custom": expected, "replaced": expected, "attention": "sdpa", "load": expected}
    assert decoded["merged"] == wanted
    assert eviction == EVICTION


def test_the_published_setting_can_be_changed_and_the_sequence_continued(merged):
    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    arguments = {"custom_generate": str(merged), "trust_remote_code": True, "do_sample": False}
    first = model.generate(
        **batch, **arguments, max_new_tokens=60, return_dict_in_generate=True,
        eviction={"policy": "streaming", "budget": 32}, streams=[5, 7],
    )  # fmt: skip
    cache = first.past_key_values
    assert cache.config == EvictionConfig(policy="streaming", budget=32, window=16)
    seen = cache.get_seq_length()
    mask = torch.cat([batch.attention_mask, torch.ones_like(first.sequences[:, batch.input_ids.shape[1] :])], 1)
    more = model.generate(
        input_ids=first.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=20, **arguments
    )
    assert cache.get_seq_length() > seen
    assert more.shape[1] > first.sequences.shape[1]
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="beam search"):
        model.generate(**batch, **arguments, max_new_tokens=5, num_beams=2)
    assert model.config._attn_implementation == "sdpa"  # put back after an error too


def test_without_trust_no_code_runs(merged):
    model = AutoModelForCausalLM.from_pretrained(merged)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(torch.tensor([[1]]), custom_generate=str(merged), trust_remote_code=False)


def test_merged_weights_are_a_plain_model(merged, place):
    """What transformers and other engines read: names of the base model's tensors, and its configuration."""
    base = load_file(MODEL_PATH / "model.safetensors")
    weights = load_file(merged / "model.safetensors")
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in base.items()}
    config, before = (json.loads((directory / "config.json").read_text()) for directory in (merged, MODEL_PATH))
    assert config | {"transformers_version": ""} == before | {"transformers_version": ""}
    assert not any("attn_implementation" in key for key in config)
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    adapted, tokenizer, _ = vkvtrain.load(place / "runs/eviction_lora", device="cpu")
    ids = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    torch.testing.assert_close(plain(**ids).logits, adapted(**ids).logits, atol=2e-4, rtol=1e-4)
    assert (plain(**ids).logits - AutoModelForCausalLM.from_pretrained(MODEL_PATH)(**ids).logits).abs().max() > 0.1


VLLM = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM",
        "GraniteForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma2ForCausalLM",
        "Gemma3ForCausalLM", "GptOssForCausalLM")  # fmt: skip
"""Architectures of vLLM's registry (`vllm/model_executor/models/registry.py`) that this package supports."""


def test_merged_configuration_has_what_vllm_reads(merged):
    config = json.loads((merged / "config.json").read_text())
    assert set(config["architectures"]) <= set(VLLM)
    needed = ("model_type", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps",
              "rope_parameters", "tie_word_embeddings", "hidden_act")  # fmt: skip
    assert [name for name in needed if config.get(name) is None] == []
    assert (merged / "tokenizer.json").is_file()
    assert "auto_map" not in config  # no code of its own to trust


def files(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_files_are_those_that_are_needed_and_tell_no_paths(place, adapter, merged):
    both = {"README.md", "eviction_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "custom_generate/generate.py", "custom_generate/requirements.txt"}  # fmt: skip
    assert files(adapter) == both | {"adapter_config.json", "adapter_model.safetensors"}
    assert files(merged) == both | {"config.json", "model.safetensors"}
    for directory in (adapter, merged):
        for name in files(directory):
            content = (directory / name).read_bytes()
            assert str(place).encode() not in content, name
            assert str(MODEL_PATH).encode() not in content, name
        assert EvictionConfig.from_pretrained(directory) == EVICTION
        code: dict = {"__name__": "published"}
        exec(compile((directory / "custom_generate/generate.py").read_text(), "generate.py", "exec"), code)
        assert EvictionConfig(**code["EVICTION"]) == EVICTION
        assert (directory / "custom_generate/requirements.txt").read_text() == "vkvtrain\n"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"


def test_card_shows_what_was_measured(adapter, merged):
    card = ModelCard.load(adapter / "README.md")
    found = {(r.metric_type, r.metric_args["cache"]): r for r in card.data.eval_results}
    assert set(found) == {(metric, cache) for metric in ("exact_match", "fact_match") for cache in ("full", "evicted")}
    evicted = found["exact_match", "evicted"]
    assert evicted.metric_value == 0.9
    assert evicted.metric_args | {"low": 0.88, "high": 0.92, "budget": 48, "n": 200} == evicted.metric_args
    metadata = metadata_load(adapter / "README.md")
    assert (metadata["license"], metadata["base_model"]) == ("apache-2.0", "acme/tiny")
    assert (metadata["base_model_relation"], metadata["library_name"]) == ("adapter", "peft")
    lines = card.text.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 2 + len(RESULTS)
    assert r"| dense\_lora | unnamed task | evicted, vase\_attnv | 48 | 2.50x |" in table[4]
    assert r"eviction\_lora (this model)" in table[5]
    assert "90.0% [88.0%, 92.0%]" in table[5]
    assert "| 2.00x |" in table[5]
    assert "not measured" not in card.text
    assert "traces.jsonl" in card.text
    assert 'vkvtrain.load("adapter")' in card.text
    assert "embedded in vkvtrain" in (merged / "README.md").read_text()
    assert "base_model" not in metadata_load(merged / "README.md")


def test_card_names_the_controls_that_are_missing(place, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps([r for r in RESULTS if r["model"] == "eviction_lora"]))
    publish("runs/eviction_lora", "--to", tmp_path / "out", "--merge", "--results", results)
    text = (tmp_path / "out/README.md").read_text()
    missing = "the base model with the full cache; the base model evicted by vase\\_attnv at budget 48; a dense-"
    assert f"**Controls that were not measured:** {missing}" in text


def test_card_of_an_unmeasured_model_says_so(tmp_path):
    publish("runs/eviction_lora", "--to", tmp_path / "out", "--merge", "--not-evaluated")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "**Not evaluated.**" in card.text
    assert card.data.eval_results is None


def test_text_from_data_is_escaped(tmp_path):
    hostile = "x|y <script>alert(1)</script> [a](http://b) `c`\n# d"
    results = tmp_path / "results.json"
    results.write_text(json.dumps([*RESULTS, row(hostile, 48, 0.5, task=hostile)]))
    publish("runs/eviction_lora", "--to", tmp_path / "out", "--merge", "--results", results)
    text = ModelCard.load(tmp_path / "out/README.md").text
    (line,) = [line for line in text.splitlines() if "alert" in line]
    assert line.count(" | ") == text.splitlines()[text.splitlines().index(line) - 1].count(" | ")
    assert "<script>" not in text
    assert "\n# d" not in text
    assert escaped(" a*b_c ") == r" a\*b\_c "


MERGE = ["runs/eviction_lora", "--to", "x", "--merge"]
BAD_ARGUMENTS = {
    "give --to DIRECTORY, --push user/name, or both": ["runs/eviction_lora"],
    "--public is about --push": [*MERGE, "--public"],
    "holds no finished run (adapter_model.safetensors is missing)": ["runs", "--to", "x"],
    "which is not on the Hub, so nobody could load this adapter: pass --merge": MERGE[:-1],
    "which others do not have: say what it is on the Hub with --base-name": ["local/eviction_lora", "--to", "x"],
    "holds something else: choose another directory": ["runs/eviction_lora", "--to", "acme", "--merge"],
    "choose another directory, or pass --overwrite": ["runs/eviction_lora", "--to", "out/merged", "--merge"],
    "--results 'none.json' cannot be read": [*MERGE, "--results", "none.json"],
    "no row of model 'mine': say which one this run is with --results-model (there are: base, dense_lora, eviction": [
        *MERGE, "--results-model", "mine",
    ],
    "exclude each other": [*MERGE, "--results", "results.json", "--not-evaluated"],
}  # fmt: skip


@pytest.mark.parametrize(("sentence", "arguments"), BAD_ARGUMENTS.items())
def test_bad_arguments_are_one_sentence(merged, capsys, sentence, arguments):
    assert sentence in refused(capsys, *arguments)
    assert not Path("x").exists()


BAD_RESULTS = {
    "is not valid JSON": "{",
    "with the full cache only: evaluate it under eviction too, or pass --not": [row("eviction_lora", None, 0.9)],
    "row 2: cache: Field required": [row("eviction_lora", 48, 0.9), {"model": "x"}],
    "row 1: exact_match.value: Input should be a finite number": [row("eviction_lora", 48, float("nan"))],
}


@pytest.mark.parametrize(("sentence", "results"), BAD_RESULTS.items())
def test_results_that_are_none_are_refused(tmp_path, capsys, sentence, results):
    path = tmp_path / "results.json"
    path.write_text(results if isinstance(results, str) else json.dumps(results))
    assert sentence in refused(capsys, "runs/eviction_lora", "--to", "x", "--merge", "--results", path)


@pytest.mark.parametrize(
    "text",
    ["/data/x", "~/x", "./x", "data/x.jsonl", "x.parquet", "acme/tiny", "models/a/b", "/my home/data"],
)
def test_paths_are_told_from_other_settings(text):
    assert is_path(text)


@pytest.mark.parametrize(
    "text", ["org/name", "tiny:keyed_sum", "/no_think", "in km/h, or m/s", "all-linear", "</think>", "x" * 9999]
)
def test_other_settings_are_no_paths(text):
    assert not is_path(text)


def test_a_data_set_on_the_hub_is_named(tmp_path):
    run = changed_run(tmp_path)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["source"] = "acme/traces"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    publish(run, "--base-name", "acme/tiny", "--not-evaluated", "--to", tmp_path / "out")
    assert metadata_load(tmp_path / "out/README.md")["datasets"] == ["acme/traces"]
    assert "Training data: `acme/traces`." in (tmp_path / "out/README.md").read_text()


def changed_run(tmp_path, source="local/eviction_lora", **model):
    """A copy of a run, its recipe's `model` section changed."""
    shutil.copytree(source, tmp_path / "eviction_lora")
    path = tmp_path / "eviction_lora/recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["model"].update(model)
    path.write_text(yaml.safe_dump(recipe))
    return tmp_path / "eviction_lora"


def test_a_run_without_an_evaluation_is_refused(tmp_path, capsys):
    run = changed_run(tmp_path, "runs/eviction_lora")
    assert "has no evaluation (results.json in it or beside it): give one with --results" in refused(
        capsys, run, "--to", tmp_path / "x", "--merge"
    )


def test_results_of_other_weights_are_refused(tmp_path, capsys):
    run = changed_run(tmp_path)
    path = tmp_path / "measured.json"
    for adapter, fits in ((adapter_hash(run), True), ("another", False), (None, True)):
        path.write_text(json.dumps([{**row, "adapter": adapter} for row in RESULTS]))
        given = [run, "--to", tmp_path / "out", "--base-name", "acme/tiny", "--results", path, "--overwrite"]
        if fits:
            publish(*given)
        else:
            assert "measured other weights than those that the run holds now: evaluate it" in refused(capsys, *given)
    said = capsys.readouterr().err
    assert "older than the adapter" not in said


def test_pickles_are_refused(tmp_path, capsys):
    run = changed_run(tmp_path)
    (run / "training_args.bin").write_bytes(b"")
    assert "training_args.bin, which is a pickle" in refused(capsys, run, "--to", tmp_path / "x", "--base-name", "a/b")


def test_a_licence_that_is_not_known_is_asked_for(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(MODEL_PATH, base)
    (base / "README.md").unlink()
    run = changed_run(tmp_path, name=str(base))
    arguments = [run, "--to", tmp_path / "out", "--base-name", "acme/tiny", "--not-evaluated"]
    assert "pass --license as its page on the Hub says" in refused(capsys, *arguments)
    publish(*arguments, "--license", "mit")
    assert metadata_load(tmp_path / "out/README.md")["license"] == "mit"
    assert "`mit`, as given by the publisher (`acme/tiny`, whose own" in (tmp_path / "out/README.md").read_text()


def test_quantized_and_gguf_bases_are_not_merged(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(MODEL_PATH, base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    run = changed_run(tmp_path, name=str(base))
    arguments = [run, "--base-name", "acme/tiny", "--not-evaluated", "--to", tmp_path / "out"]
    assert "needs a base model that is not quantized, and 'acme/tiny' is" in refused(capsys, *arguments, "--merge")
    (base / "model.safetensors").rename(base / "model.gguf")
    assert "holds GGUF: convert it first" in refused(capsys, *arguments, "--merge")


def test_a_path_that_would_be_published_stops_it(tmp_path, capsys):
    run = changed_run(tmp_path)
    config = json.loads((run / "tokenizer_config.json").read_text())
    (run / "tokenizer_config.json").write_text(json.dumps({**config, "vocabulary_of": str(run)}))
    arguments = [run, "--base-name", "acme/tiny", "--not-evaluated", "--to", tmp_path / "out"]
    assert "tokenizer_config.json would publish the path" in refused(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eviction_lora"]  # nothing half-written stays


def test_publishing_again_replaces_the_earlier_publication(tmp_path):
    arguments = ["runs/eviction_lora", "--to", tmp_path / "out", "--merge"]
    publish(*arguments)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    (tmp_path / "out/stray.txt").write_text("")
    publish(*arguments, "--overwrite")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before


PUSH_AND_LOAD = """
import json, os, sys
from vkvtrain.cli import main
command = ["publish", "local/eviction_lora", "--push", "acme/adapter", "--base-name", "acme/tiny", "--public"]
assert main(command) == 0
os.chdir(sys.argv[1])  # where acme/tiny is no directory
import vkvtrain
model, tokenizer, eviction = vkvtrain.load("acme/adapter", device="cpu")
print(json.dumps([type(model).__name__, eviction.budget, tokenizer.vocab_size]))
"""


@pytest.mark.slow
def test_push_and_load_from_a_hub(place, tmp_path):
    """Through the command line and HF_ENDPOINT: push an adapter, load it and its base from there."""
    with Hub() as hub:
        base = {path.name: path.read_bytes() for path in MODEL_PATH.iterdir()}
        hub.repositories["acme/tiny"] = Repository(private=False, files=base)
        found = fresh(
            PUSH_AND_LOAD, tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1",
        )  # fmt: skip
    assert found == ["PeftModelForCausalLM", 48, 37]
    assert not hub.repositories["acme/adapter"].private
    assert hub.repositories["acme/adapter"].files.keys() == files(place / "local/eviction_lora/published") | {
        ".gitattributes"
    }
    assert 'vkvtrain.load("acme/adapter")' in (place / "local/eviction_lora/published/README.md").read_text()


def test_the_package_has_no_other_attributes():
    assert callable(vkvtrain.load)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vkvtrain.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: (d / "eviction_config.json").unlink(), "has no eviction_config.json"),
        (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "adapter_model.safetensors"),
    ],
    ids=["no setting", "pickle"],
)
def test_what_cannot_be_loaded_is_said(adapter, tmp_path, change, sentence):
    shutil.copytree(adapter, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(ValueError, match=sentence):
        vkvtrain.load(tmp_path / "copy")
