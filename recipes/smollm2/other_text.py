"""Next-token loss of a model on text that has nothing to do with its task: the documentation that comes with Python.

Knows nothing of arms and records.
"""

from collections.abc import Iterator
from itertools import islice
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from vkvtrain import EvictionConfig, simulated_eviction

TEXTS, LENGTH, PROMPT = 16, 1024, 64
"""Texts, tokens of each, and first tokens that count as the prompt."""
EVICTED = EvictionConfig(policy="vase_attnv", budget=128, window=32)


def texts(tokenizer: Any) -> Iterator[list[int]]:
    """The beginnings of the first documents that are long enough, as tokens."""
    ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in topics.values())
    return islice((one[:LENGTH] for one in ids if len(one) >= LENGTH), TEXTS)


@torch.no_grad()
def losses(model: Any, rows: list[list[int]], config: EvictionConfig) -> list[float]:
    """Loss per token after the prompt, in nats, of each text; one simulated pass each."""
    found = []
    for index, ids in enumerate(rows):
        batch = torch.tensor([ids])
        with simulated_eviction(model, config, [PROMPT], [index]):
            logits = model(input_ids=batch, use_cache=False).logits[0, PROMPT - 1 : -1]
        found.append(cross_entropy(logits.float(), batch[0, PROMPT:]).item())
    return found
