"""Ablations: a grid of models, policies, budgets, tasks and seeds; its results; their statistics; a report."""
