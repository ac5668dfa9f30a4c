"""The recipes of people's models: a step on a tiny random model of each architecture, and headers that hold."""

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro
from chat_templates import chat_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from vkvtrain.planning.architecture import PRESETS, preset_names, read_architecture
from vkvtrain.planning.command import EstimateArguments, make_estimate, summary, workload
from vkvtrain.planning.devices import find_device
from vkvtrain.training.overrides import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
TEMPLATES = {"qwen3": "qwen3", "deepseek": "deepseek_r1", "phi": "phi4", "gpt": "gpt_oss"}
NAMES = preset_names()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """OpenR1-Math's columns, with a wrong generation before the right one; the last problem has no right one."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = []
    for number in range(8):
        thoughts = "".join(rng.choices("0123456789 +=", k=rng.randint(150, 250)))
        lines.append({
            "problem": f"What is {number} + {number}?",
            "generations": ["<think>\nno\n</think>\n\n0", f"<think>\n{thoughts}\n</think>\n\n\\boxed{{{2 * number}}}"],
            "correctness_math_verify": [False, number != 7], "is_reasoning_complete": [True, True],
        })  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tiny_model(name, directory):
    """A random model of a recipe's architecture, two layers, with a tokenizer whose template treats thoughts alike."""
    tokenizer = chat_tokenizer(TEMPLATES[name.split("-")[0]])
    values = json.loads((PRESETS / f"{name}.json").read_text()) | {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer), "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if name.startswith("phi"):  # as the real one: longrope, with a switch that the rows cross
        switch = {"original_max_position_embeddings": 64}
        values |= switch
        factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * place for place in range(8)]}
        values |= {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "longrope", **factors, **switch}}
    if "layer_types" in values:
        values |= {"layer_types": values["layer_types"][:2], "sliding_window": 32, "num_local_experts": 4}
        values |= {"num_experts_per_tok": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def test_every_model_has_a_recipe():
    assert {path.parent.name for path in RECIPES.glob("*/vase.yaml")} == {*NAMES, "tiny", "smollm2"}


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_takes_a_step_on_a_tiny_model_of_the_architecture(name, rows, finetune, tmp_path, capsys):
    """Everything is as in the recipe but the model's size, the data and the budgets."""
    tiny_model(name, tmp_path / "model")
    status = finetune([
        str(RECIPES / name / "vase.yaml"), "--dry-run", "--model.name", str(tmp_path / "model"), "--model.dtype",
        "float32", "--source", str(rows), "--config", "null", "--rows", "6", "--held_out", "2", "--budget", "[64, 96]",
        "--window", "16", "--output", str(tmp_path / "run"),
    ])  # fmt: skip
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert not (tmp_path / "run").exists()
    out = captured.out
    assert "distill (forward_kl)" in out
    assert "1 without a correct generation" in out
    (step,) = re.findall(
        r"^one step +row \d+ of \d+ tokens: loss (\d+\.\d+), (\d+) evictions at budget", out, re.MULTILINE
    )
    assert float(step[0]) > 0
    assert int(step[1]) >= 1
    loss = out[out.index("loss     |") :]
    think = "<|channel|>analysis<|message|>" if name == "gpt-oss-20b" else "<think>\n"
    opened = name.startswith("deepseek")  # by the prompt
    assert ("<think>\n" in out[: out.index("loss     |")]) is opened
    assert loss.count("<think>") == (0 if opened or name == "gpt-oss-20b" else 1)
    assert opened or think in loss
    assert re.search(r"\\boxed\{\d+\}(<\|im_end\|>|<eos>|<\|end\|>|<\|return\|>)", loss)


@pytest.mark.parametrize("name", NAMES)
def test_headers_state_what_the_plan_says(name):
    header = (RECIPES / name / "vase.yaml").read_text()
    recipe = load_recipe(RECIPES / name / "vase.yaml")
    (command,) = re.findall(r"^#   vkvtrain plan (.*)$", header, re.MULTILINE)
    arguments = tyro.cli(EstimateArguments, args=shlex.split(command))
    assert (arguments.seq, arguments.budget) == (recipe.data.max_length, recipe.eviction["budget"][0])
    assert (arguments.r, arguments.global_batch) == (recipe.lora.r, recipe.training.global_batch)
    assert (arguments.rows, arguments.objective) == (recipe.training.batch_per_device, recipe.training.objective)
    w, device = workload(arguments), find_device(arguments.device)
    stated = summary(
        make_estimate(read_architecture(name, recipe.lora.r), w, device, arguments.mfu), w, device, arguments.mfu
    )
    assert f"#   {stated}\n" in header
    assert f"recipes/{name}/vase.yaml" in header
    (launch,) = re.findall(r"--config_file (\S+)", header)
    assert (RECIPES.parent / launch).is_file()
