"""Run published code on the inputs of `references.py` and write what it kept into `references.json`:

    python tests/record_references.py DIRECTORY

`DIRECTORY` holds a clone of each repository, `owner+name`. Their code is read at the recorded commit and run here; none
of it is part of this repository.
"""

import ast
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from references import BUDGET, FIXTURE, REFERENCES, SEEDS, VASE_LARGE, Inputs, Reference
from torch import Tensor

Kept = list[list[int]]
"""Slots kept of each KV head."""


def source(clones: Path, reference: Reference, path: str) -> str:
    """A file of the reference at its commit."""
    clone = clones / reference.repository.replace("/", "+")
    return subprocess.run(
        ["git", "-C", str(clone), "show", f"{reference.commit}:{path}"], capture_output=True, text=True, check=True
    ).stdout


def namespace(text: str, only: tuple[str, ...] = (), **given: Any) -> dict[str, Any]:
    """What a file defines; `only` these of its definitions, where the rest needs libraries that are not there."""
    tree = ast.parse(text)
    if only:
        tree.body = [node for node in tree.body if getattr(node, "name", None) in only]
    names = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "dataclass": dataclass, **given}
    names["__name__"] = "reference"
    sys.modules["reference"] = types.ModuleType("reference")  # dataclasses look their module up
    exec(compile(tree, "reference", "exec"), names)
    return names


def slots(kept: Tensor, held: Tensor) -> Kept:
    """Where each kept key lies among the keys held; both [1, Hkv, n, D]."""
    return [
        sorted(int((one == keys).all(-1).nonzero()) for one in head)
        for head, keys in zip(kept[0], held[0], strict=True)
    ]


@contextmanager
def recorded_randomness(inputs: Inputs, weights: list[list[list[float]]]) -> Iterator[None]:
    """torch's random functions replaced by the inputs' numbers; what is sampled by goes into `weights`."""

    def multinomial(flat: Tensor, count: int, replacement: bool) -> Tensor:
        assert not replacement
        weights.append(flat.tolist())
        return (flat.log() + inputs.gumbel[0]).topk(count).indices

    def rand(*shape: int, **kwargs: Any) -> Tensor:
        return inputs.uniform.view(shape)

    def randn(*shape: int, **kwargs: Any) -> Tensor:
        return inputs.gaussian.view(shape)

    with mock.patch.multiple(torch, multinomial=multinomial, rand=rand, randn=randn):
        yield


def vase(clones: Path, reference: Reference, inputs: Inputs, weights: list[Any]) -> Kept:
    mode = reference.function.rsplit(" ", 1)[1]
    text = source(clones, reference, reference.function.split(":")[0])
    layer = namespace(text)["EvictLayer"](
        0, BUDGET, reference.window, mode, rkv_lambda=0.5, smooth=True, verbose=False, n_large=VASE_LARGE
    )
    layer.dtype, layer.device = torch.float32, torch.device("cpu")
    layer.k_cache, layer.v_cache = (entries.transpose(1, 2).clone() for entries in (inputs.keys, inputs.values))
    layer.cache_seqlens = torch.tensor([reference.held], dtype=torch.int32)
    layer.queries = inputs.queries.clone()
    with recorded_randomness(inputs, weights):
        layer._run_eviction(reference.held)
    return slots(layer.k_cache[:, : BUDGET - reference.window].transpose(1, 2), inputs.keys)


def rkv(clones: Path, reference: Reference, inputs: Inputs, weights: list[Any]) -> Kept:
    functions = ("compute_attention_scores", "cal_similarity")
    helpers = namespace("import math\n" + source(clones, reference, "rkv/utils.py"))
    text = source(clones, reference, reference.function.split(":")[0])
    policy = namespace(text, ("R1KV",), **{name: helpers[name] for name in functions})["R1KV"]
    keys, _ = policy(budget=BUDGET, window_size=reference.window, mix_lambda=0.1).update_kv(
        inputs.keys, inputs.queries, inputs.values
    )
    return slots(keys[:, :, : -reference.window], inputs.keys)


def snapkv(clones: Path, reference: Reference, inputs: Inputs, weights: list[Any]) -> Kept:
    policy = namespace(source(clones, reference, reference.function.split(":")[0]))["SnapKVCluster"]
    earlier = inputs.queries.new_zeros(1, reference.heads[0], reference.held - reference.window, inputs.keys.shape[-1])
    keys, _ = policy(reference.window, BUDGET).update_kv(
        inputs.keys, torch.cat([earlier, inputs.queries], 2), inputs.values, None, 1
    )
    return slots(keys[:, :, : -reference.window], inputs.keys)


