"""Evaluation under eviction: the lm-eval model and its metrics."""
