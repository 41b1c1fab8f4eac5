"""The ensemble: several judges read the same frames, and one rule combines what they say.

>>> judge = EnsembleJudge(["mine", "yours"], rule="lowest")  # success only where both are sure  # doctest: +SKIP
>>> env = gymnasium.make("HMA-Lift-v0", judge=judge)  # doctest: +SKIP

Shape legend: B batch, K window, H W C image, M members, P agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hma_gym.errors import InvalidArgument, UnknownName
from hma_gym.judges.protocol import Judge, ask, check_agent_pos, check_window, told_state
from hma_gym.judges.registry import get_judge


def _mean(probability_MB: Tensor) -> Tensor:
    return probability_MB.mean(dim=0)


def _median(probability_MB: Tensor) -> Tensor:
    return probability_MB.quantile(0.5, dim=0)


def _lowest(probability_MB: Tensor) -> Tensor:
    return probability_MB.amin(dim=0)


def _highest(probability_MB: Tensor) -> Tensor:
    return probability_MB.amax(dim=0)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": _mean,
    "median": _median,
    "lowest": _lowest,
    "highest": _highest,
}
"""From probabilities (M, B) to one each (B,): ``lowest`` needs all members to see success, ``highest`` any."""


class EnsembleJudge:
    """Judges combined into one; satisfies :class:`~hma_gym.judges.protocol.Judge`, and can be told agent_pos where a
    member can (:class:`~hma_gym.judges.protocol.ProprioceptiveJudge`).

    Members' verdicts may rest on different thresholds: before they are combined, each probability is moved so that
    the member's own threshold lies at one half (by a straight line on either side of it).

    Args:
        members: judges, or names of registered ones; at least one.
        rule: one of :data:`RULES`.
        name: for reports; by default the rule and the members' names.

    Raises:
        InvalidArgument: no member, one that is not a judge, or members that are told agent_pos of different sizes.
        UnknownName: no such rule or judge.
    """

    threshold = 0.5

    def __init__(self, members: Sequence[Judge | str], rule: str = "mean", name: str | None = None) -> None:
        if not members:
            raise InvalidArgument("members must be at least one judge, got none.")
        if rule not in RULES:
            raise UnknownName("rule of combining judges", rule, list(RULES))
        self.members = tuple(get_judge(member) for member in members)
        self.window = max(member.window for member in self.members)
        told = {member.name: told_state(member) for member in self.members if told_state(member)}
        if len(set(told.values())) > 1:
            raise InvalidArgument(
                f"members must be told agent_pos of one size, got {told}; combine judges of one robot."
            )
        self.state_dim = max(told.values(), default=0)
        self.rule = rule
        self.name = f"{rule}({', '.join(member.name for member in self.members)})" if name is None else name

    def probability(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        """(B, K, H, W, C) uint8, oldest first, to (B,) float32; each member sees the last frames of its own window."""
        check_window(self, frames_BKHWC)
        check_agent_pos(self, agent_pos_BKP, frames_BKHWC)
        said = []
        for member in self.members:
            last = slice(-member.window, None)
            agent_pos = None if agent_pos_BKP is None else agent_pos_BKP[:, last]
            said.append(centred(ask(member, member.probability, frames_BKHWC[:, last], agent_pos), member.threshold))
        return RULES[self.rule](torch.stack([probability.to(said[0]) for probability in said]))


def centred(probability: Tensor, threshold: float) -> Tensor:
    """Probabilities moved by two straight lines so that 0 stays 0, ``threshold`` becomes 0.5 and 1 stays 1."""
    below = probability * (0.5 / threshold)
    above = 1 - (1 - probability) * (0.5 / (1 - threshold))
    return torch.where(probability < threshold, below, above).float()
