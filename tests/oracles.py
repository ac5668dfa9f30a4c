"""Every policy once more, from its published formula, in NumPy and by loops: one sequence, one KV head at a time.

Nothing here is shared with the package but the random numbers. `Event` is one eviction event of one sequence, a score
is a function of an event and a KV head, `kept` is the selection, and `walk` a whole sequence.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Event:
    """What a policy may read, float64: queries [Hq, R, D], keys and values [Hkv, C, D], window keys [Hkv, R, D]."""

    positions: NDArray[np.int64]
    """[Hkv, C]."""
    queries: Array
    keys: Array
    values: Array
    window_keys: Array
    mass: Array
    """[Hkv, C]."""
    gumbel: Array
    """[Hkv, C]."""
    uniform: Array
    """[Hkv, C]."""
    projection: Callable[[int, bool], Array]
    """(rank, drawn afresh at every event) -> [D, rank]."""
    scaling: float
    softcap: float | None
    smooth: bool
    arguments: dict[str, Any]

    def heads_of(self, kv_head: int) -> range:
        """Query heads of a KV head."""
        group = len(self.queries) // len(self.keys)
        return range(kv_head * group, (kv_head + 1) * group)

    def logit(self, query: Array, key: Array) -> float:
        value = self.scaling * float(query @ key)
        return value if self.softcap is None else self.softcap * math.tanh(value / self.softcap)


def softmax(logits: list[float] | Array) -> Array:
    weights = np.exp(np.asarray(logits) - max(logits))
    return weights / weights.sum()


def window_attention(event: Event, kv_head: int) -> Array:
    """`a`: mean over the window's queries and the group's heads, smoothed over five neighbours."""
    count = event.keys.shape[1]
    total = np.zeros(count)
    for head in event.heads_of(kv_head):
        mean = np.zeros(count)
        for query in event.queries[head]:
            mean += softmax([event.logit(query, key) for key in event.keys[kv_head]])
        mean /= len(event.queries[head])
        if event.smooth:
            mean = np.array([mean[max(0, i - 2) : i + 3].sum() / 5 for i in range(count)])
        total += mean
    return total / len(event.heads_of(kv_head))


def leverage(fresh: bool) -> Callable[[Event, int], Array]:
    def score(event: Event, kv_head: int) -> Array:
        matrix = event.projection(event.arguments.get("rank", 20), fresh)
        keys, values = event.keys[kv_head] @ matrix, event.values[kv_head] @ matrix
        return (keys**2).sum(-1) * (values**2).sum(-1)

    return score


def unit(vector: Array) -> Array:
    return vector / (math.sqrt(float(vector @ vector)) + 1e-8)


def redundancy(keys: list[Array], threshold: float | None) -> Array:
    """S of R-KV: softmax over the keys of their mean cosine with the others."""
    count = len(keys)
    cosine = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            if i != j:
                cosine[i, j] = unit(keys[i]) @ unit(keys[j])
    if threshold is not None:
        for i in range(count):
            similar = [j for j in range(count) if cosine[i, j] > threshold]
            cosine[i, similar[-1] if similar else 0] = 0.0
    return softmax(cosine.mean(axis=0))


def rkv_importance(event: Event, kv_head: int) -> Array:
    count = event.keys.shape[1]
    last = range(max(0, event.queries.shape[1] - 8), event.queries.shape[1])
    mean = np.zeros(count)
    for i in last:
        largest = [
            max(event.logit(event.queries[head, i], key) for head in event.heads_of(kv_head))
            for key in event.keys[kv_head]
        ]
        mean += softmax(largest) / len(last)
    return np.array([mean[max(0, i - 3) : i + 4].max() for i in range(count)])


def rkv(event: Event, kv_head: int) -> Array:
    lam = event.arguments.get("lam", 0.1)
    repeated = redundancy([*event.keys[kv_head], *event.window_keys[kv_head]], 0.5)[: event.keys.shape[1]]
    return lam * rkv_importance(event, kv_head) - (1 - lam) * repeated


def rkv_vase(event: Event, kv_head: int) -> Array:
    lam = event.arguments.get("lam", 0.5)
    repeated = redundancy(list(event.keys[kv_head]), None)
    return lam * window_attention(event, kv_head) - (1 - lam) * repeated


def tova(event: Event, kv_head: int) -> Array:
    """The last query's attention to a position, mean over the query heads of all KV heads that hold it."""
    got: dict[int, list[float]] = {}
    for other in range(len(event.keys)):
        count = event.keys.shape[1]
        of_group = np.zeros(count)
        for head in event.heads_of(other):
            entries = [*event.keys[other], *event.window_keys[other]]
            attention = softmax([event.logit(event.queries[head, -1], key) for key in entries])
            of_group += attention[:count] / len(event.heads_of(other))
        for slot, position in enumerate(event.positions[other]):
            got.setdefault(int(position), []).append(of_group[slot])
    return np.array([np.mean(got[int(position)]) for position in event.positions[kv_head]])


