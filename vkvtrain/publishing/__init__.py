"""From a training run to a directory or Hub repository that stands on its own."""
