"""The inputs on which published code was run, and the setting of ours that stands for each run.

What the published code kept is in `references.json`, written by `record_references.py`. Inputs come from NumPy's
`RandomState`, whose stream is frozen, so that they are the same wherever the test runs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURE = Path(__file__).with_name("references.json")
SEEDS = range(12)
BUDGET, WINDOW, HELD, DIM, RANK = 32, 8, 56, 16, 20
"""Of an event: entries kept, the window, entries held; head dimension; columns of random projections."""


@dataclass(frozen=True)
class Inputs:
    """One event, float32: all that a reference and a policy of ours read."""

    queries: Tensor
    """Of the window, [1, Hq, R, D]."""
    keys: Tensor
    """Of everything held, [1, Hkv, n, D]."""
    values: Tensor
    """[1, Hkv, n, D]."""
    gumbel: Tensor
    """Of each candidate, [1, Hkv, n - R]."""
    uniform: Tensor
    """Of each candidate, [1, Hkv, n - R]."""
    gaussian: Tensor
    """A random projection before its scaling, [1, D, RANK]."""


def make_inputs(seed: int, heads: tuple[int, int] = (4, 2), window: int = WINDOW, held: int = HELD) -> Inputs:
    """Keys with near-duplicates, values with outliers, and a last key that the last queries look at."""
    query_heads, kv_heads = heads
    random = np.random.RandomState(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape)).float()

    queries, keys, values = (normal(1, count, length, DIM) for count, length in (
        (query_heads, window), (kv_heads, held), (kv_heads, held)
    ))  # fmt: skip
    keys[:, :, 3:held:4] = keys[:, :, 1:held:4][:, :, : keys[:, :, 3:held:4].shape[2]] + 0.3 * normal(
        1, kv_heads, keys[:, :, 3:held:4].shape[2], DIM
    )
    keys[:, :, -1] = 2 * queries[:, :, -1].unflatten(1, (kv_heads, -1)).mean(2)
    values *= torch.exp(0.5 * normal(1, kv_heads, held, 1))
    uniform = torch.from_numpy(random.uniform(1e-6, 1 - 1e-6, (2, 1, kv_heads, held - window))).float()
    return Inputs(2 * queries, keys, values, -torch.log(-torch.log(uniform[0])), uniform[1], normal(1, DIM, RANK))


@dataclass(frozen=True)
class Reference:
    """A function of published code.

    Attributes:
        repository: its GitHub name.
        commit: the one that was run.
        function: what was run.
        setting: the setting of ours that keeps the same, beside budget and window.
        heads: query heads and KV heads.
        window, held: of the event.
    """

    repository: str
    commit: str
    function: str
    setting: dict[str, Any] = field(default_factory=dict)
    heads: tuple[int, int] = (4, 2)
    window: int = WINDOW
    held: int = HELD

    def inputs(self, seed: int) -> Inputs:
        return make_inputs(seed, self.heads, self.window, self.held)


def _vase(mode: str, **setting: Any) -> Reference:
    function = f"eval/reasoning_tasks/modified/transformers/cache_utils.py: EvictLayer._run_eviction, mode {mode}"
    return Reference("terarachang/VaSE", "bfa2692112c45da13e637b3eca03ee6516f9e0bb", function, setting)


def _kvpress(press: str, **setting: Any) -> Reference:
    return Reference("NVIDIA/kvpress", "8bb29b9c3078452a86d692f29123fa6c793e2b05", f"{press}.score", setting)


NO_SINKS = {"sinks": 0}
VASE_LARGE = 8
"""VaSE's `n_large`, a quarter of the budget."""
QUARTER = {"policy": "vase_attnv", "protected_fraction": VASE_LARGE / BUDGET}
REFERENCES = {
    "vase/attn": _vase("attn", policy="snapkv", **NO_SINKS),
    "vase/attn_sample": _vase("attn_sample", policy="snapkv", retention="sampled", **NO_SINKS),
    "vase/attn_rkv": _vase("attn_rkv", policy="rkv_vase", **NO_SINKS),
    "vase/range_attn": _vase("range_attn", **QUARTER, retention="top_k", **NO_SINKS),
    "vase/range_sample_attn": _vase("range_sample_attn", **QUARTER, **NO_SINKS),
    "vase/range_sink_sample_attn": _vase("range_sink_sample_attn", policy="vase_attnv"),
    "vase/var_sink_sample_attn": _vase("var_sink_sample_attn", policy="vase_attnv", measure="variance"),
    "vase/l2_sink_sample_attn": _vase("l2_sink_sample_attn", policy="vase_attnv", measure="l2"),
    "vase/attn_random": _vase("attn_random", **QUARTER, measure="random", retention="top_k", **NO_SINKS),
    "vase/cur_fixed_gauss": _vase("cur_fixed_gauss", policy="curdkv"),
    "vase/cur_resample_gauss": _vase("cur_resample_gauss", policy="vase_dkv"),
    "vase/evict_large_range": _vase("evict_large_range", policy="evict_large", **NO_SINKS),
    "rkv": Reference(
        "Zefan-Cai/R-KV", "d15c9767e67c2bd9807128fecc35223fa2484a69", "rkv/compression/r1_kv.py: R1KV.update_kv",
        {"policy": "rkv", **NO_SINKS},
    ),
    "snapkv": Reference(
        "FasterDecoding/SnapKV", "e216ddc84c5bd210378cbdbbba12ba02102aa640",
        "snapkv/monkeypatch/snapkv_utils.py: SnapKVCluster.update_kv", {"policy": "snapkv", **NO_SINKS}, heads=(2, 2),
    ),
    "tova": Reference(
        "schwartz-lab-NLP/TOVA", "9c7d09bfff64cfc92cfb5f9d7e138cb04866e5a7", "src/tova_cache.py: TOVACache.reduce",
        {"policy": "tova", **NO_SINKS}, window=1,
    ),
    "h2o": Reference(
        "FMInference/H2O", "ac75c2a8a9e76832b2a4139b9363373b56336bfb",
        "h2o_hf/utils_real_drop/modify_llama.py: H2OKVCache_LayerWise", {"policy": "h2o", **NO_SINKS}, heads=(2, 2),
        window=HELD + BUDGET, held=HELD + BUDGET,
    ),
    "streaming": Reference(
        "mit-han-lab/streaming-llm", "2e5042606d69933d88fbf909bd77907456b9b4dd",
        "streaming_llm/kv_cache.py: StartRecentKVCache", {"policy": "streaming"},
    ),
    "knorm": Reference(
        "alessiodevoto/l2compress", "f93d6ca2702d85a2db97d2ef350b44d955609761", "cache.py: l2_compress",
        {"policy": "knorm", **NO_SINKS},
    ),
    "kvpress/keydiff": _kvpress("KeyDiffPress", policy="keydiff", **NO_SINKS),
    "kvpress/curdkv": _kvpress("CURPress(use_random_leverage=True, use_local_approximation=False)", policy="curdkv"),
}  # fmt: skip
