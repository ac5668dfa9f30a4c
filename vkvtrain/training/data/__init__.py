"""Training rows: read, understood, templated, tokenised, ordered and collated.

A row is a prompt and a response; the loss is on the response, its end token included. Prompt and response are tokenised
apart, because that is what generation does: the prompt alone, then tokens appended. Nothing is ever truncated: rows
longer than `data.max_length` are left out and counted. Knows nothing of models.

    sources -> formats -> templates -> loading -> order -> batching
"""

from vkvtrain.training.data.batching import (
    Batch,
    collate,
    collate_packed,
    in_batches,
    packing_length,
    step_batches,
    step_rows,
)
from vkvtrain.training.data.loading import load_data
from vkvtrain.training.data.order import pack, sample, step_samples
from vkvtrain.training.data.rows import Example, Record, Row, TrainingData

__all__ = [
    "Batch",
    "Example",
    "Record",
    "Row",
    "TrainingData",
    "collate",
    "collate_packed",
    "in_batches",
    "load_data",
    "pack",
    "packing_length",
    "sample",
    "step_batches",
    "step_rows",
    "step_samples",
]
