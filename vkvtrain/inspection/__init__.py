"""What a policy keeps of a text: numbers, a picture, a page. Knows models and the simulation; nothing of training."""
