"""HMAVectorEnv: Gymnasium's semantics, seeds, independence, chunks, saved states, forks, outputs and errors."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from same import assert_same
from toy_checkpoint import ACTION_DIM, SIZE, STARTS, STATE_DIM, toy_checkpoint, toy_domain

import hma_gym
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hma_gym.envs.single import HMAEnv
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import EnvironmentState, InvalidAction, InvalidArgument, InvalidImage, UnknownName
from hma_gym.nn.precision import tensor_float32

N = 3
# Batches of different size round differently; after some steps of feedback a pixel may land on the other side.
PIXELS, TOLERANCE = 1, 1e-3


@pytest.fixture(scope="module")
def world(toy: Checkpoint) -> LearnedWorld:
    return LearnedWorld(toy)


def actions(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, ACTION_DIM)).astype(np.float32)


def run(envs: HMAVectorEnv, steps: int, seed: int = 9) -> list[Any]:
    return [envs.step(a) for a in actions(seed, steps, envs.num_envs)]


class Brightness:
    """A judge that is sure of bright frames, and keeps what it saw."""

    name, window, threshold = "brightness", 3, 0.5

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def probability(self, frames_BKHWC: torch.Tensor) -> torch.Tensor:
        self.seen.append(frames_BKHWC.clone())
        return frames_BKHWC[:, -1].float().mean(dim=(1, 2, 3)) / 255


class Dice:
    """A judge whose verdict is as good as random, and the same for the same pixels."""

    name, window, threshold = "dice", 3, 0.75

    def probability(self, frames_BKHWC: torch.Tensor) -> torch.Tensor:
        return (frames_BKHWC.long().sum(dim=(1, 2, 3, 4)) * 31 % 97) / 97


# ---------------------------------------------------------------------- Gymnasium's semantics


def test_make_vec_gives_the_native_env_without_a_warning(toy_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gymnasium.make_vec("HMA-Lift-v0", num_envs=2, checkpoint=toy_folder)
        assert type(envs) is HMAVectorEnv and envs.num_envs == 2 and envs.spec is not None
        assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        assert "autoreset_mode" not in HMAVectorEnv.metadata
        horizon = gymnasium.spec("HMA-Lift-v0").max_episode_steps
        observations, _ = envs.reset(seed=0)
        assert observations in envs.observation_space
        for t in range(horizon):
            _, _, _, truncations, _ = envs.step(envs.action_space.sample())
            assert truncations.all() == (t == horizon - 1)
        envs.close()
        other = gymnasium.make_vec("HMA-v0", num_envs=2, checkpoint=toy_folder, autoreset_mode="SameStep")
    assert other.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("obs_type", ["pixels", "pixels_agent_pos"])
@pytest.mark.parametrize("terminate", [False, True])
def test_it_is_a_sync_vector_env_of_single_envs(
    world: LearnedWorld, mode: AutoresetMode, obs_type: Any, terminate: bool
) -> None:
    def single() -> gymnasium.Env[Any, Any]:
        env = HMAEnv(checkpoint=world, obs_type=obs_type, terminate_on_success=terminate)
        return gymnasium.wrappers.TimeLimit(env, 4)

    theirs = SyncVectorEnv([single] * N, autoreset_mode=mode)
    ours = HMAVectorEnv(
        N, checkpoint=world, obs_type=obs_type, max_episode_steps=4, autoreset_mode=mode, terminate_on_success=terminate
    )
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert_same(ours.reset(seed=3), theirs.reset(seed=3), PIXELS, TOLERANCE)
    ends = 0
    for a in actions(1, 14, N):
        mine, their = ours.step(a), theirs.step(a)
        assert_same(mine, their, PIXELS, TOLERANCE)
        over = their[2] | their[3]
        ends += over.sum()
        if mode is AutoresetMode.DISABLED and over.any():
            with pytest.raises(EnvironmentState, match="reset_mask"):
                ours.step(a)
            mine, their = (envs.reset(options={"reset_mask": over.copy()}) for envs in (ours, theirs))
            assert_same(mine, their, PIXELS, TOLERANCE)
    assert ends > N
    assert ours.np_random_seed == theirs.np_random_seed
    assert [g.random() for g in ours.np_random] == [g.random() for g in theirs.np_random]


def test_an_episode_begins_with_a_real_frame_and_its_agent_pos(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(N, checkpoint=world, obs_type="pixels_agent_pos")
    starts = world.checkpoint.starts
    observations, _ = envs.reset(options={"start": np.array([4, 0, 4])})
    assert np.array_equal(observations["pixels"], starts.frames_NHWC[[4, 0, 4]])
    assert np.array_equal(observations["agent_pos"], starts.agent_pos_NP[[4, 0, 4]])
    drawn = {int(world.nearest_start(image)) for s in range(20) for image in envs.reset(seed=s)[0]["pixels"]}
    assert drawn == set(range(STARTS))


def test_what_is_handed_out_is_never_touched_again(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(N, checkpoint=world, max_episode_steps=2, autoreset_mode="SameStep")
    handed = [envs.reset(seed=0)[0]] + [step[0] for step in run(envs, 5)]
    copies = [x.copy() for x in handed]
    handed[-1][:] = 0  # and the environment does not look at it
    assert envs.observe().any()
    run(envs, 3)
    assert all(np.array_equal(a, b) for a, b in zip(handed[:-1], copies[:-1], strict=True))


def test_gymnasiums_own_wrapper_counts_the_episodes(world: LearnedWorld) -> None:
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(HMAVectorEnv(2, checkpoint=world, max_episode_steps=3))
    envs.reset(seed=0)
    lengths = [
        infos["episode"]["l"].tolist() for *_, infos in (envs.step(a) for a in actions(0, 8, 2)) if "episode" in infos
    ]
    assert lengths == [[3, 3], [3, 3]]


# ---------------------------------------------------------------------- seeds and independence


def test_same_seed_same_frames(world: LearnedWorld) -> None:
    envs, again = (HMAVectorEnv(N, checkpoint=world, max_episode_steps=4) for _ in range(2))
    first = [envs.reset(seed=5), *run(envs, 10)]
    second = [again.reset(seed=[5, 6, 7]), *run(again, 10)]
    third = [envs.reset(seed=5), *run(envs, 10)]
    for a, b, c in zip(first, second, third, strict=True):
        assert_same(b, a, tolerance=0)
        assert_same(c, a, tolerance=0)
    other = [envs.reset(seed=6), *run(envs, 10)]
    assert not np.array_equal(other[-1][0], first[-1][0])
    assert np.array_equal(other[0][0][0], first[0][0][1])  # env 0 of seed 6 is env 1 of seed 5


def test_generated_frames_differ_between_seeds_from_the_same_start(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(2, checkpoint=world)
    envs.reset(seed=[1, 2], options={"start": 0})
    pixels = envs.step(np.ones((2, ACTION_DIM), np.float32))[0]
    assert not np.array_equal(pixels[0], pixels[1])
    greedy = HMAVectorEnv(2, checkpoint=world.checkpoint, temperature=0.0)
    greedy.reset(seed=[1, 2], options={"start": 0})
    pixels = greedy.step(np.ones((2, ACTION_DIM), np.float32))[0].astype(int)
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # rows of one batch are rounded alike only nearly
    mine, shared = greedy.world.dynamics.state_dict(), world.dynamics.state_dict()
    assert all(mine[name].data_ptr() == shared[name].data_ptr() for name in shared)
    assert world.dynamics.config.temperature == 1.0


def watch_first(world: LearnedWorld, mode: AutoresetMode, neighbours: int, resets: dict[int, Any]) -> Any:
    """Env 0's transitions beside three neighbours, and when these ended or were reset."""
    envs = HMAVectorEnv(
        4, checkpoint=world.checkpoint, obs_type="pixels_agent_pos", max_episode_steps=3, autoreset_mode=mode,
        terminate_on_success=True, judge=Dice(),
    )  # fmt: skip
    mine, others = actions(7, 16), actions(neighbours, 16, 3)
    observations, infos = envs.reset(seed=[0, neighbours, neighbours + 1, neighbours + 2])
    seen, events = [({k: v[0] for k, v in observations.items()}, infos["success_probability"][0])], []
    for t in range(16):
        if t in resets:
            observations, _ = envs.reset(options={"reset_mask": np.array([False, *resets[t]])})
            assert_same({k: v[0] for k, v in observations.items()}, seen[-1][0], tolerance=0)
        observations, rewards, terminated, truncated, infos = envs.step(np.concatenate((mine[t, None], others[t])))
        events.append((terminated | truncated)[1:].tolist())
        final = infos["final_obs"][0] if "final_obs" in infos else None
        row = {k: v[0] for k, v in observations.items()}
        seen.append(
            (row, rewards[0], bool(terminated[0]), bool(truncated[0]), infos["success_probability"][0], final or {})
        )
    return seen, events


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_an_environment_does_not_feel_its_neighbours(world: LearnedWorld, mode: AutoresetMode) -> None:
    quiet, quiet_events = watch_first(world, mode, 20, {})
    busy, busy_events = watch_first(world, mode, 30, {2: [True, False, True], 9: [False, True, True]})
    assert quiet_events != busy_events and any(map(any, busy_events))
    assert any(step[2] for step in quiet[1:]) and any(step[3] for step in quiet[1:])
    for a, b in zip(quiet, busy, strict=True):
        assert_same(b, a, tolerance=0)


