"""Constructor arguments of tasks and data modules: their annotations, and how checkpoints keep them."""
