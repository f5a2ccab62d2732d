"""A model's life in a stream of tasks: streams, learners, baselines, measures."""
