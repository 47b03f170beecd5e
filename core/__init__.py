"""Shared by every package: data, environments, networks, loops, checkpoints, statistics."""

from .agent import OfflineAgent, algorithm_class, algorithms
from .dataset import Dataset, DatasetInfo, Transitions
from .evaluation import Evaluation

__all__ = ["Dataset", "DatasetInfo", "Evaluation", "OfflineAgent", "Transitions", "algorithm_class", "algorithms"]
