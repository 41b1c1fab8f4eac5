"""Planning by sampling: the cross-entropy method, iCEM and MPPI over N problems at once.

* CEM: sample around a mean, fit the mean and the spread to the best, again (Rubinstein 1999; PETS, arXiv 1805.12114).
* iCEM (arXiv 2008.06389): noise coloured in time, elites kept between rounds and, shifted, between steps; fewer samples
  every round; the mean itself is tried in the last; the best plan is carried out, or the mean of the best.
* MPPI (arXiv 1509.01149): the mean moves to the average of all samples, weighted by exp(value / temperature).

All begin each step from the last plan, shifted. Environment n draws from its own generator, so that its plan does not
depend on its neighbours.

Shape legend: N problems, K candidates, E elites, H steps of a plan, A action dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hma_gym.errors import InvalidArgument
from hma_gym.policies.mpc.noise import coloured_noise


@dataclass(frozen=True)
class Problem:
    """N problems of the same kind.

    Attributes:
        value: plans (N, K, H, A) to their values (N, K), higher is better.
        low_A, high_A: bounds; candidates are clipped to them.
        std_A: how far the first round reaches, before the planner's own factor.
        proposals_NKHA: candidates from elsewhere, tried in the first round; K may be 0.
    """

    value: Callable[[Tensor], Tensor]
    low_A: Tensor
    high_A: Tensor
    std_A: Tensor
    proposals_NKHA: Tensor


@dataclass(frozen=True)
class Plan:
    """What a planner found, and where its next search begins.

    Attributes:
        actions_NHA: to be carried out.
        value_N: the best value that any candidate had.
        mean_NHA: of the search.
        elites_NEHA: candidates to be tried again; E may be 0.
    """

    actions_NHA: Tensor
    value_N: Tensor
    mean_NHA: Tensor
    elites_NEHA: Tensor

    def shifted(self, steps: int) -> Plan:
        """The same plans ``steps`` later: their beginnings are over, their last actions go on."""
        length = self.mean_NHA.shape[1]
        index = torch.arange(steps, steps + length, device=self.mean_NHA.device).clamp_max(length - 1)
        return Plan(self.actions_NHA[:, index], self.value_N, self.mean_NHA[:, index], self.elites_NEHA[:, :, index])

    def where(self, fresh_N: Tensor, mean_A: Tensor) -> Plan:
        """Begun anew at ``mean_A`` in the rows where ``fresh_N`` is true."""
        fresh = fresh_N[:, None, None]
        return Plan(
            torch.where(fresh, mean_A, self.actions_NHA),
            self.value_N,
            torch.where(fresh, mean_A, self.mean_NHA),
            torch.where(fresh[..., None], mean_A, self.elites_NEHA),
        )


def first_plan(rows: int, horizon: int, mean_A: Tensor) -> Plan:
    """Where a search begins that knows nothing: the mean action throughout."""
    mean = mean_A.expand(rows, horizon, -1).contiguous()
    return Plan(mean, mean.new_full((rows,), -torch.inf), mean, mean.new_zeros(rows, 0, horizon, len(mean_A)))


class Planner(Protocol):
    """A way to search."""

    def plan(self, problem: Problem, warm: Plan, generators: Sequence[torch.Generator]) -> Plan:
        """Search from ``warm``; ``generators`` has one entry a problem."""
        ...


@dataclass(frozen=True)
class CEM:
    """The cross-entropy method.

    Attributes:
        samples: candidates a round.
        elites: how many of them the mean and the spread are fitted to.
        rounds: of sampling and fitting.
        reach: the first round's spread, in units of the problem's.
        momentum: share of the old mean and spread that stays, in [0, 1).
    """

    samples: int = 64
    elites: int = 8
    rounds: int = 3
    reach: float = 1.0
    momentum: float = 0.1

    def __post_init__(self) -> None:
        _check(self.samples, self.elites, self.rounds, self.reach, self.momentum)

    def plan(self, problem: Problem, warm: Plan, generators: Sequence[torch.Generator]) -> Plan:
        """See :class:`Planner`; the mean of the last round is carried out."""
        mean, std = warm.mean_NHA, (self.reach * problem.std_A).expand_as(warm.mean_NHA)
        value = torch.full_like(warm.value_N, -torch.inf)
        extra = problem.proposals_NKHA
        for _ in range(self.rounds):
            noise = coloured_noise(generators, self.samples, warm.mean_NHA.shape[1], std.shape[2], 0.0, std)
            plans = _clipped(torch.cat((extra, mean[:, None] + std[:, None] * noise), dim=1), problem)
            elites, value = _elites(plans, problem.value(plans), self.elites, value)
            mean, std = _fitted(elites, mean, std, self.momentum)
            extra = plans[:, :0]
        return Plan(mean, value, mean, extra)


@dataclass(frozen=True)
class ICEM:
    """The improved cross-entropy method.

    Attributes:
        samples: candidates of the first round.
        elites, rounds, reach, momentum: see :class:`CEM`.
        beta: colour of the noise over a plan's steps: its power falls as 1 / frequency ** beta; 0 is white.
        decay: each round has so many times fewer candidates than the one before, at least twice the elites.
        keep: share of the elites that is tried again, in the next round and, shifted, in the next step.
        carry: what is carried out: the ``best`` plan that was tried, or the ``mean`` of the last elites. The best of
            many owes a part of its value to what the model is wrong about, and trembles as its noise does.
    """

    samples: int = 64
    elites: int = 8
    rounds: int = 3
    reach: float = 1.0
    momentum: float = 0.1
    beta: float = 2.0
    decay: float = 1.25
    keep: float = 0.3
    carry: Literal["best", "mean"] = "best"

    def __post_init__(self) -> None:
        _check(self.samples, self.elites, self.rounds, self.reach, self.momentum)
        if self.beta < 0 or self.decay < 1 or not 0 <= self.keep <= 1 or self.carry not in ("best", "mean"):
            raise InvalidArgument(
                "iCEM needs beta >= 0, decay >= 1, keep in [0, 1] and carry 'best' or 'mean', got "
                f"beta={self.beta}, decay={self.decay}, keep={self.keep}, carry={self.carry!r}."
            )

    def _samples(self) -> list[int]:
        """Fresh candidates of each round."""
        return [max(int(self.samples * self.decay**-i), 2 * self.elites) for i in range(self.rounds)]

    def plan(self, problem: Problem, warm: Plan, generators: Sequence[torch.Generator]) -> Plan:
        """See :class:`Planner`."""
        mean, std = warm.mean_NHA, (self.reach * problem.std_A).expand_as(warm.mean_NHA)
        value = torch.full_like(warm.value_N, -torch.inf)
        best = mean
        kept = torch.cat((warm.elites_NEHA, problem.proposals_NKHA), dim=1)
        again = max(1, round(self.keep * self.elites)) if self.keep else 0
        for i, samples in enumerate(self._samples()):
            noise = coloured_noise(generators, samples, mean.shape[1], mean.shape[2], self.beta, mean)
            parts = [kept, mean[:, None] + std[:, None] * noise]
            if i == self.rounds - 1:
                parts.append(mean[:, None])
            plans = _clipped(torch.cat(parts, dim=1), problem)
            before = value
            elites, value = _elites(plans, problem.value(plans), self.elites, value)
            best = torch.where((value > before)[:, None, None], elites[:, 0], best)
            mean, std = _fitted(elites, mean, std, self.momentum)
            kept = elites[:, :again]
        return Plan(best if self.carry == "best" else mean, value, mean, kept)


@dataclass(frozen=True)
class MPPI:
    """Model predictive path integral control.

    Attributes:
        samples: candidates a round.
        rounds: of sampling and averaging.
        reach: spread of the candidates, in units of the problem's.
        temperature: of the weights, in units of the standard deviation of a round's values; above 0.
        beta: colour of the noise, see :class:`ICEM`.
    """

    samples: int = 64
    rounds: int = 2
    reach: float = 1.0
    temperature: float = 0.3
    beta: float = 0.0

    def __post_init__(self) -> None:
        _check(self.samples, 1, self.rounds, self.reach, 0.0)
        if not self.temperature > 0 or self.beta < 0:
            raise InvalidArgument(
                f"MPPI needs temperature > 0 and beta >= 0, got temperature={self.temperature}, beta={self.beta}."
            )

    def plan(self, problem: Problem, warm: Plan, generators: Sequence[torch.Generator]) -> Plan:
        """See :class:`Planner`; the weighted mean is carried out."""
        mean, std = warm.mean_NHA, (self.reach * problem.std_A).expand_as(warm.mean_NHA)
        value = torch.full_like(warm.value_N, -torch.inf)
        extra = problem.proposals_NKHA
        for _ in range(self.rounds):
            noise = coloured_noise(generators, self.samples, mean.shape[1], mean.shape[2], self.beta, mean)
            plans = torch.cat((extra, mean[:, None], mean[:, None] + std[:, None] * noise), dim=1)
            plans = _clipped(plans, problem)
            values = problem.value(plans)
            scale = self.temperature * values.std(dim=1, keepdim=True).clamp_min(1e-9)
            weights = torch.softmax(values / scale, dim=1)
            mean = (weights[:, :, None, None] * plans).sum(dim=1)
            value = torch.maximum(value, values.amax(dim=1))
            extra = plans[:, :0]
        return Plan(mean, value, mean, extra)


def _check(samples: int, elites: int, rounds: int, reach: float, momentum: float) -> None:
    if elites < 1 or samples < 2 * elites or rounds < 1 or not reach > 0 or not 0 <= momentum < 1:
        raise InvalidArgument(
            "a planner needs elites >= 1, samples >= 2 elites, rounds >= 1, reach > 0 and momentum in [0, 1), got "
            f"samples={samples}, elites={elites}, rounds={rounds}, reach={reach}, momentum={momentum}."
        )


def _clipped(plans_NKHA: Tensor, problem: Problem) -> Tensor:
    return torch.minimum(torch.maximum(plans_NKHA, problem.low_A), problem.high_A)


def _elites(plans_NKHA: Tensor, value_NK: Tensor, count: int, best_N: Tensor) -> tuple[Tensor, Tensor]:
    """The best so many plans (N, E, H, A), best first, and the best value so far (N,)."""
    top = value_NK.topk(min(count, value_NK.shape[1]), dim=1)
    index = top.indices[:, :, None, None].expand(-1, -1, *plans_NKHA.shape[2:])
    return plans_NKHA.gather(1, index), torch.maximum(best_N, top.values[:, 0])


def _fitted(elites_NEHA: Tensor, mean_NHA: Tensor, std_NHA: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Mean and spread of the elites, with a share of the old ones."""
    mean = torch.lerp(elites_NEHA.mean(dim=1), mean_NHA, momentum)
    return mean, torch.lerp(elites_NEHA.std(dim=1, correction=0), std_NHA, momentum)
