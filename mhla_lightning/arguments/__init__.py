"""Arguments of tasks and data modules: annotations, and how checkpoints keep them."""
