"""Constructor arguments of tasks and data modules: annotations, and values in checkpoints."""
