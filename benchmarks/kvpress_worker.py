"""One side of against_kvpress.py, in a process of its own: kvpress and vkvtrain need different transformers.

    python benchmarks/kvpress_worker.py {kvpress,vkvtrain,compiled} MODEL PROMPT_TOKENS NEW_TOKENS BUDGET WINDOW THREADS

Decodes greedily, all sides by the same loop (`compiled` is vkvtrain with a compiled step), and prints one JSON object:
seconds and CPU seconds of decoding, entries held at the end, versions. The first steps, which compile, are not timed.
"""

import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM

WARM_UP = 4


def eager(model: Any, cache: Any, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Logits after one token."""
    return model(input_ids=token, position_ids=position, past_key_values=cache).logits


@torch.no_grad()
def main(side: str, name: str, prompt: int, tokens: int, budget: int, window: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    evicting: Any = nullcontext()
    if side == "kvpress":
        import kvpress  # type: ignore[reportMissingImports]
        from transformers import DynamicCache

        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        cache: Any = DynamicCache()
        # it asserts that more queries are buffered than SnapKV reads, so its window is half the interval
        snapkv = kvpress.SnapKVPress(window_size=window // 2)
        evicting = kvpress.DecodingPress(base_press=snapkv, compression_interval=window, target_size=budget)(model)
    else:
        from vkvtrain import EvictionCache, EvictionConfig

        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="vkvtrain").eval()
        cache = EvictionCache(EvictionConfig(policy="snapkv", budget=budget, window=window), model.config)
    ids = torch.randint(1, 40000, (1, prompt))
    with evicting:
        token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        forward: Any = partial(eager, model, cache)
        if side == "compiled":
            from vkvtrain.generation.decoders import Compiled

            forward = Compiled(model, cache, budget + window).forward
        began = used = 0.0
        for step in range(WARM_UP + tokens):
            if step == WARM_UP:
                began, used = time.perf_counter(), time.process_time()
            token = forward(token, torch.tensor([[prompt + step]]))[:, -1].argmax(-1, keepdim=True)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
    held = cache.stats()[0]["live_entries"] if side != "kvpress" else cache.layers[0].keys.shape[2]
    versions = {package: version(package) for package in ("torch", "transformers")}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "held": held, "versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