# ---------------------------------------------------------------------- the judge


def test_the_judge_sees_the_last_frames_of_each_episode(toy: Checkpoint) -> None:
    judge = Brightness()
    envs = HMAVectorEnv(2, checkpoint=toy, judge=judge, max_episode_steps=3)
    shown = [envs.reset(seed=0)[0]]
    windows = [judge.seen[-1].numpy()]
    for a in actions(0, 8, 2):
        observations, rewards, _, _, infos = envs.step(a)
        shown.append(observations)
        windows.append(judge.seen[-1].numpy())
        assert np.array_equal(rewards > 0, infos["is_success"])
        assert np.array_equal(infos["is_success"], infos["success_probability"] >= 0.5)
    assert len(judge.seen) == 9  # once a step
    begin = 0
    for t, window in enumerate(windows):
        if t in (4, 8):  # the step after the third one resets
            begin = t
        expected = np.stack([shown[max(begin, t - back)] for back in (2, 1, 0)], axis=1)
        assert np.array_equal(window, expected), t


def test_a_checkpoint_without_a_judge_has_no_verdicts() -> None:
    envs = HMAVectorEnv(2, checkpoint=toy_checkpoint(judge=False))
    assert envs.reset(seed=0)[1] == {}
    _, rewards, _, _, infos = envs.step(actions(0, 2))
    assert infos == {} and not rewards.any()
    with pytest.raises(InvalidArgument, match="terminate_on_success needs a judge"):
        HMAVectorEnv(2, checkpoint=toy_checkpoint(judge=False), terminate_on_success=True)


