"""`vkvtrain plan`: parameters against modules, memory against what autograd saves, FLOPs against torch's counter."""

import json
import re

import pytest
import torch
from families import tiny_family
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from vkvtrain import EvictionConfig, simulated_eviction
from vkvtrain.cli import main
from vkvtrain.events import events_of
from vkvtrain.planning.architecture import architecture_of, preset_names, read_architecture
from vkvtrain.planning.decoding import Decoding, roof
from vkvtrain.planning.devices import DEVICES, Device, find_device
from vkvtrain.planning.training import BYTES, Item, Workload, flops, keys_seen, memory, peak

NOWHERE = Device("nowhere", 1e12, 1e11, 1e9, "none", overhead=0.0)
PUBLISHED = {  # billions, as the models' cards and config files state them
    "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-14b": 14.8,
    "deepseek-r1-distill-qwen-7b": 7.6, "deepseek-r1-distill-llama-8b": 8.0, "phi-4-mini-reasoning": 3.8,
    "gpt-oss-20b": 20.9,
}  # fmt: skip


def values(items):
    return {item.name: item.value for item in items}


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_the_published_sizes(name):
    found = read_architecture(name)
    assert found.parameters / 1e9 == pytest.approx(PUBLISHED[name], abs=0.06)
    assert found.evicting == (12 if name == "gpt-oss-20b" else found.layers)
    assert found.heads % found.kv_heads == 0


def test_every_recipe_s_model_is_a_preset():
    assert set(PUBLISHED) == set(preset_names())


def test_a_mixture_of_experts_uses_few_of_its_parameters():
    found = read_architecture("gpt-oss-20b")
    assert found.active / 1e9 == pytest.approx(3.6, abs=0.1)  # "21B parameters with 3.6B active parameters"
    assert found.expert_share == 4 / 32
    assert found.intermediate == 4 * 2880


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Qwen2", "Phi3", "Qwen3-MoE", "gpt-oss"])
def test_shapes_are_those_of_the_modules(family):
    model = tiny_family(family, dtype=torch.float32)
    found = architecture_of(model.config, family, r=8)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert found.layer_parameters == sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 4, 2, 16)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert found.adapter == adapted.get_nb_trainable_parameters()[0]
    assert found.norms_heads is family.startswith("Qwen3")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Qwen2", "Phi3"])
def test_activations_are_what_autograd_saves(family, dtype):
    """Storages that the forward pass under eviction saves for the backward pass, weights left out."""
    model = tiny_family(family, dtype=getattr(torch, dtype))
    a = architecture_of(model.config, family, r=8)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    weights = {weight.untyped_storage().data_ptr() for weight in adapted.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    config, ids = EvictionConfig(policy="snapkv", budget=64, window=16), torch.randint(3, 40, (1, 512))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with simulated_eviction(adapted, config, [8]), hooks:
        adapted.base_model.model.get_decoder()(input_ids=ids, use_cache=False)
        w = Workload(512, 64, 16, r=8, weights=dtype, compute=dtype, checkpointing=False)
        expected = values(memory(a, w, NOWHERE))
        total = expected["activations"] + expected["lifetimes of the keys"]
        # Phi3's values are a view of its fused projection, all of which stays
        assert sum(saved.values()) == pytest.approx(total, rel=0.2 if family == "Phi3" else 0.06)


def test_matrix_products_are_what_torch_counts():
    model = tiny_family("Qwen3", dtype=torch.float32, attention="sdpa", vocab=64)
    a = architecture_of(model.config, "Qwen3", r=8)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    adapted.enable_input_require_grads()  # so that the first layer's products have a gradient of their inputs too
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=torch.randint(3, 40, (2, 128)), use_cache=False).logits.sum().backward()
    ops = {op.__name__.split(".")[0]: n for op, n in counter.get_flop_counts()["Global"].items()}
    products = ops.get("mm", 0) + ops.get("addmm", 0) + ops.get("bmm", 0)
    found = values(flops(a, Workload(128, None, rows=2, global_batch=2, r=8, checkpointing=False)))
    assert products == pytest.approx(found["matrix products"] + found["adapter"], rel=0.03)


