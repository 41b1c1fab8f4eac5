"""Functions of tensors as CUDA graphs: what takes hundreds of launches one by one takes a single one.

A graph reads and writes memory of its own. :class:`Graphed` copies arguments there and results out of there: for pure
functions of small tensors. :class:`Memory` lends its tensors instead, so that what is carried from call to call is
never copied while one rollout goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

ResultT = TypeVar("ResultT")

#: Calls before a recording, in which kernels are chosen or compiled and workspaces allotted.
WARMUP = 3


def lacks_graphs(device: torch.device) -> str:
    """Why there are no CUDA graphs on a device; "" where there are."""
    return "" if device.type == "cuda" else f"weights on the device {str(device)!r}"


def record(
    function: Callable[[], ResultT], device: torch.device, rehearse: Callable[[], ResultT] | None = None
) -> tuple[ResultT, Callable[[], None]]:
    """A function's operations as one graph; nothing of it has happened yet when this returns.

    Args:
        function: without arguments, of tensors that stay where they are; it must not wait for the device. It is kept
            for as long as the graph is, and with it the tensors that the graph reads.
        device: a CUDA device.
        rehearse: what runs before the recording, with the same results; by default the function itself.

    Returns:
        What the function returned, in memory that each run writes anew, and what runs the graph.
    """
    with torch.cuda.device(device):
        present, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                (rehearse or function)()
        present.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = function()

    def run(kept: object = function) -> None:
        graph.replay()

    return made, run


class Graphed:
    """A pure function of tensors as graphs, one for each set of shapes, recorded when it is first met.

    Args:
        function: of one or more tensors on a CUDA device; returns a tuple of tensors.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._recorded: dict[object, tuple[tuple[Tensor, ...], tuple[Tensor, ...], Callable[[], None]]] = {}

    @torch.inference_mode()
    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What the function gives, in memory that is the caller's."""
        key = tuple((x.shape, x.dtype) for x in given)
        if key not in self._recorded:
            own = tuple(x.clone() for x in given)
            made, run = record(lambda: self._function(*own), given[0].device)
            self._recorded[key] = own, made, run
        own, made, run = self._recorded[key]
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        run()
        return tuple(x.clone() for x in made)


class Memory:
    """Tensors that graphs change in place, by name, lent to whoever's rollout they hold.

    Args:
        tensors: of a rollout that is given up.
        large: names of those that become this memory's own, and that a rehearsal may spoil; the others are copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor], large: Sequence[str] = ()) -> None:
        self.tensors = {name: x if name in large else x.clone() for name, x in tensors.items()}
        self._large = large
        self._borrowed: weakref.ref[Tensor] | None = None

    def is_at(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor lies in this memory under this name."""
        own = self.tensors[name]
        return tensor.data_ptr() == own.data_ptr() and tensor.shape == own.shape

    @property
    def free(self) -> bool:
        """Whether nobody has it any more."""
        return self._borrowed is None or self._borrowed() is None

    def take(self, tensors: Mapping[str, Tensor]) -> bool:
        """Copy into it what lies elsewhere; returns whether all of it lay here before."""
        foreign = [name for name in self.tensors if not self.is_at(name, tensors[name])]
        for name in foreign:
            self.tensors[name].copy_(tensors[name])
        return not foreign

    def lend(self, watched: str) -> dict[str, Tensor]:
        """Its tensors, to be used and changed; it is free again once the one named ``watched`` is forgotten."""
        lent = {name: own.view(own.shape) for name, own in self.tensors.items()}
        self._borrowed = weakref.ref(lent[watched])
        return lent

    def rehearsal(self, function: Callable[[], ResultT], *others: Tensor) -> Callable[[], ResultT]:
        """A function that changes this memory and other tensors, as one that leaves them as they are now, but for what
        is large."""
        kept = [*(own for name, own in self.tensors.items() if name not in self._large), *others]
        saved = [x.clone() for x in kept]

        def rehearse() -> ResultT:
            made = function()
            for own, before in zip(kept, saved, strict=True):
                own.copy_(before)
            return made

        return rehearse


class Recorded(Protocol):
    """Whatever has such a memory."""

    @property
    def memory(self) -> Memory: ...


RecordedT = TypeVar("RecordedT", bound=Recorded)


def recorded_for(recordings: Sequence[RecordedT], name: str, tensor: Tensor) -> RecordedT | None:
    """The recording in whose memory a tensor lies under this name, or one for its shape that is free, or None."""
    alike = [r for r in recordings if r.memory.tensors[name].shape == tensor.shape]
    mine = [r for r in alike if r.memory.is_at(name, tensor)] or [r for r in alike if r.memory.free]
    return mine[0] if mine else None
