"""Ways to run the steps of a batch of rollouts: one operation after the other, as recorded CUDA graphs, or as a sketch
by the bodies alone.

>>> world = LearnedWorld(load_checkpoint("lift-64", device="cuda"), stepper=CudaGraphs)  # doctest: +SKIP
>>> envs = HMAVectorEnv(256, checkpoint=world, output="torch")  # doctest: +SKIP

A step of a small model is hundreds of small operations, which a CPU cannot launch as fast as a GPU runs them. A graph
launches them all at once.

Shape legend: B rows, A numbers of an action.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.rollout import RolloutState, StepOutput
from hma_gym.errors import InvalidArgument


class Stepper(Protocol):
    """Runs steps of forward dynamics and gives up the state that it is given: its memory is used again.

    Attributes:
        whole: whether the trunk runs: then tokens may drift (see :mod:`hma_gym.dynamics.refresh`), and features tell
            how sure the model is.
    """

    whole: bool

    def step(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        """As :meth:`Dynamics.step <hma_gym.dynamics.model.Dynamics.step>` with ``in_place``."""
        ...


class InOrder:
    """One operation after the other."""

    whole = True

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics

    def step(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        return self._dynamics.step(state, action_BA, in_place=True)


class Sketch:
    """The bodies alone foretell and draw, see :meth:`hma_gym.dynamics.model.Dynamics.step_of_bodies`: frames for
    learners that need very many. Nothing tells how sure they are."""

    whole = False

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics

    def step(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        return self._dynamics.step_of_bodies(state, action_BA)


@dataclass(frozen=True)
class _Recording:
    """A graph, the memory that it reads, and the memory that it writes."""

    graph: torch.cuda.CUDAGraph
    state: RolloutState
    action_BA: Tensor
    after: RolloutState
    out: StepOutput


class CudaGraphs:
    """Steps as CUDA graphs, one for each number of rows, recorded when it is first met (some seconds).

    A graph has memory of its own, as much as the rollouts; their state is copied there and back, two copies of it a
    step.

    Raises:
        InvalidArgument: weights that are not on a CUDA device, or several domains, whose rows are sorted by the host.
    """

    whole = True

    #: Steps before a recording, in which kernels are chosen and workspaces allotted.
    WARMUP = 3

    def __init__(self, dynamics: Dynamics) -> None:
        device = dynamics.position_embedding.device
        if device.type != "cuda" or len(dynamics.domains) > 1:
            raise InvalidArgument(
                "stepper: CUDA graphs need weights on a CUDA device and a model of one domain, got device "
                f"{str(device)!r} and {len(dynamics.domains)} domains; leave stepper out."
            )
        self._dynamics = dynamics
        self._recordings: dict[int, _Recording] = {}

    def step(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        recording = self._recordings.get(len(state))
        if recording is None:
            recording = self._recordings[len(state)] = self._record(state, action_BA)
        for field in dataclasses.fields(RolloutState):
            getattr(recording.state, field.name).copy_(getattr(state, field.name))
        recording.action_BA.copy_(action_BA)
        recording.graph.replay()
        for field in dataclasses.fields(RolloutState):
            getattr(state, field.name).copy_(getattr(recording.after, field.name))
        shown = (getattr(recording.out, field.name).clone() for field in dataclasses.fields(StepOutput))
        return state, StepOutput(*shown)

    def _record(self, state: RolloutState, action_BA: Tensor) -> _Recording:
        own, action_BA = state.clone(), action_BA.clone()
        present = torch.cuda.current_stream(action_BA.device)
        aside = torch.cuda.Stream(action_BA.device)
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            for _ in range(self.WARMUP):
                self._dynamics.step(state.clone(), action_BA, in_place=True)
        present.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            after, out = self._dynamics.step(own, action_BA, in_place=True)
        return _Recording(graph, own, action_BA, after, out)