@pytest.mark.parametrize(
    ("seq", "budget", "window"), [(300, 64, 16), (300, 64, 64 // 2), (40, 64, 16), (300, None, 16)]
)
def test_keys_seen_against_the_events(seq, budget, window):
    """Up to half a window for the position of the first event."""
    live, total = 0, 0
    events = {event.position for event in events_of(1, seq, budget, window)} if budget else set()
    for position in range(seq):
        live += 1
        total += live
        if position in events:
            live = budget
    assert keys_seen(seq, budget, window) == pytest.approx(total, rel=0.03)


def test_what_each_strategy_spreads():
    a = read_architecture("qwen3-0.6b")

    def found(strategy, gpus):
        return values(memory(a, Workload(4096, 1024, gpus=gpus, strategy=strategy, global_batch=16), DEVICES["h100"]))

    single = found("single", 1)
    assert found("ddp", 8) == single
    for strategy, spread in {
        "zero2": {"gradients", "optimiser"},
        "zero3": {"weights", "adapter", "gradients", "optimiser"},
        "fsdp2": {"weights", "adapter", "gradients", "optimiser"},
    }.items():
        eight = found(strategy, 8)
        assert {name for name in single if eight[name] == pytest.approx(single[name] / 8)} == spread
        assert ("gathered layers" in eight) is (strategy != "zero2")
        assert sum(eight.values()) < sum(single.values())


def test_checkpointing_and_eviction_in_the_plan():
    a = read_architecture("qwen3-1.7b")
    with_all, without = (Workload(16384, 2048, checkpointing=on) for on in (True, False))
    saved, kept = (values(memory(a, w, NOWHERE)) for w in (with_all, without))
    assert kept["activations"] == a.layers * saved["one layer's activations"]
    assert saved["layer inputs"] == 28 * 16384 * 2 * 2048
    assert saved["lifetimes of the keys"] == 8 * 28 * 8 * 16384
    dense = values(memory(a, Workload(16384, None), NOWHERE))
    assert dense == {name: value for name, value in saved.items() if name != "lifetimes of the keys"}
    work, again = (values(flops(a, w)) for w in (without, with_all))
    assert again["matrix products"] == 1.5 * work["matrix products"]
    assert work["attention"] < 0.3 * values(flops(a, Workload(16384, None, checkpointing=False)))["attention"]
    assert "teacher" in values(flops(a, Workload(16384, 2048, distil=True)))


def test_the_peak_has_one_phase_at_a_time():
    items = [Item("a", "", 10), Item("b", "", 3, "loss"), Item("c", "", 2, "backward"), Item("d", "", 2, "backward")]
    assert peak(items) == 14
    assert peak(items[:2]) == 13
    assert peak([]) == 0


def test_quantised_weights():
    a = read_architecture("qwen3-8b")
    weights = values(memory(a, Workload(1024, 512, weights="4bit"), NOWHERE))["weights"]
    head_and_embedding = 2 * 151936 * 4096
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    expected = (a.parameters - head_and_embedding - norms) * BYTES["4bit"] + 4 * (head_and_embedding + norms)
    assert weights == pytest.approx(expected)


def test_slots_and_the_roof():
    a = read_architecture("qwen3-8b")
    evicted, full = (roof(a, Decoding(32768, budget), DEVICES["h100"]) for budget in (4096, None))
    entry = 2 * 8 * 128 * 2 * 36
    assert values(evicted.items)["a slot"] == entry * (4096 + 64)
    assert values(full.items)["a slot"] == entry * 32768
    free = 0.9 * 80e9 - 1.5 * 2**30 - a.parameters * 2
    assert (evicted.slots, full.slots) == (int(free / entry / 4160), int(free / entry / 32768))
    seconds = (a.parameters * 2 + evicted.slots * entry * values(evicted.items)["entries read"]) / 3.35e12
    assert evicted.tokens_per_second == pytest.approx(evicted.slots / seconds)
    assert evicted.tokens_per_second > 4 * full.tokens_per_second
    short = [roof(a, Decoding(1000, budget), DEVICES["h100"]) for budget in (4096, None)]
    assert short[0].slots == short[1].slots  # nothing is ever evicted
    too_large = roof(read_architecture("qwen3-14b"), Decoding(32768, None), DEVICES["rtx4090"])
    assert (too_large.slots, too_large.tokens_per_second) == (0, 0)
    beside = roof(read_architecture("gpt-oss-20b"), Decoding(8192, 2048), DEVICES["h100"])
    assert values(beside.items)["a slot"] == 2 * 8 * 64 * 2 * (12 * (2048 + 64) + 12 * 128)


def test_the_cpu_is_measured():
    cpu = find_device("cpu")
    assert 1e9 < cpu.flops < 1e14
    assert 1e8 < cpu.bandwidth < 1e13
    assert "measured here" in cpu.source


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "plan.json"
    arguments = ["--model-config", "qwen3-8b", "--budget", "4096", "--gpus", "8", "--strategy", "fsdp2"]
    assert main(["plan", *arguments, "--output", str(path)]) == 0
    out = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    for words in (
        "8,190,735,360 parameters", "layers x tokens x 2 H 9.00", "fits: 26.0 of 74.5 GiB", "x slots",
        "NVIDIA H100 SXM5 data sheet", "2 KV heads D x 2 x (36 layers x min(seq, budget + window))",
    ):  # fmt: skip
        assert words in out, words
    written = json.loads(path.read_text())
    assert written["workload"]["strategy"] == "fsdp2"
    assert peak([Item(**item) for item in written["memory"]]) / 2**30 == pytest.approx(26.04, abs=0.01)
    assert "in short: 8 x h100, fsdp2: 26.0 GiB a device, 9 s a step at 40% of the peak" in out
    assert main(["plan", "--model-config", "qwen3-14b", "--device", "rtx4090"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_directory_is_a_model(tmp_path, capsys):
    tiny_family("Llama", dtype=torch.float32).config.save_pretrained(tmp_path)
    assert main(["plan", "--model-config", str(tmp_path), "--seq", "64", "--budget", "0"]) == 0
    assert "2 layers, 2 of them evict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model-config", "qwen3-8x"], r"no preset or directory 'qwen3-8x' \(did you mean 'qwen3-8b'\?\)"),
        (["--device", "h10"], r"no numbers for 'h10' \(did you mean"),
        (["--budget", "100"], r"budget \(100\) must be a multiple of window \(64\)"),
        (["--gpus", "2"], "--gpus 2 needs a strategy"),
        (["--gpus", "3", "--strategy", "ddp"], r"--global-batch \(16\) must be a multiple of --gpus \(3\)"),
        (["--rows", "17"], r"--rows \(17\) on 1 devices are more than --global-batch"),
        (["--mfu", "0"], "--mfu must be above 0"),
        (["--seq", "0"], "--seq must be at least 1"),
    ],
)
def test_bad_settings_are_refused(arguments, says, capsys):
    defaults = [] if "--model-config" in arguments else ["--model-config", "qwen3-0.6b"]
    assert main(["plan", *defaults, *arguments]) == 2
    assert re.search(says, capsys.readouterr().err.splitlines()[-1])
