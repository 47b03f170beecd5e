"""PPO and A2C models of Stable-Baselines3 as agents of this library: weights and normalisers, copied."""

from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.errors import ConfigError, CorollaryError
from ..core.networks import StackedMLP
from ..core.normalisers import CLIP, EPSILON, RunningMoments
from ..core.policies import GaussianPolicy
from ..core.spaces import space_to_json
from .ppo import PPO

_FROM_THE_MODEL = ("hidden", "critic_hidden", "activation", "normalize_obs", "normalize_reward")


def from_stable_baselines3(
    model: Any, vec_normalize: Any = None, *, device: str | torch.device = "cpu", **options: Any
) -> PPO:
    """Return an agent with one seed that acts, samples and values states as a Stable-Baselines3 model does.

    The model may be new, trained, or read by its own ``PPO.load``; it is only looked at. The agent learns on with the
    model's settings: an A2C model as PPO with one epoch over one batch, which is A2C up to the optimiser (Huang et al.,
    2022, arXiv 2205.09123). Of a schedule it takes the first value; values are not clipped; the discount of reward
    normalisation is the model's; the optimiser starts anew. Where the model's environment is unknown, as after
    loading, pass one: ``agent.learn(n_steps, env=...)``.

    Args:
        model: ``stable_baselines3.PPO`` or ``A2C`` with ``"MlpPolicy"``: any widths, tanh or relu, Box, Discrete or
            MultiDiscrete actions.
        vec_normalize: the ``VecNormalize`` that the model was trained with; by default that of its environment, if
            any. The agent takes the environment's own observations and applies these statistics itself.
        device: where updates run.
        **options: settings of :class:`~corollary.online.PPO` for further learning, such as a `batch_size` that
            divides ``n_envs * n_steps`` where the model's does not.

    Raises:
        CorollaryError: if Stable-Baselines3 is missing.
        ConfigError: for a model or a normalisation of another kind, or an option that follows from the model.
        EnvironmentMismatchError: for spaces that this library does not support.
    """
    _require_supported(model)
    for name in _FROM_THE_MODEL:
        if name in options:
            raise ConfigError(f"The option {name} follows from the Stable-Baselines3 model: leave it out.")
    if vec_normalize is None:
        vec_normalize = model.get_vec_normalize_env()
    policy = model.policy
    actor = [*_linear(policy.mlp_extractor.policy_net), policy.action_net]
    critic = [*_linear(policy.mlp_extractor.value_net), policy.value_net]
    if len(critic) == 1 < len(actor):
        raise ConfigError("The model's critic has no hidden layer and its policy has: PPO here has no such critic.")
    config = {
        **PPO.presets["sb3"].settings,
        **_training_settings(model),
        **options,
        "hidden": tuple(layer.out_features for layer in actor[:-1]),
        "critic_hidden": tuple(layer.out_features for layer in critic[:-1]),
        "activation": "relu" if policy.activation_fn is nn.ReLU else "tanh",
        **_normalisation(vec_normalize),
    }
    problem = {
        "observation_space": space_to_json(model.observation_space),
        "action_space": space_to_json(model.action_space),
        "env_id": _env_id(model),
    }
    agent = PPO._from_description(
        {"seeds": [model.seed or 0], "precision": "float32", "config": config, "problem": problem}, torch.device(device)
    )
    agent.step = model.num_timesteps
    _copy(agent.actor.net, actor)
    _copy(agent.critic.net, critic)
    if isinstance(agent.actor, GaussianPolicy):
        with torch.no_grad():
            agent.actor.log_std[0].copy_(policy.log_std)
    if agent.observation_normaliser is not None:
        _copy_moments(agent.observation_normaliser.moments, vec_normalize.obs_rms)
    if agent.reward_normaliser is not None:
        _copy_moments(agent.reward_normaliser.moments, vec_normalize.ret_rms)
    return agent


def _require_supported(model: Any) -> None:
    try:
        import stable_baselines3
        from stable_baselines3.common.policies import ActorCriticPolicy
        from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
    except ImportError as error:
        raise CorollaryError("This needs the package stable-baselines3: pip install 'corollary[sb3]'.") from error
    if not isinstance(model, stable_baselines3.PPO | stable_baselines3.A2C):
        raise ConfigError(f"Only PPO and A2C models can be taken over; got {type(model).__name__}.")
    policy = model.policy
    if type(policy) is not ActorCriticPolicy:
        raise ConfigError(f"Only the policy 'MlpPolicy' can be taken over; the model's is {type(policy).__name__}.")
    for part, kind in ((policy.features_extractor, FlattenExtractor), (policy.mlp_extractor, MlpExtractor)):
        if type(part) is not kind:
            raise ConfigError(f"Only a policy with a {kind.__name__} can be taken over; here is {type(part).__name__}.")
    if policy.use_sde:
        raise ConfigError("A policy with state-dependent exploration (use_sde=True) cannot be taken over.")
    if policy.activation_fn not in (nn.Tanh, nn.ReLU):
        raise ConfigError(f"Only tanh and relu networks can be taken over; got {policy.activation_fn.__name__}.")


def _linear(net: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in net if isinstance(layer, nn.Linear)]


def _training_settings(model: Any) -> dict[str, Any]:
    """Return what the model learns with, under our names; their value loss has no factor 1/2."""
    batch = model.n_envs * model.n_steps
    common = {
        "n_envs": model.n_envs,
        "n_steps": model.n_steps,
        "learning_rate": model.lr_schedule(1),
        "discount": model.gamma,
        "trace_decay": model.gae_lambda,
        "entropy_coef": model.ent_coef,
        "value_coef": 2 * model.vf_coef,
        "max_grad_norm": model.max_grad_norm,
        "normalize_advantage": "minibatch" if model.normalize_advantage else "none",
    }
    if not hasattr(model, "clip_range"):
        return common | {"batch_size": batch, "n_epochs": 1}
    return common | {
        "batch_size": model.batch_size,
        "n_epochs": model.n_epochs,
        "clip": model.clip_range(1),
        "target_kl": model.target_kl,
    }


def _normalisation(vec_normalize: Any) -> dict[str, Any]:
    if vec_normalize is None:
        return {"normalize_obs": False, "normalize_reward": "none"}
    obs, reward = bool(vec_normalize.norm_obs), bool(vec_normalize.norm_reward)
    for name, ours, applies in (("epsilon", EPSILON, True), ("clip_obs", CLIP, obs), ("clip_reward", CLIP, reward)):
        theirs = getattr(vec_normalize, name)
        if applies and theirs != ours:
            raise ConfigError(f"Only a VecNormalize with {name}={ours:g} can be taken over; here it is {theirs:g}.")
    return {"normalize_obs": obs, "normalize_reward": "done" if reward else "none"}


def _env_id(model: Any) -> str | None:
    """Return the id of the model's environment, unless wrappers around the vector changed what the model sees."""
    env = model.get_env()
    if env is None:
        return None
    spec, space = env.get_attr("spec")[0], env.get_attr("observation_space")[0]
    return None if spec is None or space != model.observation_space else spec.id


@torch.no_grad()
def _copy(net: StackedMLP, layers: list[nn.Linear]) -> None:
    for weight, bias, layer in zip(net.weights, net.biases, layers, strict=True):
        weight[0].copy_(layer.weight)
        bias[0].copy_(layer.bias)


def _copy_moments(moments: RunningMoments, theirs: Any) -> None:
    moments.load_state({name: np.reshape(getattr(theirs, name), (1, -1)) for name in ("mean", "var", "count")})
