"""Algorithms that learn from an environment: policy optimisation and actor-critic methods."""

from .bpo import BPO, BPOConfig
from .fixpo import FixPO, FixPOConfig
from .mdpo import MDPO, MDPOConfig
from .mdpo_off import OffPolicyMDPO, OffPolicyMDPOConfig
from .ppo import PPO, PPOConfig
from .props import PROPS, PROPSConfig, sampling_error
from .sac import SAC, SACConfig
from .spo import SPO, SPOConfig
from .stable_baselines3 import from_stable_baselines3
from .trpo import TRPO, TRPOConfig

__all__ = [
    "BPO",
    "MDPO",
    "PPO",
    "PROPS",
    "SAC",
    "SPO",
    "TRPO",
    "BPOConfig",
    "FixPO",
    "FixPOConfig",
    "MDPOConfig",
    "OffPolicyMDPO",
    "OffPolicyMDPOConfig",
    "PPOConfig",
    "PROPSConfig",
    "SACConfig",
    "SPOConfig",
    "TRPOConfig",
    "from_stable_baselines3",
    "sampling_error",
]
