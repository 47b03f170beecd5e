"""Reinforcement learning algorithms, each tied to the statements that justify it."""

from .core.agent import load_agent
from .core.evaluation import evaluate
from .core.loading import load_dataset

__version__ = "0.1.0"

__all__ = ["__version__", "evaluate", "load_agent", "load_dataset"]
