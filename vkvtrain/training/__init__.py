"""Training under simulated eviction: a recipe's settings, its data, objectives, schedule and loop."""
