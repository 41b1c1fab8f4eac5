"""A learned world whose judge is told agent_pos: of the frames that it sees, whenever they are decoded."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from same import assert_same
from torch import Tensor
from toy_checkpoint import ACTION_DIM, told_checkpoint, toy_checkpoint, toy_domain

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import Context, LearnedWorld
from hma_gym.errors import CheckpointError, EnvironmentState
from hma_gym.judges.protocol import episode_probabilities

N, WINDOW = 3, 3


@pytest.fixture(scope="module")
def told() -> Checkpoint:
    return told_checkpoint()


@pytest.fixture(scope="module")
def world(told: Checkpoint) -> LearnedWorld:
    return LearnedWorld(told)


def actions(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, ACTION_DIM)).astype(np.float32)


class Record:
    """What was shown, felt and said, row by row; agent_pos before the observation space clips it."""

    def __init__(self) -> None:
        self.frames: list[Tensor] = []
        self.agent_pos: list[Tensor] = []
        self.said: list[Tensor] = []

    def note(self, envs: HMAVectorEnv, observations: Any, infos: dict[str, Any]) -> None:
        self.frames.append(torch.from_numpy(observations["pixels"]))
        self.agent_pos.append(envs.save_state()["tensors"]["rollout.agent_pos_BP"])
        self.said.append(torch.from_numpy(infos["success_probability"]).float())

    def expected(self, checkpoint: Checkpoint, begin: int, end: int, told: bool = True) -> Tensor:
        assert checkpoint.judge is not None
        frames, agent_pos = (torch.stack(x[begin:end], dim=1) for x in (self.frames, self.agent_pos))
        return episode_probabilities(checkpoint.judge, frames, agent_pos_BTP=agent_pos if told else None)


def played(envs: HMAVectorEnv, steps: int, chunk: int = 1) -> Record:
    """With chunks, only what is shown at their ends is noted."""
    record = Record()
    record.note(envs, *envs.reset(seed=0))
    for a in actions(1, steps // chunk, chunk, envs.num_envs):
        if chunk == 1:
            observations, _, _, _, infos = envs.step(a[0])
        else:
            done = envs.step_chunk(a.swapaxes(0, 1), decode="last")
            observations, infos = done.observations, done.infos
        record.note(envs, observations, infos)
    return record


@pytest.mark.parametrize("refresh", [0, 2])
def test_the_worlds_verdict_is_the_judges_on_what_was_shown_and_felt(refresh: int) -> None:
    checkpoint = told_checkpoint(refresh)
    envs = HMAVectorEnv(N, checkpoint=checkpoint, obs_type="pixels_agent_pos")
    record = played(envs, 8)
    said = torch.stack(record.said, dim=1)
    torch.testing.assert_close(said, record.expected(checkpoint, 0, 9), atol=1e-4, rtol=0)
    assert ((said - record.expected(checkpoint, 0, 9, told=False)).abs() > 0.01).any()
    assert not torch.equal(record.agent_pos[3], record.agent_pos[4])


def test_frames_that_are_decoded_later_have_their_own_agent_pos(told: Checkpoint, world: LearnedWorld) -> None:
    one, many = (HMAVectorEnv(N, checkpoint=world, obs_type="pixels_agent_pos") for _ in range(2))
    single, chunked = played(one, 8), played(many, 8, chunk=4)
    for said, expected in zip(chunked.said, single.said[::4], strict=True):
        assert torch.equal(said, expected)
    a = actions(3, 5, N)
    for step in a:
        _, _, _, _, infos = one.step(step)
    many.step_chunk(a[:4].swapaxes(0, 1), decode="none")
    assert_same(many.step(a[4])[4], infos, tolerance=0)


def test_each_episode_has_a_window_of_its_own(told: Checkpoint, world: LearnedWorld) -> None:
    envs = HMAVectorEnv(N, checkpoint=world, obs_type="pixels_agent_pos", max_episode_steps=3)
    record = played(envs, 9)
    for begin, end in ((0, 4), (4, 8), (8, 10)):  # the step after the third one resets
        said = torch.stack(record.said[begin:end], dim=1)
        torch.testing.assert_close(said, record.expected(told, begin, end), atol=1e-4, rtol=0)


def test_some_environments_begin_anew(told: Checkpoint, world: LearnedWorld) -> None:
    envs = HMAVectorEnv(N, checkpoint=world, obs_type="pixels_agent_pos")
    before = played(envs, 4)
    again = Record()
    mask = np.array([False, True, False])
    again.note(envs, *envs.reset(options={"reset_mask": mask}))
    for a in actions(5, 2, N):
        observations, _, _, _, infos = envs.step(a)
        again.note(envs, observations, infos)
    said = torch.stack(again.said, dim=1)
    fresh = again.expected(told, 0, 3)
    torch.testing.assert_close(said[1], fresh[1], atol=1e-4, rtol=0)
    before.frames, before.agent_pos = [*before.frames, *again.frames[1:]], [*before.agent_pos, *again.agent_pos[1:]]
    torch.testing.assert_close(said[[0, 2], 1:], before.expected(told, 0, 7)[[0, 2], 5:], atol=1e-4, rtol=0)


def test_saved_and_forked(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(N, checkpoint=world, obs_type="pixels_agent_pos")
    played(envs, 4)
    envs.step_chunk(actions(1, N, 2), decode="none")
    saved, twin = envs.save_state(), envs.fork(2)
    a = actions(2, N)
    expected = envs.step(a)
    envs.load_state(saved)
    assert_same(envs.step(a), expected, tolerance=0)
    infos = twin.step(a.repeat(2, axis=0))[4]
    assert np.allclose(infos["success_probability"][::2], expected[4]["success_probability"], atol=1e-4)
    assert saved["tensors"]["agent_pos"].shape == (N, WINDOW, 9)
    older = {**saved, "version": 3, "tensors": {k: v for k, v in saved["tensors"].items() if k != "agent_pos"}}
    with pytest.raises(EnvironmentState, match="version 4.*got version 3"):
        envs.load_state(older)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("every", [True, False])
def test_given_frames_have_the_given_agent_pos_or_the_foretold(world: LearnedWorld, shared: bool, every: bool) -> None:
    rng, R, T = np.random.default_rng(0), 2, 4
    leading = 1 if shared else R
    context = Context(
        rng.integers(0, 256, (leading, T, *world.image_size, 3), dtype=np.uint8),
        actions(0, leading, T - 1),
        rng.uniform(-0.3, 0.3, (leading, T if every else 1, 9)).astype(np.float32),
    )
    with torch.inference_mode():
        rows = world.begin_from(context, np.arange(R))
        infos, _ = world.judged(rows)
    judge = world.judge
    assert judge is not None and torch.equal(rows.agent_pos_NFP[:, -1], rows.rollout.agent_pos_BP)
    if every:
        given = torch.from_numpy(context.agent_pos_RTP).expand(R, -1, -1)
        assert torch.equal(rows.agent_pos_NFP, given[:, -WINDOW:])
    said = judge.probability(rows.frames_NFHWC, rows.agent_pos_NFP)  # type: ignore[union-attr,call-arg]
    torch.testing.assert_close(infos["success_probability"], said, atol=1e-4, rtol=0)


class Listener:
    """A judge of no codes that keeps what it is told."""

    name, window, threshold, state_dim = "listener", 2, 0.5, 9

    def __init__(self) -> None:
        self.felt: list[Tensor | None] = []

    def probability(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        self.felt.append(None if agent_pos_BKP is None else agent_pos_BKP.clone())
        return torch.zeros(len(frames_BKHWC))


def test_any_judge_can_be_told() -> None:
    judge = Listener()
    envs = HMAVectorEnv(N, checkpoint=toy_checkpoint(judge=False), judge=judge, obs_type="pixels_agent_pos")
    record = played(envs, 3)
    for t, felt in enumerate(judge.felt):
        assert felt is not None
        assert torch.equal(felt, torch.stack([record.agent_pos[max(t - 1, 0)], record.agent_pos[t]], dim=1))


def test_a_judge_of_frames_alone_is_told_nothing() -> None:
    envs = HMAVectorEnv(N, checkpoint=toy_checkpoint())
    envs.reset(seed=0)
    assert envs.save_state()["tensors"]["agent_pos"].shape == (N, WINDOW, 0)


def test_a_judge_of_another_robot_is_refused(told: Checkpoint) -> None:
    other = dataclasses.replace(toy_checkpoint(toy_domain(state_dim=8)), judge=told.judge)
    with pytest.raises(
        CheckpointError, match=r"is told 9 dims of agent_pos, and domain 'lift' .* has 8; train a judge"
    ):
        LearnedWorld(other)
