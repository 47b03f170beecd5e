r"""Finite Markov decision processes as tensors: many at once, checked when they are made.

Axes: ``B`` instances, ``S`` states, ``A`` actions. ``P[b, s, a, t]`` is the probability of going from s to t with a,
and ``r[b, s, a]`` the expected reward. A task that ends goes on in an absorbing state that pays nothing. Values are
not normalised, ``V = r + gamma P V``; occupancies are, ``sum d = 1``.
"""

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import gymnasium
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..core.environments import environment_name, make_single
from ..core.errors import CorollaryError

ROW_TOLERANCE = 1e-9
"""How far a row of probabilities may miss the sum 1: rounding, nothing more."""


class ModelError(CorollaryError):
    """A model that is no Markov decision process."""


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """B finite MDPs of one size, float64.

    Attributes:
        transition: P, ``[B, S, A, S]``; every row sums to 1.
        reward: r, ``[B, S, A]``.
        discount: gamma, ``[B]``, in [0, 1).
        start: law of the first state, ``[B, S]``.
        names: what each instance is called: family, variant, parameters, seed.
        known: closed-form values that a textbook gives, by name, for problems that have them.

    Raises:
        ModelError: naming instance, state and action of the first row that is no distribution, or the shape that does
            not fit.
    """

    transition: Tensor
    reward: Tensor
    discount: Tensor
    start: Tensor
    names: tuple[str, ...]
    known: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_arrays(
        cls,
        transition: ArrayLike | Tensor,
        reward: ArrayLike | Tensor,
        discount: ArrayLike | Tensor | float,
        start: ArrayLike | Tensor | None = None,
        *,
        name: str | Sequence[str] = "mdp",
        known: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make instances from ``P [(B,) S, A, S]`` and ``r [(B,) S]``, ``[(B,) S, A]`` or ``[(B,) S, A, S]``.

        Args:
            transition: P; one instance may leave out the axis B.
            reward: per state, state and action, or also successor (its expectation is then taken).
            discount: gamma, one number or one per instance.
            start: law of the first state, ``[S]`` or ``[B, S]``; uniform by default.
            name: of the instance; several are numbered, or given one by one.
            known: see the class.
        """
        p = _tensor(transition)
        p = p.unsqueeze(0) if p.ndim == 3 else p
        if p.ndim != 4 or p.shape[1] != p.shape[3] or 0 in p.shape:
            raise ModelError(f"P must have shape [S, A, S] or [B, S, A, S]; got {list(_tensor(transition).shape)}.")
        b, s, a, _ = p.shape
        r = _tensor(reward)
        shapes = {(s,), (b, s), (s, a), (b, s, a), (s, a, s), (b, s, a, s)}
        if tuple(r.shape) not in shapes:
            raise ModelError(
                f"The reward must have shape [S], [S, A] or [S, A, S] with S = {s} and A = {a} (and B = {b} in front "
                f"for several instances); got {list(r.shape)}."
            )
        if r.shape[-1] == s and r.ndim >= 3 and tuple(r.shape[-3:]) == (s, a, s) and tuple(r.shape) != (b, s, a):
            r = (p * r).sum(-1)
        elif tuple(r.shape) in ((s,), (b, s)) and tuple(r.shape) != (s, a):
            r = r.unsqueeze(-1)
        r = r.expand(b, s, a) if r.ndim == 3 else r.unsqueeze(0).expand(b, s, a)
        first = torch.full((b, s), 1 / s, dtype=torch.float64, device=p.device)
        if start is not None:
            first = _tensor(start)
            if tuple(first.shape) not in {(s,), (b, s)}:
                raise ModelError(f"start must have shape [S] or [B, S] = {[b, s]}; got {list(first.shape)}.")
            first = first.expand(b, s)
        names = [name] if isinstance(name, str) else list(name)
        if len(names) not in (1, b):
            raise ModelError(f"name must be one name or one per instance ({b}); got {len(names)}.")
        if len(names) != b:
            names = [f"{names[0]}[{i}]" for i in range(b)]
        gamma = _tensor(discount)
        if tuple(gamma.shape) not in {(), (1,), (b,)}:
            raise ModelError(f"discount must be one number or one per instance ({b}); got {list(gamma.shape)}.")
        return cls(p, r, gamma.expand(b).to(p.device), first.to(p.device), tuple(names), dict(known or {}))

    @classmethod
    def from_gymnasium(cls, env: gymnasium.Env[Any, Any] | str, discount: float, *, name: str | None = None) -> Self:
        """Read the table ``env.unwrapped.P`` of gymnasium's toy-text environments exactly.

        ``P[s][a]`` lists ``(probability, successor, reward, terminated)``. What terminates leads to one more state, the
        last, which absorbs and pays nothing. The start is the environment's ``initial_state_distrib``, or uniform.

        Raises:
            ModelError: if the environment has no such table, or one of another form (state and action are named).
        """
        made = make_single(env)
        try:
            table = getattr(made.unwrapped, "P", None)
            if table is None:
                raise ModelError(f"{made} has no transition table P: only environments such as FrozenLake-v1 have one.")
            p, r = _read_table(table, str(made))
            n = len(p) - 1
            first = np.zeros(n + 1)
            law = np.asarray(getattr(made.unwrapped, "initial_state_distrib", np.full(n, 1 / n)))
            if law.shape != (n,):
                raise ModelError(f"{made}: initial_state_distrib has shape {list(law.shape)}, but P has {n} states.")
            first[:n] = law
            return cls.from_arrays(p, r, discount, first, name=name or environment_name(made))
        finally:
            if made is not env:
                made.close()

    def __post_init__(self) -> None:
        """Check every invariant."""
        b, s, a, _ = self.transition.shape
        for what, tensor, shape in (
            ("reward", self.reward, (b, s, a)),
            ("discount", self.discount, (b,)),
            ("start", self.start, (b, s)),
        ):
            if tuple(tensor.shape) != shape:
                raise ModelError(f"{what} must have shape {list(shape)}; got {list(tensor.shape)}.")
        if len(self.names) != b:
            raise ModelError(f"{b} instances need as many names; got {len(self.names)}.")
        if not bool(((self.discount >= 0) & (self.discount < 1)).all()):
            bad = int(((self.discount < 0) | (self.discount >= 1)).int().argmax())
            raise ModelError(f"{self.names[bad]}: the discount must be in [0, 1); got {float(self.discount[bad])}.")
        self._check_rows("P", self.transition)
        self._check_rows("start", self.start)
        if not bool(self.reward.isfinite().all()):
            where = self._first(~self.reward.isfinite())
            raise ModelError(f"{where}: the reward is not a finite number.")

    def _check_rows(self, what: str, rows: Tensor) -> None:
        total = rows.sum(-1)
        missed = (total - 1).abs() > ROW_TOLERANCE
        for wrong, text in (
            (~rows.isfinite().all(-1), "is not finite"),
            ((rows < 0).any(-1), "has a negative probability"),
            (missed, "does not sum to 1"),
        ):
            if bool(wrong.any()):
                index = tuple(int(i) for i in wrong.nonzero()[0])
                remedy = _remedy(float(total[index] - 1)) if wrong is missed else ""
                raise ModelError(
                    f"{self._first(wrong)}: {what} {text}; the row's least entry is {float(rows[index].min()):.6g}, "
                    f"its sum misses 1 by {float(total[index] - 1):.3g}{remedy}."
                )

    def _first(self, wrong: Tensor) -> str:
        index = [int(i) for i in wrong.nonzero()[0]]
        parts = [f"{kind} {i}" for kind, i in zip(("state", "action"), index[1:], strict=False)]
        return ", ".join([self.names[index[0]], *parts])

    # ------------------------------------------------------------------------------------------------ parts

    @property
    def n_states(self) -> int:
        """S."""
        return self.transition.shape[1]

    @property
    def n_actions(self) -> int:
        """A."""
        return self.transition.shape[2]

    @property
    def gamma(self) -> Tensor:
        """The discount as ``[B, 1]``, for products with values ``[B, S]``."""
        return self.discount.unsqueeze(1)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator["TabularMDP"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Tensor) -> "TabularMDP":
        """Return some of the instances; an integer keeps the axis B, of length 1."""
        chosen = torch.arange(len(self))[index].reshape(-1)
        where = chosen.to(self.transition.device)
        return TabularMDP(
            self.transition[where],
            self.reward[where],
            self.discount[where],
            self.start[where],
            tuple(self.names[int(i)] for i in chosen),
            self.known if len(self) == 1 else {},
        )

    def replace(self, **changes: Any) -> "TabularMDP":
        """Return a copy with other tensors, checked anew."""
        return dataclasses.replace(self, **changes)

    def to(self, device: str | torch.device) -> "TabularMDP":
        """Return a copy on `device`."""
        return self.replace(
            **{name: getattr(self, name).to(device) for name in ("transition", "reward", "discount", "start")}
        )


def concatenate(mdps: Sequence[TabularMDP]) -> TabularMDP:
    """Join instances along B; smaller ones are padded with absorbing states and copies of their first action.

    Padding changes no value: the new states pay nothing and are never entered, the new actions repeat action 0.
    """
    n_states, n_actions = max(m.n_states for m in mdps), max(m.n_actions for m in mdps)
    padded = [_padded(m, n_states, n_actions) for m in mdps]
    p, r, gamma, first = (
        torch.cat([getattr(m, part) for m in padded]) for part in ("transition", "reward", "discount", "start")
    )
    return TabularMDP(p, r, gamma, first, tuple(name for m in mdps for name in m.names))


def _padded(mdp: TabularMDP, n_states: int, n_actions: int) -> TabularMDP:
    b, s, a = mdp.reward.shape
    if (s, a) == (n_states, n_actions):
        return mdp
    p = torch.zeros(b, n_states, n_actions, n_states, dtype=torch.float64, device=mdp.transition.device)
    r = torch.zeros(b, n_states, n_actions, dtype=torch.float64, device=mdp.transition.device)
    first = torch.zeros(b, n_states, dtype=torch.float64, device=mdp.transition.device)
    p[:, :s, :a, :s], p[:, :s, a:, :s] = mdp.transition, mdp.transition[:, :, :1]
    p[:, range(s, n_states), :, range(s, n_states)] = 1
    r[:, :s, :a], r[:, :s, a:] = mdp.reward, mdp.reward[:, :, :1]
    first[:, :s] = mdp.start
    return TabularMDP(p, r, mdp.discount, first, mdp.names)


def _remedy(miss: float) -> str:
    return ", the rounding of float32: divide each row by its sum in float64" if 0 < abs(miss) < 1e-5 else ""


def _read_table(table: Any, env: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``P [S + 1, A, S + 1]`` and ``r [S + 1, A]`` of a toy-text table; the last state is the end."""
    form = "P[s][a] must list (probability, successor, reward, terminated) for states 0 to S - 1, each with the same A"
    try:
        n, n_actions = len(table), len(table[0])
        rows = [[list(table[s][a]) for a in range(n_actions)] for s in range(n)]
        ragged = [s for s in range(n) if len(table[s]) != n_actions]
    except (TypeError, KeyError, IndexError) as error:
        raise ModelError(f"{env}: {form} actions 0 to A - 1 ({type(error).__name__}: {error}).") from error
    if ragged:
        raise ModelError(f"{env}, state {ragged[0]}: {form} actions; state 0 has {n_actions}.")
    p, r = np.zeros((n + 1, n_actions, n + 1)), np.zeros((n + 1, n_actions))
    p[n, :, n] = 1
    for s, a in np.ndindex(n, n_actions):
        for outcome in rows[s][a]:
            try:
                probability, successor, reward, terminated = outcome
                if not 0 <= operator.index(successor) < n:
                    raise ModelError(f"successor {successor} is none of the {n} states")
                p[s, a, n if terminated else successor] += probability
                r[s, a] += probability * reward
            except (TypeError, ValueError) as error:
                raise ModelError(f"{env}, state {s}, action {a}: {form} actions; got {outcome!r} ({error}).") from error
    return p, r


def _tensor(values: ArrayLike | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    try:
        return torch.as_tensor(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ModelError(f"The model must be made of numbers in full arrays: {error}.") from error
