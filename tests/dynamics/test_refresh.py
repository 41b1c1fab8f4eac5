"""Tokens brought back to what the tokenizer makes: at the right steps, row by row, alike in every kind of rollout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toy_checkpoint import ACTION_DIM, toy_checkpoint

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.dynamics.refresh import in_groups, refreshed
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.open_loop import generate


def _checkpoint(refresh: int) -> Checkpoint:
    checkpoint = toy_checkpoint()
    config = dataclasses.replace(checkpoint.dynamics.config, refresh=refresh, temperature=0.0)
    dynamics = Dynamics(config, checkpoint.dynamics.domains)
    dynamics.load_state_dict(checkpoint.dynamics.state_dict())
    return dataclasses.replace(checkpoint, dynamics=dynamics.eval().requires_grad_(False))


def test_only_the_rows_whose_step_is_due_make_the_round_trip() -> None:
    checkpoint = _checkpoint(3)
    tokens = checkpoint.tokenizer.encode(torch.from_numpy(checkpoint.starts.frames_NHWC[:3])) + 0.5
    state = checkpoint.dynamics.start(tokens, torch.zeros(3, 9), torch.arange(3))
    state = dataclasses.replace(state, step_B=torch.tensor([3, 4, 6]))
    after = refreshed(state, checkpoint.tokenizer, 3)
    round_trip = checkpoint.tokenizer.encode(checkpoint.tokenizer.decode(tokens))
    assert not torch.allclose(round_trip, tokens)
    assert torch.equal(after.tokens[[0, 2]], round_trip[[0, 2]]) and torch.equal(after.tokens[1], tokens[1])
    assert refreshed(state, checkpoint.tokenizer, 0) is state and refreshed(state, checkpoint.tokenizer, 5) is state


def test_who_else_is_due_changes_no_bit() -> None:
    checkpoint = _checkpoint(2)
    tokens = checkpoint.tokenizer.encode(torch.from_numpy(checkpoint.starts.frames_NHWC))[torch.arange(20) % 6] + 0.5
    sizes = []

    def trip(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(part))
        frames = checkpoint.tokenizer.decode(part)
        return checkpoint.tokenizer.encode(frames), frames

    together, frames = in_groups(trip, (tokens[:18],), range(18))
    assert sizes == [4, 4, 4, 4, 2] and len(together) == len(frames) == 18
    for due in ([3], [0, 3, 17], list(range(2, 14))):
        alone, shown = in_groups(trip, (tokens[:18],), due)
        assert torch.equal(alone, together[due]) and torch.equal(shown, frames[due])
    assert sizes[5:8] == [4, 4, 2]  # where few are due, little is done


def test_a_neighbour_that_resets_changes_no_bit() -> None:
    """Once a row is out of step with the others, they make the round trip at different times."""
    shown = {}
    actions = np.random.default_rng(0).uniform(-1, 1, (9, 3, ACTION_DIM)).astype(np.float32)
    for busy in (False, True):
        envs = HMAVectorEnv(3, checkpoint=_checkpoint(3))
        envs.reset(seed=0)
        frames = []
        for t in range(9):
            if busy and t == 4:
                envs.reset(options={"reset_mask": np.array([False, True, False])})
            observations, _, _, _, infos = envs.step(actions[t])
            frames.append((observations[[0, 2]], infos["success_probability"][[0, 2]]))
        shown[busy] = frames
    for (quiet, said), (other, said_too) in zip(shown[False], shown[True], strict=True):
        assert np.array_equal(quiet, other) and np.array_equal(said, said_too)


def test_environments_and_open_loop_refresh_alike() -> None:
    frames = {}
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 5, ACTION_DIM)).astype(np.float32)
    for refresh in (0, 2):
        checkpoint = _checkpoint(refresh)
        envs = HMAVectorEnv(2, checkpoint=checkpoint)
        envs.reset(seed=[3, 4], options={"start": 1})
        seen = np.stack([envs.step(actions[:, t])[0] for t in range(5)], axis=1)
        starts = checkpoint.starts
        generated = generate(
            checkpoint,
            torch.from_numpy(starts.frames_NHWC[[1, 1]]),
            torch.from_numpy(starts.agent_pos_NP[[1, 1]]),
            torch.from_numpy(actions),
            torch.tensor([3, 4]),
        )
        difference = np.abs(seen.astype(int) - generated.frames_BTHWC.numpy().astype(int))
        assert difference.max() <= 1
        frames[refresh] = seen
    assert np.array_equal(frames[0][:, :2], frames[2][:, :2]) and not np.array_equal(frames[0], frames[2])


def test_a_pose_stays_within_what_was_seen() -> None:
    checkpoint = _checkpoint(0)
    body = checkpoint.dynamics.adapter(0).body
    body.set_pose_bounds(torch.full((9,), -0.125), torch.full((9,), 0.25))
    tokens = checkpoint.tokenizer.encode(torch.from_numpy(checkpoint.starts.frames_NHWC[:2]))
    state = checkpoint.dynamics.start(tokens, torch.zeros(2, 9), torch.arange(2))
    for value in (-5.0, 5.0):
        held = body.within(torch.full((2, 9), value))
        assert torch.equal(held, torch.full((2, 9), -0.125 if value < 0 else 0.25))
    for _ in range(20):
        state, _ = checkpoint.dynamics.step(state, torch.ones(2, ACTION_DIM))
    assert float(state.agent_pos_BP.min()) >= -0.125 and float(state.agent_pos_BP.max()) <= 0.25


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="refresh=-1"):
        DynamicsConfig(refresh=-1)
