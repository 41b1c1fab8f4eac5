"""Ways to run the steps of a batch of rollouts: one operation after the other, as recorded CUDA graphs, or as a sketch
by the bodies alone.

>>> world = LearnedWorld(load_checkpoint("lift-64", device="cuda"), stepper=CudaGraphs)  # doctest: +SKIP
>>> envs = HMAVectorEnv(256, checkpoint=world, output="torch")  # doctest: +SKIP

A step of a small model is hundreds of small operations, which a CPU cannot launch as fast as a GPU runs them. A graph
launches them all at once. Graphs of compiled networks (:mod:`hma_gym.dynamics.compiled`) also have fewer of them.

Shape legend: B rows, A numbers of an action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.rollout import RolloutState, StepOutput
from hma_gym.errors import InvalidArgument
from hma_gym.nn import graphs
from hma_gym.nn.transformer import CACHED


class Stepper(Protocol):
    """Runs steps of forward dynamics and gives up the state that it is given: its memory is used again.

    Attributes:
        whole: whether the trunk runs: then tokens may drift (see :mod:`hma_gym.dynamics.refresh`), and features tell
            how sure the model is.
        recorded: whether steps are CUDA graphs: then decoding and judging may be as well.
    """

    whole: bool
    recorded: bool

    def step(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        """As :meth:`Dynamics.step <hma_gym.dynamics.model.Dynamics.step>` with ``in_place``."""
        ...


class InOrder:
    """One operation after the other."""

    whole, recorded = True, False

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics

    def step(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        return self._dynamics.step(state, action_BA, in_place=True)


class Sketch:
    """The bodies alone foretell and draw, see :meth:`hma_gym.dynamics.model.Dynamics.step_of_bodies`: frames for
    learners that need very many. Nothing tells how sure they are."""

    whole, recorded = False, False

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics

    def step(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        return self._dynamics.step_of_bodies(state, action_BA)


@dataclass(frozen=True)
class _Recording:
    """What runs a graph, the memory that it changes, the action that it reads, and what it shows."""

    run: Callable[[], None]
    memory: graphs.Memory
    action_BA: Tensor
    out: StepOutput


class CudaGraphs:
    """Steps as CUDA graphs, recorded when a number of rows is first met (some seconds).

    A graph changes the rollouts in place, in memory of its own that it lends: while one batch of rollouts goes on,
    nothing of it is copied. Further batches of the same size at the same time have graphs of their own.

    Raises:
        InvalidArgument: weights that are not on a CUDA device, or several domains, whose rows are sorted by the host.
    """

    whole, recorded = True, True

    #: Tensors of a state that no step of this kind reads or writes.
    UNUSED: tuple[str, ...] = ()

    def __init__(self, dynamics: Dynamics) -> None:
        reason = graphs.lacks_graphs(dynamics.position_embedding.device)
        if reason or len(dynamics.domains) > 1:
            raise InvalidArgument(
                "stepper: CUDA graphs need weights on a CUDA device and a model of one domain, got "
                f"{reason or 'weights there'} and {len(dynamics.domains)} domains; leave stepper out."
            )
        self._dynamics = dynamics
        self._recordings: list[_Recording] = []

    def step(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        given = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name not in self.UNUSED}
        recording = self._recording(state, given, action_BA)
        goes_on = recording.memory.take(given)
        recording.action_BA.copy_(action_BA)
        recording.run()
        if not goes_on:
            state = dataclasses.replace(state, **recording.memory.lend("step_B"))
        shown = (getattr(recording.out, field.name).clone() for field in dataclasses.fields(StepOutput))
        return state, StepOutput(*shown)

    def _recording(self, state: RolloutState, given: dict[str, Tensor], action_BA: Tensor) -> _Recording:
        """Of this very batch, or one of its size whose rollouts are over, or a new one."""
        found = graphs.recorded_for(self._recordings, "step_B", state.step_B)
        if found is None:
            found = self._record(state, given, action_BA)
            self._recordings.append(found)
        return found

    def _advance(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        return self._dynamics.step(state, action_BA, in_place=True)

    def _record(self, state: RolloutState, given: dict[str, Tensor], action_BA: Tensor) -> _Recording:
        # The cache is given up with the state. A rehearsal writes into a slot of it that no frame sees any more.
        memory = graphs.Memory(given, large=CACHED)
        nothing = {name: getattr(state, name).new_empty(0) for name in self.UNUSED}
        own, action_BA = dataclasses.replace(state, **memory.tensors, **nothing), action_BA.clone()

        def step() -> StepOutput:
            after, out = self._advance(own, action_BA)
            memory.take({name: getattr(after, name) for name in memory.tensors})
            return out

        out, run = graphs.record(step, action_BA.device, memory.rehearsal(step))
        return _Recording(run, memory, action_BA, out)


class SketchGraphs(CudaGraphs):
    """:class:`Sketch` as CUDA graphs."""

    whole = False
    UNUSED = CACHED

    def _advance(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        return self._dynamics.step_of_bodies(state, action_BA)