def keydiff(event: Event, kv_head: int) -> Array:
    directions = [key / np.linalg.norm(key) for key in (*event.keys[kv_head], *event.window_keys[kv_head])]
    anchor = sum(directions) / len(directions)
    norm = np.linalg.norm(anchor)
    return np.array([-(key @ anchor) / (np.linalg.norm(key) * norm) for key in event.keys[kv_head]])


def caote(event: Event, kv_head: int) -> Array:
    attention = window_attention(event, kv_head)
    alpha = attention / attention.sum()
    output = sum(weight * value for weight, value in zip(alpha, event.values[kv_head], strict=True))
    mean_norm = float(alpha @ value_norm(event.values[kv_head]))
    return np.array(
        [
            math.inf if weight >= 1 else weight / (1 - weight) * distance(output, value, mean_norm)
            for weight, value in zip(alpha, event.values[kv_head], strict=True)
        ]
    )


def distance(output: Array, value: Array, mean_norm: float) -> float:
    """`|output - value|` in units of the last of ten mantissa bits of the larger one."""
    unit = math.ldexp(1.0, math.frexp(max(math.sqrt(value @ value), mean_norm))[1] - 11)
    return round(math.sqrt((output - value) @ (output - value)) / unit) * unit


def nexus(event: Event, kv_head: int) -> Array:
    """Window attention, and what a walk over the first three attention rows of the window adds."""
    heads = event.heads_of(kv_head)
    rows = [
        sum(softmax([event.logit(event.queries[head, q], key) for key in event.keys[kv_head]]) for head in heads)
        / len(heads)
        for q in range(event.queries.shape[1])
    ]
    walk = np.zeros(event.keys.shape[1])
    for row in rows[:3]:
        walk = walk + row * (1 + row @ walk)
    return sum(rows) / len(rows) + event.arguments.get("lam", 0.5) * walk / walk.sum()


def value_range(values: Array) -> Array:
    return np.array([max(value) - min(value) for value in values])


def value_variance(values: Array) -> Array:
    return np.array([np.mean((value - value.mean()) ** 2) for value in values])


def value_norm(values: Array) -> Array:
    return np.array([math.sqrt(value @ value) for value in values])


MEASURES = {"range": value_range, "variance": value_variance, "l2": value_norm}


ORACLES: dict[str, Callable[[Event, int], Array] | None] = {
    "vase_attnv": window_attention,
    "vase_dkv": leverage(fresh=True),
    "curdkv": leverage(fresh=False),
    "snapkv": window_attention,
    "rkv": rkv,
    "rkv_vase": rkv_vase,
    "random": lambda event, kv_head: np.ones(event.keys.shape[1]),
    "streaming": lambda event, kv_head: np.zeros(event.keys.shape[1]),
    "h2o": lambda event, kv_head: event.mass[kv_head],
    "tova": tova,
    "keydiff": keydiff,
    "knorm": lambda event, kv_head: np.array([-math.sqrt(key @ key) for key in event.keys[kv_head]]),
    "value_l2": lambda event, kv_head: value_norm(event.values[kv_head]),
    "value_var": lambda event, kv_head: value_variance(event.values[kv_head]),
    "caote": caote,
    "nexus": nexus,
    "evict_large": lambda event, kv_head: -value_range(event.values[kv_head]),
    "full": None,
}
SAMPLED = ("vase_attnv", "random", "nexus")
SINGLE_TOKEN = ("vase_dkv", "curdkv", "knorm", "value_l2", "value_var", "evict_large")
LARGE = {"vase_attnv": 0.25}
"""Share of the budget that a policy protects of its own accord."""


def ten_bits(score: float) -> float:
    """Rounded to ten explicit mantissa bits."""
    if score == 0 or not math.isfinite(score):
        return score
    mantissa, exponent = math.frexp(score)
    return math.ldexp(round(mantissa * 2048), exponent - 11)