def test_a_judge_that_answers_wrongly_is_named(toy: Checkpoint) -> None:
    class Scalar(Brightness):
        def probability(self, frames_BKHWC: torch.Tensor) -> torch.Tensor:
            return torch.tensor(0.5)

    with pytest.raises(InvalidArgument, match="judge 'brightness' must give one probability"):
        HMAVectorEnv(2, checkpoint=toy, judge=Scalar()).reset(seed=0)
    with pytest.raises(UnknownName, match="nobody"):
        HMAVectorEnv(2, checkpoint=toy, judge="nobody")


# ---------------------------------------------------------------------- options of reset


def test_your_own_image(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(2, checkpoint=world, obs_type="pixels_agent_pos")
    starts = world.checkpoint.starts
    image, pose = starts.frames_NHWC[2], starts.agent_pos_NP[2]
    envs.reset(seed=1, options={"start": 2})
    expected = run(envs, 3)
    for options in (
        {"image": image, "agent_pos": pose},
        {"image": np.stack([image, image]), "agent_pos": np.stack([pose, pose])},
        {"image": torch.from_numpy(image), "agent_pos": "nearest"},
    ):
        observations, _ = envs.reset(seed=1, options=options)
        assert np.array_equal(observations["pixels"][1], image) and np.array_equal(observations["agent_pos"][1], pose)
        for a, b in zip(run(envs, 3), expected, strict=True):
            assert_same(a, b, PIXELS, TOLERANCE)
    noisy = np.clip(image.astype(int) + 3, 0, 255).astype(np.uint8)
    observations, _ = envs.reset(options={"image": noisy, "agent_pos": "nearest"})
    assert np.array_equal(observations["pixels"][0], noisy) and np.array_equal(observations["agent_pos"][0], pose)


def test_several_frames_of_context(world: LearnedWorld) -> None:
    """Given the world's own frames as context, it goes on much as it did; given others, it does not."""
    envs = HMAVectorEnv(2, checkpoint=world, obs_type="pixels_agent_pos")
    a = actions(3, 2)
    first, _ = envs.reset(seed=0, options={"start": 1})
    frames, poses = [first["pixels"][0]], [first["agent_pos"][0]]
    for action in a[:, None].repeat(2, axis=1):
        observations = envs.step(action)[0]
        frames.append(observations["pixels"][0])
        poses.append(observations["agent_pos"][0])
    options = {"images": np.stack(frames), "actions": a, "agent_pos": np.stack(poses)}
    observations, infos = envs.reset(seed=0, options=options)
    assert np.array_equal(observations["pixels"][0], frames[-1]) and np.allclose(
        observations["agent_pos"][0], poses[-1]
    )
    assert int(envs.save_state()["tensors"]["rollout.step_B"][0]) == 2
    told = envs.step(actions(4, 2))[0]["pixels"]
    envs.reset(seed=0, options={"image": frames[-1], "agent_pos": poses[-1]})
    assert not np.array_equal(envs.step(actions(4, 2))[0]["pixels"], told)
    options.pop("agent_pos")
    observations, _ = envs.reset(seed=0, options={**options, "agent_pos": "nearest"})
    assert np.isfinite(observations["agent_pos"]).all()
    per_env = {"images": np.stack([np.stack(frames)] * 2), "actions": np.stack([a] * 2), "agent_pos": "nearest"}
    mask = np.array([False, True])
    again, _ = envs.reset(seed=0, options={**per_env, "reset_mask": mask})
    assert_same(again["pixels"], observations["pixels"])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"begin": 1}, InvalidArgument, "unknown keys \\['begin'\\]"),
        ({"start": STARTS}, InvalidArgument, r"must lie in \[0, 6\)"),
        ({"start": -1}, InvalidArgument, "must lie in"),
        ({"start": 1.0}, InvalidArgument, "integer"),
        ({"start": [0, 1]}, InvalidArgument, r"shape \(3,\)"),
        ({"start": 0, "image": np.zeros((SIZE, SIZE, 3), np.uint8)}, InvalidArgument, "one of start, image and images"),
        ({"agent_pos": np.zeros(STATE_DIM)}, InvalidArgument, "belongs to"),
        ({"actions": np.zeros((1, ACTION_DIM))}, InvalidArgument, "belongs to"),
        ({"image": np.zeros((SIZE, SIZE, 3), np.uint8)}, InvalidArgument, "agent_pos.* must be given"),
        ({"image": np.zeros((SIZE, SIZE, 3))}, InvalidImage, "uint8 in 0..255, got float64"),
        ({"image": np.zeros((64, 64, 3), np.uint8)}, InvalidImage, r"\(40, 40\).*got \(64, 64, 3\)"),
        ({"image": np.zeros((3, SIZE, SIZE), np.uint8)}, InvalidImage, "colour channels last"),
        ({"image": np.zeros((2, SIZE, SIZE, 3), np.uint8)}, InvalidImage, "or 3 of them"),
        (
            {"image": np.zeros((SIZE, SIZE, 3), np.uint8), "agent_pos": np.zeros(4)},
            InvalidArgument,
            r"of shape \(9,\).*got shape \(4,\)",
        ),
        (
            {"image": np.zeros((SIZE, SIZE, 3), np.uint8), "agent_pos": np.full(STATE_DIM, np.nan)},
            InvalidArgument,
            "finite",
        ),
        (
            {"image": np.zeros((SIZE, SIZE, 3), np.uint8), "agent_pos": [object()]},
            InvalidArgument,
            "array of numbers",
        ),
        ({"images": np.zeros((2, SIZE, SIZE, 3), np.uint8)}, InvalidArgument, "needs options\\['actions'\\]"),
        ({"image": [[1, 2], [3]], "agent_pos": "nearest"}, InvalidArgument, "must be an array"),
        ({"images": np.zeros((0, SIZE, SIZE, 3), np.uint8)}, InvalidImage, "at least one frame"),
        (
            {"images": np.zeros((2, SIZE, SIZE, 3), np.uint8), "actions": np.zeros((2, ACTION_DIM))},
            InvalidArgument,
            r"shape \(1, 7\) for 2 frames",
        ),
        ({"reset_mask": np.array([True, False])}, InvalidArgument, r"bool array of shape \(3,\)"),
        ({"reset_mask": np.zeros(3, bool)}, InvalidArgument, "at least one True"),
        ({"reset_mask": np.ones(3)}, InvalidArgument, "float64"),
    ],
)
def test_wrong_options_are_refused_and_change_nothing(
    world: LearnedWorld, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    envs = HMAVectorEnv(N, checkpoint=world)
    envs.reset(seed=0)
    before = envs.save_state()
    with pytest.raises(error, match=text):
        envs.reset(seed=1, options=options)
    after = envs.save_state()
    assert after["generators"] == before["generators"]
    assert torch.equal(after["tensors"]["tokens"], before["tensors"]["tokens"])


# ---------------------------------------------------------------------- chunks


def test_a_chunk_is_that_many_steps(toy: Checkpoint) -> None:
    world = LearnedWorld(toy, judge=Dice())
    envs, chunked = (HMAVectorEnv(N, checkpoint=world, obs_type="pixels_agent_pos") for _ in range(2))
    envs.reset(seed=0)
    a = actions(2, N, 5)
    steps = [envs.step(a[:, h]) for h in range(5)]
    chunked.reset(seed=0)
    chunk = chunked.step_chunk(a, decode="all")
    for h in range(5):
        assert_same({k: v[:, h] for k, v in chunk.path.items()}, steps[h][0], tolerance=0)
    assert np.array_equal(chunk.rewards, np.sum([step[1] for step in steps], axis=0)) and chunk.rewards.any()
    assert chunk.steps.tolist() == [5] * N
    assert_same(chunk.observations, steps[-1][0], tolerance=0)
    assert_same(chunk.infos, steps[-1][4], tolerance=0)

    chunked.reset(seed=0)
    last = chunked.step_chunk(a)
    assert last.path is None
    assert_same(last.observations, steps[-1][0], tolerance=0)
    assert_same(last.infos, steps[-1][4], tolerance=0)
    assert np.array_equal(last.rewards, steps[-1][1])

    chunked.reset(seed=0)
    none = chunked.step_chunk(a, decode="none")
    assert none.observations is None and none.infos == {} and not none.rewards.any()
    assert_same(chunked.observe(), steps[-1][0], tolerance=0)
    b = actions(5, N)
    assert_same(chunked.step(b), envs.step(b), tolerance=0)  # the judge's window was kept


def test_frames_that_nobody_asks_for_are_not_decoded(toy: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    original = toy.tokenizer.decode
    monkeypatch.setattr(toy.tokenizer, "decode", lambda tokens: decoded.append(len(tokens)) or original(tokens))
    envs = HMAVectorEnv(2, checkpoint=toy)
    envs.reset(seed=0)
    assert decoded == []
    envs.step(actions(0, 2))
    assert decoded == [2]
    envs.step_chunk(actions(0, 2, 8))
    assert decoded == [2] * 4  # the judge's window is 3
    envs.step_chunk(actions(0, 2, 8), decode="none")
    assert decoded == [2] * 4
    envs.observe()
    assert decoded == [2] * 5


def test_an_episode_that_ends_inside_a_chunk_waits_for_its_end(world: LearnedWorld) -> None:
    make = lambda mode: HMAVectorEnv(N, checkpoint=world, max_episode_steps=6, autoreset_mode=mode)  # noqa: E731
    a = actions(2, N, 8)
    reference = make("Disabled")
    reference.reset(seed=0)
    before = [reference.step(a[:, h]) for h in range(2)][-1][0]
    reference.reset(options={"reset_mask": np.array([False, True, False])})
    steps = [reference.step(a[:, h]) for h in range(2, 6)]
    ends = np.array([3, 5, 3])  # of this chunk: envs 0 and 2 have 4 steps left
    for mode in ("NextStep", "SameStep", "Disabled"):
        envs = make(mode)
        envs.reset(seed=0)
        first = envs.step_chunk(a[:, :2])
        assert np.array_equal(first.observations, before)
        envs.reset(options={"reset_mask": np.array([False, True, False])})
        chunk = envs.step_chunk(a[:, 2:8], decode="all")
        assert chunk.steps.tolist() == [4, 6, 4] and chunk.truncations.all()
        for h in range(4):
            assert np.array_equal(chunk.path[:, h], steps[h][0])
        for h in (4, 5):
            assert np.array_equal(chunk.path[[0, 2], h], steps[3][0][[0, 2]])
            assert not np.array_equal(chunk.path[1, h], chunk.path[1, h - 1])
        ended = np.stack([chunk.path[0, ends[0]], chunk.path[1, ends[1]], chunk.path[2, ends[2]]])
        if mode == "SameStep":
            assert np.array_equal(np.stack(list(chunk.infos["final_obs"])), ended)
            assert not np.array_equal(chunk.observations, ended)
        else:
            assert np.array_equal(chunk.observations, ended)
        if mode == "NextStep":
            following = envs.step_chunk(a[:, :3])
            assert following.steps.tolist() == [0] * N and not following.rewards.any()
            assert envs.step_chunk(a[:, :3]).steps.tolist() == [3] * N


def test_success_inside_a_chunk_ends_the_episode(toy: Checkpoint) -> None:
    world = LearnedWorld(toy, judge=Dice())
    envs, chunked = (HMAVectorEnv(N, checkpoint=world, terminate_on_success=True) for _ in range(2))
    a = actions(2, N, 6)
    envs.reset(seed=0)
    ends, rewards = np.full(N, 6), np.zeros(N)
    for h in range(6):
        _, reward, terminated, _, _ = envs.step(a[:, h])
        fresh = ends == 6
        ends[fresh & terminated] = h + 1
        rewards += np.where(fresh, reward, 0)
    assert ends.min() < 6
    for decode in ("all", "last", "none"):
        chunked.reset(seed=0)
        chunk = chunked.step_chunk(a, decode=decode)
        assert chunk.steps.tolist() == ends.tolist() and np.array_equal(chunk.rewards, rewards)
        assert np.array_equal(chunk.terminations, ends < 6) or ends.max() == 6


# ---------------------------------------------------------------------- saving, forking


def test_a_saved_state_gives_the_same_future(world: LearnedWorld) -> None:
    settings: dict[str, Any] = {"checkpoint": world, "obs_type": "pixels_agent_pos", "max_episode_steps": 6}
    envs = HMAVectorEnv(N, **settings)
    envs.reset(seed=0)
    run(envs, 4)
    envs.step_chunk(actions(1, N, 1), decode="none")  # frames that are still hidden are part of it
    saved = envs.save_state()
    kept = pickle.dumps(saved)
    expected = run(envs, 12)
    for state in (saved, pickle.loads(kept)):
        envs.load_state(state)
        assert_same(tuple(run(envs, 12)), tuple(expected), tolerance=0)
    other = HMAVectorEnv(N, **settings)
    other.load_state(saved)
    assert_same(tuple(run(other, 12)), tuple(expected), tolerance=0)


def test_a_foreign_state_is_refused(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(2, checkpoint=world)
    envs.reset(seed=0)
    state = envs.save_state()
    other = dataclasses.replace(world.checkpoint, name="other")
    for target in (HMAVectorEnv(3, checkpoint=world), HMAVectorEnv(2, checkpoint=other)):
        with pytest.raises(EnvironmentState, match="save_state"):
            target.load_state(state)
    with pytest.raises(EnvironmentState, match="version"):
        envs.load_state({**state, "version": 99})


def test_planning_in_a_fork_leaves_the_parent_alone(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(2, checkpoint=world, obs_type="pixels_agent_pos", max_episode_steps=6)
    envs.reset(seed=0)
    run(envs, 3)
    saved = envs.save_state()
    expected = run(envs, 8)
    envs.load_state(saved)
    fork = envs.fork(3)
    assert fork.num_envs == 6 and fork.world is envs.world and fork.action_space.shape == (6, ACTION_DIM)
    planned = [fork.step(a) for a in actions(9, 8, 2).repeat(3, axis=1)]
    for mine, theirs in zip(planned, expected, strict=True):
        for i in range(6):
            row = {k: v[i] for k, v in mine[0].items()}
            assert_same(row, {k: v[i // 3] for k, v in theirs[0].items()}, PIXELS, TOLERANCE)
    fork.reset(seed=99)
    fork.close()
    assert_same(tuple(run(envs, 8)), tuple(expected), tolerance=0)


def test_copies_with_a_seed_of_their_own_go_apart(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(1, checkpoint=world)
    envs.reset(seed=0)
    a = np.ones((3, ACTION_DIM), np.float32)
    together, apart, again = envs.fork(3), envs.fork(3, seed=5), envs.fork(3, seed=5)
    assert np.array_equal(together.observe(), apart.observe())
    pixels = together.step(a)[0].astype(int)
    assert np.abs(pixels[0] - pixels[2]).max() <= 1  # rows of a batch round differently
    pixels = apart.step(a)[0]
    assert np.abs(pixels[0].astype(int) - pixels[2]).max() > 8
    assert np.array_equal(pixels, again.step(a)[0])
    with pytest.raises(InvalidArgument, match="k must be"):
        envs.fork(0)


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("obs_type", ["pixels", "pixels_agent_pos"])
def test_torch_output_is_the_same_in_tensors(world: LearnedWorld, obs_type: Any) -> None:
    settings: dict[str, Any] = {"checkpoint": world, "obs_type": obs_type, "max_episode_steps": 3}
    arrays = HMAVectorEnv(N, autoreset_mode="SameStep", **settings)
    tensors = HMAVectorEnv(N, autoreset_mode="SameStep", output="torch", **settings)
    assert_same(_numpy(tensors.reset(seed=0)[0]), arrays.reset(seed=0)[0], tolerance=0)
    for t, a in enumerate(actions(0, 4, N)):
        theirs, ours = arrays.step(a), tensors.step(torch.from_numpy(a))
        for x, y in zip(ours[:4], theirs[:4], strict=True):
            assert_same(_numpy(x, float if y is theirs[1] else None), y, tolerance=0)
        infos = ours[4]
        for key in ("is_success", "success_probability", "_is_success"):
            assert np.array_equal(infos[key].numpy(), theirs[4][key])
        assert ("final_obs" in infos) == ("final_obs" in theirs[4]) == (t == 2)
        if t == 2:
            final = _numpy(infos["final_obs"])
            for i in range(N):
                row = {k: v[i] for k, v in final.items()} if isinstance(final, dict) else final[i]
                assert_same(row, theirs[4]["final_obs"][i], tolerance=0)
    assert ours[1].dtype is torch.float32 and ours[2].dtype is torch.bool
    if obs_type == "pixels_agent_pos":  # fit for training on
        weight = torch.ones(STATE_DIM, requires_grad=True)
        (ours[0]["agent_pos"] * weight).sum().backward()
        assert weight.grad is not None


def _numpy(x: Any, kind: Any = None) -> Any:
    if isinstance(x, dict):
        return {key: _numpy(value) for key, value in x.items()}
    return x.numpy().astype(kind) if kind else x.numpy()


def test_render(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(2, checkpoint=world)
    observations, _ = envs.reset(seed=0)
    frames = envs.render()
    assert isinstance(frames, tuple) and len(frames) == 2
    assert frames[0].shape == (256, 256, 3) and frames[0].dtype == np.uint8
    small = HMAVectorEnv(2, checkpoint=world, render_size=SIZE)
    small.reset(seed=0)
    small.step_chunk(actions(0, 2, 2), decode="none")
    assert np.abs(np.stack(small.render()).astype(int) - small.observe()).max() <= 1
    assert envs.metadata["render_fps"] == 20
    silent = HMAVectorEnv(2, checkpoint=world, render_mode=None)
    silent.reset(seed=0)
    assert silent.render() is None


def test_nothing_global_changes(toy_folder: Path) -> None:
    def settings() -> Any:
        return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(), np.random.random()

    np.random.seed(0)
    before = settings()
    envs = HMAVectorEnv(2, checkpoint=toy_folder, temperature=0.5)
    envs.reset(seed=0)
    run(envs, 2)
    np.random.seed(0)
    assert settings() == before and not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------------- domains


def test_a_checkpoint_with_two_robots() -> None:
    checkpoint = toy_checkpoint(toy_domain("small", 2, 0), toy_domain("large", 14, 9), task="")
    with pytest.raises(InvalidArgument, match=r"domain must name one of \['small', 'large'\]"):
        HMAVectorEnv(2, checkpoint=checkpoint)
    with pytest.raises(UnknownName, match="medium"):
        HMAVectorEnv(2, checkpoint=checkpoint, domain="medium")
    with pytest.raises(InvalidArgument, match="'small' has none"):
        HMAVectorEnv(2, checkpoint=checkpoint, domain="small", obs_type="pixels_agent_pos")
    small = HMAVectorEnv(2, checkpoint=checkpoint, domain="small")
    large = HMAVectorEnv(2, checkpoint=checkpoint, domain="large", obs_type="pixels_agent_pos")
    for envs, dim in ((small, 2), (large, 14)):
        assert envs.single_action_space.shape == (dim,)
        observations, _ = envs.reset(seed=0)
        up, down = (envs.fork(1).step(np.full((2, dim), x, np.float32))[0] for x in (1.0, -1.0))
        assert up in envs.observation_space
        pixels = [x["pixels"] if isinstance(x, dict) else x for x in (up, down)]
        assert not np.array_equal(*pixels)
    own = dataclasses.replace(checkpoint.starts, domains_N=np.array([0, 0, 1, 1, 1, -1]))
    shared = dataclasses.replace(checkpoint, starts=own)
    for domain, starts in (("small", [0, 1, 5]), ("large", [2, 3, 4, 5])):
        envs = HMAVectorEnv(40, checkpoint=shared, domain=domain)
        drawn = {image.tobytes() for image in envs.reset(seed=0)[0]}
        assert drawn == {own.frames_NHWC[i].tobytes() for i in starts}
    image = checkpoint.starts.frames_NHWC[0]
    small.reset(seed=0, options={"image": image})
    with pytest.raises(InvalidArgument, match="has none; leave it out"):
        small.reset(options={"image": image, "agent_pos": np.zeros(9)})
    context = {
        "images": checkpoint.starts.frames_NHWC[:2],
        "actions": np.zeros((1, 2)),
        "reset_mask": np.array([1, 0]) > 0,
    }
    small.reset(options=context)
    assert large.reset(seed=0)[0] in large.observation_space


def test_a_step_of_several_control_steps() -> None:
    domain = dataclasses.replace(toy_domain(), stride=2, action_low=(-2.0,) * 7, action_high=(1.0,) * 7)
    envs = HMAVectorEnv(2, checkpoint=toy_checkpoint(domain))
    assert envs.single_action_space == gymnasium.spaces.Box(np.float32([-2] * 14), np.float32([1] * 14))
    assert envs.metadata["render_fps"] == 10
    envs.reset(seed=0)
    envs.step(envs.action_space.sample())


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.zeros((N, ACTION_DIM + 1), np.float32), r"shape \(3, 7\), got \(3, 8\)"),
        (np.zeros(ACTION_DIM, np.float32), r"shape \(3, 7\), got \(7,\)"),
        (np.zeros((N + 1, ACTION_DIM), np.float32), r"got \(4, 7\)"),
        (np.zeros((N, 2, ACTION_DIM), np.float32), r"got \(3, 2, 7\)"),
        (np.zeros((N, ACTION_DIM), np.int64), "floating dtype, got int64"),
        (torch.zeros(N, ACTION_DIM, dtype=torch.int32), "floating dtype, got torch.int32"),
        (np.full((N, ACTION_DIM), "up"), "floating dtype, got <U2"),
        ([[0.0] * ACTION_DIM, [0.0]], "must be an array"),
        (None, "floating dtype, got object"),
        (np.where(np.arange(N * 7).reshape(N, 7) == 9, np.nan, 0.0), r"finite, got nan at index \(1, 2\)"),
        (torch.full((N, ACTION_DIM), torch.inf), r"finite, got inf at index \(0, 0\)"),
    ],
)
def test_wrong_actions_are_refused_and_change_nothing(world: LearnedWorld, wrong: Any, text: str) -> None:
    envs, other = HMAVectorEnv(N, checkpoint=world), HMAVectorEnv(N, checkpoint=world)
    envs.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(InvalidAction, match=text):
        envs.step(wrong)
    assert_same(tuple(run(envs, 2)), tuple(run(other, 2)), tolerance=0)


def test_actions_are_clipped_to_the_bounds_whatever_their_precision(world: LearnedWorld) -> None:
    results = []
    for a in (
        np.ones((2, 7), np.float32),
        np.full((2, 7), 1e300),
        torch.full((2, 7), 5.0),
        np.full((2, 7), 3, np.float16),
    ):
        envs = HMAVectorEnv(2, checkpoint=world)
        envs.reset(seed=0)
        results.append(envs.step(a)[0])
    assert all(np.array_equal(result, results[0]) for result in results)


def test_chunks_are_checked(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(2, checkpoint=world)
    envs.reset(seed=0)
    with pytest.raises(InvalidAction, match=r"shape \(2, H, 7\), got \(2, 7\)"):
        envs.step_chunk(np.zeros((2, 7)))
    with pytest.raises(InvalidAction, match=r"got \(2, 0, 7\)"):
        envs.step_chunk(np.zeros((2, 0, 7)))
    with pytest.raises(InvalidArgument, match="decode must be"):
        envs.step_chunk(np.zeros((2, 1, 7)), decode="first")  # type: ignore[arg-type]


def test_the_order_of_calls_is_checked(world: LearnedWorld) -> None:
    envs = HMAVectorEnv(2, checkpoint=world)
    calls = (
        lambda: envs.step(np.zeros((2, 7))), lambda: envs.step_chunk(np.zeros((2, 1, 7))), envs.render, envs.observe,
        envs.save_state, lambda: envs.fork(2),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(EnvironmentState, match="reset"):
            call()
    with pytest.raises(EnvironmentState, match="first reset must be of all"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    envs.reset(seed=0)
    state = envs.save_state()
    envs.close()
    envs.close()
    for call in (*calls, envs.reset, lambda: envs.load_state(state)):
        with pytest.raises(EnvironmentState, match="closed"):
            call()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_envs": 0}, "num_envs"),
        ({"obs_type": "state"}, "obs_type must be one of"),
        ({"image_size": 84}, r"image_size must be that of checkpoint 'toy', \(40, 40\), got 84"),
        ({"render_mode": "human"}, "render_mode"),
        ({"render_size": 0}, "render_size"),
        ({"output": "jax"}, "output must be one of"),
        ({"autoreset_mode": "Sometimes"}, "autoreset_mode"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"decode_steps": 0}, "decode_steps"),
        ({"task": "stack"}, "made for task 'lift', not for 'stack'"),
        ({"device": "meta"}, "given weights are on 'cpu'"),
    ],
)
def test_wrong_arguments_are_refused(toy: Checkpoint, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        HMAVectorEnv(**{"num_envs": 2, "checkpoint": toy, **arguments})


def test_what_to_simulate_must_be_said(world: LearnedWorld) -> None:
    with pytest.raises(InvalidArgument, match="checkpoint must be given"):
        HMAVectorEnv(2)
    with pytest.raises(InvalidArgument, match="'stack' has no checkpoint"):
        HMAVectorEnv(2, task="stack")
    with pytest.raises(UnknownName, match="choose one of: lift, stack"):
        HMAVectorEnv(2, task="dance")
    with pytest.raises(InvalidArgument, match="judge cannot be given with a LearnedWorld"):
        HMAVectorEnv(2, checkpoint=world, judge=Brightness())
    with pytest.raises(InvalidArgument, match="seed"):
        HMAVectorEnv(2, checkpoint=world).reset(seed=[1])


def test_a_start_bank_of_other_images_is_refused(toy: Checkpoint, tmp_path: Path) -> None:
    starts = dataclasses.replace(toy.starts, frames_NHWC=np.zeros((STARTS, 48, 48, 3), np.uint8))
    folder = save_checkpoint(dataclasses.replace(toy, starts=starts), tmp_path / "odd")
    with pytest.raises(hma_gym.errors.CheckpointError, match="starts must be images"):
        HMAVectorEnv(1, checkpoint=load_checkpoint(folder))


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_world(toy_folder: Path) -> None:
    settings: dict[str, Any] = {"checkpoint": toy_folder, "obs_type": "pixels_agent_pos", "max_episode_steps": 4}
    host = HMAVectorEnv(N, **settings)
    device = HMAVectorEnv(N, device="cuda", output="torch", **settings)
    host.reset(seed=0)
    observations, _ = device.reset(seed=0)
    for a in actions(0, 10, N):
        with tensor_float32(False):
            theirs, ours = host.step(a), device.step(torch.from_numpy(a).cuda())
        assert all(x.is_cuda for x in (*ours[0].values(), *ours[1:4], *ours[4].values()))
        mine = {key: value.cpu().numpy() for key, value in ours[0].items()}
        assert_same(mine, theirs[0], pixels=3, tolerance=1e-2)
        assert np.array_equal(ours[3].cpu().numpy(), theirs[3])
    state = device.save_state()
    expected = device.step_chunk(torch.zeros(N, 2, ACTION_DIM, device="cuda")).observations["pixels"]
    device.load_state(state)
    again = device.fork(1).step_chunk(torch.zeros(N, 2, ACTION_DIM, device="cuda")).observations["pixels"]
    assert torch.equal(again, expected)
