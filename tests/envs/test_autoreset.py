"""Our episode bookkeeping against Gymnasium's own ``SyncVectorEnv``, transition for transition, on a toy world."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from same import assert_same

from hma_gym.envs.autoreset import Episodes, read_mode
from hma_gym.envs.outputs import NumpyOutput
from hma_gym.errors import EnvironmentState, InvalidArgument

N, LIMIT = 5, 7
SPACE = gymnasium.spaces.Box(-100.0, 100.0, (2,), np.float32)


class Walker(gymnasium.Env[Any, Any]):
    """A point that is pushed; the episode terminates beyond 1.5, which random pushes reach now and then."""

    observation_space = SPACE
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.position.copy(), {"far": False, "norm": float(np.abs(self.position).max())}

    def step(self, action: Any) -> Any:
        self.position = self.position + action
        norm = float(np.abs(self.position).max())
        return self.position.copy(), float(self.position[0]), norm > 1.5, False, {"far": norm > 1.5, "norm": norm}


class Walkers:
    """The same world in one batch, through our bookkeeping."""

    def __init__(self, mode: AutoresetMode) -> None:
        self.episodes = Episodes(mode, N, LIMIT)
        self.output = NumpyOutput()
        self.positions = np.zeros((N, 2), np.float32)

    def begin(self, mask: Any) -> None:
        for i in np.flatnonzero(mask):
            self.positions[i] = self.generators[i].uniform(-1, 1, 2)

    def values(self) -> dict[str, torch.Tensor]:
        norm = np.abs(self.positions).max(axis=1)
        return {"far": torch.from_numpy(self.walked & (norm > 1.5)), "norm": torch.from_numpy(norm)}

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        mask = np.ones(N, bool) if options is None else options["reset_mask"]
        if seed is not None:
            self.generators = [seeding.np_random(seed + i)[0] for i in range(N)]
        self.begin(mask)
        self.episodes.restart(mask)
        self.walked = ~mask
        return self.positions.copy(), self.output.infos(self.values(), mask)

    def step(self, actions: Any) -> Any:
        reset, steps = self.episodes.begin(1)
        self.begin(reset)
        self.walked = steps > 0
        self.positions[self.walked] += actions[self.walked]
        rewards = self.output.rewards(torch.from_numpy(np.where(self.walked, self.positions[:, 0], 0.0)))
        terminated = self.values()["far"].numpy()
        truncated, again = self.episodes.end(steps, terminated, np.zeros(N, bool))
        infos = self.output.final_infos(torch.from_numpy(self.positions), self.values(), again)
        self.begin(again)
        self.walked &= ~again
        infos.update(self.output.infos(self.values(), np.ones(N, bool)))
        return self.positions.copy(), rewards, terminated, truncated, infos


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_transition_is_that_of_sync_vector_env(mode: AutoresetMode, seed: int) -> None:
    theirs = SyncVectorEnv([lambda: gymnasium.wrappers.TimeLimit(Walker(), LIMIT)] * N, autoreset_mode=mode)
    ours = Walkers(mode)
    assert_same(ours.reset(seed=seed), theirs.reset(seed=seed))
    rng = np.random.default_rng(seed)
    ended = {"terminated": 0, "truncated": 0, "both": 0}
    for _ in range(300):
        actions = rng.uniform(-0.6, 0.6, (N, 2)).astype(np.float32)
        mine, their = ours.step(actions), theirs.step(actions)
        assert_same(mine, their)
        terminated, truncated = their[2], their[3]
        ended["terminated"] += int((terminated & ~truncated).sum())
        ended["truncated"] += int((truncated & ~terminated).sum())
        ended["both"] += int((truncated & terminated).sum())
        over = terminated | truncated
        if mode is AutoresetMode.DISABLED and over.any():
            with pytest.raises(EnvironmentState, match="reset_mask"):  # theirs asserts, but steps some before
                ours.step(actions)
            over |= rng.random(N) < 0.2  # some are also reset in the middle of an episode
            assert_same(ours.reset(options={"reset_mask": over.copy()}), theirs.reset(options={"reset_mask": over}))
        elif rng.random() < 0.05:
            mask = rng.random(N) < 0.5
            if mask.any():
                assert_same(ours.reset(options={"reset_mask": mask.copy()}), theirs.reset(options={"reset_mask": mask}))
    assert min(ended.values()) > 0


NONE = np.zeros(2, dtype=bool)


def test_a_chunk_stops_where_the_episode_does() -> None:
    episodes = Episodes(AutoresetMode.NEXT_STEP, 2, 5)
    _, steps = episodes.begin(4)
    assert steps.tolist() == [4, 4]
    truncated, _ = episodes.end(np.array([4, 2]), NONE, NONE)
    assert not truncated.any()
    _, steps = episodes.begin(4)
    assert steps.tolist() == [1, 3]
    truncated, _ = episodes.end(steps, NONE, NONE)
    assert truncated.all()
    reset, steps = episodes.begin(4)
    assert reset.all() and steps.tolist() == [0, 0] and episodes.elapsed_N.tolist() == [0, 0]
    truncated, _ = episodes.end(steps, NONE, NONE)
    assert not truncated.any()


def test_an_episode_ends_where_the_model_is_lost() -> None:
    episodes = Episodes(AutoresetMode.SAME_STEP, 2, 5)
    _, steps = episodes.begin(1)
    truncated, again = episodes.end(steps, NONE, np.array([True, False]))
    assert truncated.tolist() == again.tolist() == [True, False] and episodes.elapsed_N.tolist() == [0, 1]


def test_without_a_limit_nothing_is_truncated() -> None:
    episodes = Episodes(AutoresetMode.NEXT_STEP, 1, None)
    for _ in range(3):
        _, steps = episodes.begin(1000)
        assert steps.tolist() == [1000]
        assert not episodes.end(steps, NONE[:1], NONE[:1])[0].any()


def test_modes_and_limits_are_checked() -> None:
    assert read_mode("SameStep") is AutoresetMode.SAME_STEP and read_mode(AutoresetMode.DISABLED).value == "Disabled"
    with pytest.raises(InvalidArgument, match="NextStep"):
        read_mode("next")
    with pytest.raises(InvalidArgument, match="max_episode_steps"):
        Episodes(AutoresetMode.NEXT_STEP, 1, 0)