def kept(
    policy: str, event: Event, *, budget: int, window: int, sinks: int, prompt: int | None, fraction: float | None,
    measure: str = "range", retention: str | None = None,
) -> tuple[list[list[int]], float]:  # fmt: skip
    """Slots kept of each KV head, and how narrowly: the smallest relative gap between a kept and a dropped score.

    Args:
        policy: its name.
        event: what it reads.
        budget, window, sinks: of the setting.
        prompt: length of a protected prompt, or None.
        fraction: `protected_fraction`.
        measure, retention: of the setting.
    """
    score_of, keep = ORACLES[policy], budget - window
    assert score_of is not None
    fraction = LARGE.get(policy, 0.0) if fraction is None else fraction
    result, margin = [], math.inf
    for kv_head, positions in enumerate(event.positions):
        count = len(positions)
        first = sinks if prompt is None else max(sinks, min(prompt, keep - 1))
        protected = [slot for slot in range(count) if positions[slot] < first]
        if measure == "random":
            sizes = [float(np.float32(number)) for number in event.uniform[kv_head]]
        else:
            sizes = [ten_bits(score) for score in MEASURES[measure](event.values[kv_head])]
        large = sorted((s for s in range(count) if s not in protected), key=lambda s: (-sizes[s], -s))
        room = min(max(0, math.floor(fraction * budget) - sinks), keep - first)
        protected += large[:room]
        scores = [float(score) for score in score_of(event, kv_head)]
        if policy in SINGLE_TOKEN:
            scores = [ten_bits(score) for score in scores]
        if retention == "sampled" or (retention is None and policy in SAMPLED):
            scores = [
                (math.log(weight) if weight > 0 else -math.inf) + noise
                for weight, noise in zip(scores, event.gumbel[kv_head], strict=True)
            ]
        others = sorted((s for s in range(count) if s not in protected), key=lambda s: (-scores[s], -s))
        chosen, dropped = others[: keep - len(protected)], others[keep - len(protected) :]
        result.append(sorted([*protected, *chosen]))
        for ordered, values, edge in ((large, sizes, room), (others, scores, len(chosen))):
            if 0 < edge < len(ordered):
                above, below = values[ordered[edge - 1]], values[ordered[edge]]
                if above != below and math.isfinite(above):
                    margin = min(margin, (above - below) / max(abs(above), abs(below)))
        assert dropped
    return result, margin


def walk(
    policy: str, queries: Array, keys: Array, values: Array, prompt: int, *, budget: int, window: int, sinks: int,
    scaling: float,
) -> NDArray[np.int64]:  # fmt: skip
    """`evict_at` [Hkv, S] of a deterministic policy, token by token: write, attend, and evict when it is due.

    Args:
        policy: its name.
        queries: [Hq, S, D].
        keys, values: [Hkv, S, D].
        prompt: tokens that are written without eviction.
        budget, window, sinks, scaling: of the setting.
    """
    heads, length = keys.shape[:2]
    group = len(queries) // heads
    evict_at = np.full((heads, length), length + 1)
    held: list[list[int]] = [[] for _ in range(heads)]
    mass = np.zeros((heads, length))
    for t in range(length):
        for kv_head in range(heads):
            held[kv_head].append(t)
            for head in range(kv_head * group, (kv_head + 1) * group):
                attention = softmax([scaling * float(queries[head, t] @ keys[kv_head, j]) for j in held[kv_head]])
                for j, weight in zip(held[kv_head], attention, strict=True):
                    mass[kv_head, j] += weight / group
        live = len(held[0])
        if t < prompt or live <= budget or live % window:
            continue
        candidates = [positions[:-window] for positions in held]
        event = Event(
            positions=np.array(candidates),
            queries=queries[:, t - window + 1 : t + 1],
            keys=np.stack([keys[h, candidates[h]] for h in range(heads)]),
            values=np.stack([values[h, candidates[h]] for h in range(heads)]),
            window_keys=np.stack([keys[h, held[h][-window:]] for h in range(heads)]),
            mass=np.stack([mass[h, candidates[h]] for h in range(heads)]),
            gumbel=np.zeros((heads, len(candidates[0]))),
            uniform=np.zeros((heads, len(candidates[0]))),
            projection=lambda rank, fresh: np.zeros((keys.shape[2], rank)),
            scaling=scaling, softcap=None, smooth=True, arguments={},
        )  # fmt: skip
        slots, _ = kept(policy, event, budget=budget, window=window, sinks=sinks, prompt=None, fraction=None)
        for kv_head in range(heads):
            stays = [candidates[kv_head][slot] for slot in slots[kv_head]]
            for j in set(candidates[kv_head]) - set(stays):
                evict_at[kv_head, j] = t + 1
            held[kv_head] = [*stays, *held[kv_head][-window:]]
    return evict_at
