"""Evaluation under eviction: the lm-eval model, metrics and intervals."""