def tova(clones: Path, reference: Reference, inputs: Inputs, weights: list[Any]) -> Kept:
    policy = namespace(source(clones, reference, reference.function.split(":")[0]))["TOVACache"]
    cache = types.SimpleNamespace(cache_size=BUDGET, key_cache=[inputs.keys], value_cache=[inputs.values])
    group = reference.heads[0] // reference.heads[1]
    logits = inputs.queries @ inputs.keys.repeat_interleave(group, 1).mT / inputs.keys.shape[-1] ** 0.5
    policy.reduce(cache, 0, logits.softmax(-1))
    return slots(cache.key_cache[0], inputs.keys)


def h2o(clones: Path, reference: Reference, inputs: Inputs, weights: list[Any]) -> Kept:
    """A whole sequence, evicted token by token after a prompt of half the budget."""
    text = source(clones, reference, reference.function.split(":")[0])
    policy = namespace(text, ("H2OKVCache_LayerWise",))["H2OKVCache_LayerWise"](hh_size=BUDGET - 1, recent_size=1)
    prompt, held = BUDGET // 2, None
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, reference.held))]:
        new = (inputs.keys[:, :, start:end], inputs.values[:, :, start:end])
        held = new if held is None else tuple(torch.cat(both, 2) for both in zip(held, new, strict=True))
        logits = inputs.queries[:, :, start:end] @ held[0].mT / inputs.keys.shape[-1] ** 0.5
        if not start:
            logits += torch.full_like(logits, -torch.inf).triu(1)
        held = policy(held, logits.softmax(-1))
    assert held is not None
    return slots(held[0], inputs.keys)


def streaming(clones: Path, reference: Reference, inputs: Inputs, weights: list[Any]) -> Kept:
    policy = namespace(source(clones, reference, reference.function.split(":")[0]))["StartRecentKVCache"]
    ((keys, _),) = policy(start_size=4, recent_size=BUDGET - 4)([[inputs.keys, inputs.values]])
    return slots(keys[:, :, : -reference.window], inputs.keys)


def knorm(clones: Path, reference: Reference, inputs: Inputs, weights: list[Any]) -> Kept:
    compress = namespace(source(clones, reference, reference.function.split(":")[0]))["l2_compress"]
    candidates = inputs.keys[:, :, : -reference.window], inputs.values[:, :, : -reference.window]
    share = (BUDGET - reference.window) / candidates[0].shape[2]
    ((keys, _),) = compress([candidates], keep_ratio=share, prune_after=0)
    return slots(keys, inputs.keys)


def kvpress(clones: Path, reference: Reference, inputs: Inputs, weights: list[Any]) -> Kept:
    """Scores of a press, the highest kept as `ScorerPress.compress` does, the window apart."""
    name = reference.function.split("Press")[0].split("(")[0]
    text = source(clones, reference, f"kvpress/presses/{name.lower()}_press.py")
    parent = types.new_class("ScorerPress")
    modules = {"kvpress.presses.scorer_press": types.SimpleNamespace(ScorerPress=parent)}
    with mock.patch.dict(sys.modules, {"kvpress": types.ModuleType("kvpress"), **modules}):
        defined = namespace(text)
    press = eval(reference.function.removesuffix(".score") + ("()" if "(" not in reference.function else ""), defined)
    count = inputs.keys.shape[2] - (reference.window if name == "CUR" else 0)
    with recorded_randomness(inputs, weights):
        scores = press.score(None, None, inputs.keys[:, :, :count], inputs.values[:, :, :count], None, {})
    scores = scores[..., : inputs.keys.shape[2] - reference.window]
    return scores.topk(BUDGET - reference.window).indices.sort(-1).values[0].tolist()


RUNS: dict[str, Callable[[Path, Reference, Inputs, list[Any]], Kept]] = {
    "vase": vase, "rkv": rkv, "snapkv": snapkv, "tova": tova, "h2o": h2o, "streaming": streaming, "knorm": knorm,
    "kvpress": kvpress,
}  # fmt: skip


def main(clones: Path) -> None:
    recorded = {}
    for name, reference in REFERENCES.items():
        kept, weights = [], []
        for seed in SEEDS:
            kept.append(RUNS[name.split("/")[0]](clones, reference, reference.inputs(seed), weights))
        recorded[name] = {
            "repository": reference.repository, "commit": reference.commit, "function": reference.function,
            "kept": kept,
        }  # fmt: skip
        if weights:
            recorded[name]["weights"] = [[[float(f"{w:.6g}") for w in head] for head in one] for one in weights]
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in recorded.items()]
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
