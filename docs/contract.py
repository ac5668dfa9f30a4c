"""Draw the eviction contract from a real run: `docs/contract.png`.

    python docs/contract.py

The embedded model reads one problem with its response twice: in one parallel pass under simulated eviction, and token
by token with the evicting cache. The left panel shows what each query sees in the first (`j <= i < evict_at[j]`), the
right panel what the cache holds when each token of the second attends. The script stops if the two are not the same.
"""

from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionCache, EvictionConfig, simulated_eviction
from vkvtrain.events import events_of
from vkvtrain.support import ATTENTION
from vkvtrain.tiny import MODEL_PATH, task

CONFIG = EvictionConfig(policy="vase_attnv", budget=32, window=8, sinks=2)
LAYER, HEAD = 1, 0
COLOURS = {
    "not seen yet": "#ffffff",
    "evicted": "#e9e9ec",
    "prompt": "#4c78a8",
    "response": "#72b7b2",
    "window": "#f2a93b",
}
"""Of a key at the time of a query; `window`: the newest entries, which no event drops."""
ABSENT, EVICTED, PROMPT, RESPONSE, WINDOW = range(len(COLOURS))


def states(held: Tensor, prompt: int) -> Tensor:
    """The state of each key at each query, int64 [S, S] by (key, query).

    Args:
        held: whether a query sees a key, bool [S, S] by (key, query).
        prompt: tokens of the prompt.
    """
    position = torch.arange(len(held))
    key, query = position[:, None], position
    written = torch.where(key < prompt, PROMPT, RESPONSE)
    state = torch.where(held, written, torch.where(key <= query, EVICTED, ABSENT))
    return torch.where(held & (key > query - CONFIG.window) & (query >= prompt), WINDOW, state)


@torch.no_grad()
def simulated(model: torch.nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """What each query sees in the parallel pass, bool [S, S] by (key, query)."""
    with simulated_eviction(model, CONFIG, [prompt]) as trace:
        model(input_ids=ids)
    evict_at = trace.evict_at[LAYER][0, HEAD]
    position = torch.arange(ids.shape[1])
    return (position[:, None] <= position) & (position < evict_at[:, None])


@torch.no_grad()
def decoded(model: torch.nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """What the cache holds when each query attends, bool [S, S] by (key, query); the prompt is causal."""
    length = ids.shape[1]
    held = torch.ones(length, length, dtype=torch.bool).triu()
    cache = EvictionCache(CONFIG, model.config)
    model(input_ids=ids[:, :prompt], past_key_values=cache)
    for query in range(prompt, length):
        held[:, query] = False
        held[cache.positions(LAYER, 0)[HEAD], query] = True
        held[query, query] = True  # written before it attends
        model(input_ids=ids[:, query : query + 1], position_ids=torch.tensor([[query]]), past_key_values=cache)
    return held


def draw(panels: dict[str, Tensor], prompt: int, path: Path) -> None:
    """One panel for each pass, and below it how many entries the cache holds."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, squeeze=False, height_ratios=[4, 1])
    colours = ListedColormap(list(COLOURS.values()))
    for column, (title, held) in enumerate(panels.items()):
        length = len(held)
        above, below = axes[:, column]
        above.imshow(states(held, prompt), cmap=colours, vmin=0, vmax=len(COLOURS) - 1, aspect="auto")
        below.step(range(length), held.sum(0), where="mid", color="#333333", linewidth=1)
        assert CONFIG.budget is not None
        for entries, name in ((CONFIG.budget, "budget"), (CONFIG.budget + CONFIG.window, "budget + window")):
            below.axhline(entries, color="#999999", linewidth=0.8, linestyle=":")
            below.annotate(name, (0, entries), va="bottom", fontsize=8, color="#666666")
        for event in events_of(prompt, length, CONFIG.budget, CONFIG.window):
            for each in (above, below):
                each.axvline(event.position + 0.5, color="#e45756", linewidth=0.8)
        above.axhline(CONFIG.sinks - 0.5, color="#333333", linewidth=0.6)
        above.set_title(title, fontsize=10)
        above.set_ylabel("key position (the first two are sinks)")
        below.set_ylabel("entries held")
        below.set_xlabel("query position (time)")
        below.set_ylim(0, CONFIG.budget + CONFIG.window + 12)
    patches = [Patch(facecolor=colour, edgecolor="#aaaaaa", label=name) for name, colour in COLOURS.items()]
    patches.append(Patch(facecolor="#e45756", label="eviction event"))
    figure.legend(handles=patches, ncols=len(patches), loc="outside lower center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, attn_implementation=ATTENTION, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    problem = task.problem("test", 0, 0, pairs=10)
    prompt = tokenizer(problem.prompt).input_ids
    response = tokenizer(problem.response, add_special_tokens=False).input_ids
    ids = torch.tensor([prompt + response])
    training, decoding = simulated(model, ids, len(prompt)), decoded(model, ids, len(prompt))
    if not torch.equal(training, decoding):
        raise SystemExit("training and decoding do not see the same entries")
    panels = {"training: what each query sees, from evict_at": training, "decoding: what the cache holds": decoding}
    path = Path(__file__).with_name("contract.png")
    draw(panels, len(prompt), path)
    print(f"written: {path} ({ids.shape[1]} tokens, layer {LAYER}, KV head {HEAD})")


if __name__ == "__main__":
    main()
