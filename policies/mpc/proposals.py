"""Plans that a policy would make: it acts in the imagined world, several times with other random numbers.

Shape legend: N environments, K proposals of each, H steps of a plan, A action dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from hma_gym.errors import InvalidArgument
from hma_gym.policies.loading import EpisodeSeed, PolicyFactory
from hma_gym.policies.mpc.protocol import PlanningDynamics, StateT
from hma_gym.policies.protocol import Observation, WatchingPolicy


class PolicyProposals(Generic[StateT]):
    """A :class:`~hma_gym.policies.mpc.protocol.Proposer`.

    The policy is made anew for every plan, shown the last two real observations, and then acts on imagined ones, which
    are decoded for it. So it suits policies that need no long memory.

    Args:
        dynamics: what it acts in.
        make: the policy's factory.
        seeds: one for each of the N environments.
        count: K; 1 is enough for a policy without randomness.
        horizon: H.
    """

    def __init__(
        self,
        dynamics: PlanningDynamics[StateT],
        make: PolicyFactory,
        seeds: Sequence[int],
        *,
        count: int = 8,
        horizon: int = 12,
    ) -> None:
        if count < 1 or horizon < 1:
            raise InvalidArgument(f"proposals need count and horizon of at least 1, got {count} and {horizon}.")
        self._dynamics, self._make, self._seeds = dynamics, make, [int(seed) for seed in seeds]
        self._count, self._horizon = count, horizon

    def propose(self, state: StateT, before: Observation | None, observation: Observation, step: int) -> Tensor:
        """See the protocol."""
        K, H = self._count, self._horizon
        episodes = [
            EpisodeSeed(n, int(np.random.SeedSequence([seed, step, k]).generate_state(1)[0]))
            for n, seed in enumerate(self._seeds)
            for k in range(K)
        ]
        policy = self._make(episodes)
        policy.reset(np.ones(len(episodes), dtype=np.bool_))
        watches = isinstance(policy, WatchingPolicy)
        if watches and before is not None:
            policy.observe(_repeated(before, K))  # type: ignore[attr-defined]
        rows = self._dynamics.fork(state, K)
        seen = _repeated(observation, K)
        plan: list[Tensor] = []
        while len(plan) < H:
            chunk = torch.from_numpy(np.array(policy.act(seen), dtype=np.float32)).to(self._dynamics.action_low_A)
            chunk = chunk[:, : H - len(plan)]
            for h in range(chunk.shape[1]):
                plan.append(chunk[:, h])
                if len(plan) == H:
                    break
                rows, imagined = self._dynamics.step(rows, chunk[:, h])
                last = h == chunk.shape[1] - 1
                if last or watches:
                    seen = {
                        "pixels": self._dynamics.decode(imagined.tokens).cpu().numpy(),
                        "agent_pos": imagined.agent_pos_BP.cpu().numpy(),
                    }
                if watches and not last:
                    policy.observe(seen)  # type: ignore[attr-defined]
        return torch.stack(plan, dim=1).unflatten(0, (len(self._seeds), K))


def _repeated(observation: Observation, k: int) -> Mapping[str, Any]:
    if not isinstance(observation, Mapping):
        raise InvalidArgument(
            "proposals of a policy need observations with pixels and agent_pos; make the environment with "
            "obs_type='pixels_agent_pos'."
        )
    return {key: np.repeat(np.asarray(value), k, axis=0) for key, value in observation.items()}
