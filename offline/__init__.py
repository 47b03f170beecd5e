"""Algorithms that learn from a dataset, one file each."""

from .bc import BC, BCConfig
from .iql import IQL, IQLConfig
from .prdc import PRDC, PRDCConfig
from .td3_bc import TD3BC, TD3BCConfig

__all__ = ["BC", "IQL", "PRDC", "TD3BC", "BCConfig", "IQLConfig", "PRDCConfig", "TD3BCConfig"]
