"""A learner's life in a stream of tasks: data, learners, training, measures."""

from .stream import Stream, Task

__all__ = ["Stream", "Task"]
