"""Shared by every package: data, environments, networks, loops, checkpoints, statistics."""

from .agent import Agent, algorithm_class, algorithms
from .dataset import Dataset, DatasetInfo, Transitions
from .evaluation import Evaluation
from .offline_agent import OfflineAgent
from .online_agent import OnlineAgent

__all__ = [
    "Agent",
    "Dataset",
    "DatasetInfo",
    "Evaluation",
    "OfflineAgent",
    "OnlineAgent",
    "Transitions",
    "algorithm_class",
    "algorithms",
]
