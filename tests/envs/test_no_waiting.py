"""No step waits for the device: nothing in it is read back, has a size that values decide, or is made on the host.

Any of these would also keep it out of a CUDA graph. Seen on a CPU, by the operations that a step calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recorded import replay_on_the_host
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.published import PublishedConfig, PublishedModel, published_trunk
from hma_gym.dynamics.steppers import CudaGraphs, Sketch, SketchGraphs
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.nn.precision import tensor_float32

N = 2
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique2",
    "_unique2",
    "is_nonzero",
    "lift_fresh",
    "equal",
}


class _Waits(TorchDispatchMode):
    """Collects the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).removeprefix("aten.").partition(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in indices)
        if name in WAITING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def lift() -> Checkpoint:
    return load_checkpoint("lift-64")


@pytest.mark.parametrize("judge", ["classifier", "feature"])
@pytest.mark.parametrize("stepper", [None, Sketch])
def test_no_step_of_the_world_waits(lift: Checkpoint, judge: str, stepper: Any) -> None:
    world = LearnedWorld(lift, judge=judge, stepper=stepper)
    with torch.inference_mode():
        rows = world.begin(np.arange(N), np.arange(N))
        rows = world.step(rows, torch.zeros(N, world.action_size), np.ones(N, dtype=bool))
        with _Waits() as waits:
            rows = world.step(rows, torch.zeros(N, world.action_size), np.ones(N, dtype=bool))
            world.judged(world.see(rows, world.window if judge == "classifier" else 1))
    assert waits.found == []


def test_of_a_step_of_the_environment_only_the_check_of_actions_waits(lift: Checkpoint) -> None:
    envs = HMAVectorEnv(N, checkpoint=lift, output="torch")
    envs.reset(seed=0)
    actions = torch.from_numpy(envs.action_space.sample())
    envs.step(actions)
    with _Waits() as waits:
        envs.step(actions)
    # What is made on the host here goes to a GPU without waiting, see hma_gym.envs.outputs.on_device.
    assert [name for name in waits.found if name != "lift_fresh"] == ["_local_scalar_dense"]


def test_no_published_frame_waits() -> None:
    head = MaskGITHeadConfig(grid=(4, 4), vocabulary=(8, 8))
    model = PublishedModel(PublishedConfig(published_trunk(2, 16, 2, window=3), head, 2)).eval()
    state = model.start(torch.zeros(N, 16, dtype=torch.int64), torch.arange(N), keep=2)
    for _ in range(4):
        with _Waits() as waits:
            state, _ = model.step(state, torch.zeros(N, 7), in_place=True)
        assert waits.found == []


STEPPERS = [(CudaGraphs, None), (SketchGraphs, Sketch)]


@pytest.mark.gpu
@pytest.mark.parametrize(("stepper", "plain"), STEPPERS)
def test_on_a_gpu_a_recorded_world_is_the_same_world(stepper: Any, plain: Any) -> None:
    lift = load_checkpoint("lift-64", device="cuda")
    host = HMAVectorEnv(N, checkpoint=LearnedWorld(load_checkpoint("lift-64"), stepper=plain), max_episode_steps=6)
    ours, theirs = (
        HMAVectorEnv(N, checkpoint=LearnedWorld(lift, stepper=kind), max_episode_steps=6, obs_type="pixels_agent_pos")
        for kind in (stepper, plain)
    )
    with tensor_float32(False):
        for envs in (ours, theirs, host):
            envs.reset(seed=0)
        ours.action_space.seed(0)
        for _ in range(10):
            actions = ours.action_space.sample()
            (seen, *mine), (other, *their), (true, *_) = (envs.step(actions) for envs in (ours, theirs, host))
            assert np.abs(seen["pixels"].astype(int) - other["pixels"]).max() <= 1
            assert np.abs(seen["pixels"].astype(int) - true).max() <= 3
            assert np.allclose(seen["agent_pos"], other["agent_pos"], atol=1e-5)
            for ours_N, theirs_N in zip(mine[:3], their[:3], strict=True):
                assert np.array_equal(ours_N, theirs_N)


@pytest.mark.parametrize(("stepper", "plain"), STEPPERS)
def test_a_recorded_world_is_the_same_world(
    lift: Checkpoint, monkeypatch: pytest.MonkeyPatch, stepper: Any, plain: Any
) -> None:
    recorded = replay_on_the_host(monkeypatch)
    ours, theirs = (
        HMAVectorEnv(N, checkpoint=LearnedWorld(lift, stepper=kind), max_episode_steps=3, terminate_on_success=True)
        for kind in (stepper, plain)
    )
    ours.reset(seed=0), theirs.reset(seed=0)
    ours.action_space.seed(0)
    for _ in range(8):  # over the ends of episodes, where some rows begin anew
        actions = ours.action_space.sample()
        for mine, other in zip(ours.step(actions)[:4], theirs.step(actions)[:4], strict=True):
            assert np.array_equal(mine, other)
    assert len(recorded) == 3  # a step, a frame with what the judge notes of it, a verdict
