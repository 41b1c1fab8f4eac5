"""Ground truth: Gymnasium's contract, determinism, exact restore, images, and errors a stranger can act on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import hma_gym  # noqa: F401
from hma_gym.envs import rendering
from hma_gym.envs.ground_truth import GroundTruthEnv
from hma_gym.envs.tasks import TASKS, get_task
from hma_gym.errors import (
    EnvironmentState,
    InvalidAction,
    InvalidArgument,
    MissingExtra,
    RenderingUnavailable,
    UnknownName,
)

pytestmark = pytest.mark.gl


@pytest.fixture(scope="module")
def env() -> Iterator[GroundTruthEnv]:
    env = GroundTruthEnv(obs_type="pixels_agent_pos", privileged_info=True)
    yield env
    env.close()


@pytest.fixture(scope="module")
def other() -> Iterator[GroundTruthEnv]:
    env = GroundTruthEnv(obs_type="pixels_agent_pos", privileged_info=True)
    yield env
    env.close()


def reach_and_wave(steps: int, seed: int = 0) -> np.ndarray:
    """Actions that bring the hand down into view, then shake it."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)
    actions[:, 2] = np.where(np.arange(steps) < 12, -1.0, actions[:, 2])
    return actions


def roll(env: GroundTruthEnv, actions: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    rows = []
    for action in actions:
        observation, reward, _, _, info = env.step(action)
        privileged = np.concatenate(list(info["privileged"].values()))
        state = env.simulation.flattened_state()
        rows.append((observation["pixels"], observation["agent_pos"], state, privileged, np.array(reward)))
    return rows


def assert_same(a: list[tuple[np.ndarray, ...]], b: list[tuple[np.ndarray, ...]]) -> None:
    assert len(a) == len(b)
    for row_a, row_b in zip(a, b, strict=True):
        for x, y in zip(row_a, row_b, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("obs_type", ["pixels", "pixels_agent_pos"])
def test_gymnasium_check_env(obs_type: str) -> None:
    env = gymnasium.make("GroundTruth-Lift-v0", obs_type=obs_type)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("obs_type", ["pixels", "pixels_agent_pos"])
def test_stable_baselines3_check_env(obs_type: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = gymnasium.make("GroundTruth-Lift-v0", obs_type=obs_type)
    checker.check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("key", TASKS)
def test_every_task_of_the_table_steps_to_its_horizon_flag(key: str) -> None:
    task = get_task(key)
    env = gymnasium.make(f"GroundTruth-{task.id_stem}-v0", obs_type="pixels_agent_pos", max_episode_steps=2)
    assert env.spec is not None and gymnasium.spec(env.spec.id).max_episode_steps == task.horizon
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert not env.step(env.action_space.sample())[3]
    observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation) and truncated and not terminated
    assert env.metadata["render_fps"] == task.control_hz
    env.close()


def test_a_seed_gives_the_same_episode_whatever_came_before(env: GroundTruthEnv, other: GroundTruthEnv) -> None:
    actions = reach_and_wave(16)
    first, _ = env.reset(seed=5)
    rows = roll(env, actions)
    other.reset(seed=9)
    roll(other, actions[:7])
    again, _ = other.reset(seed=5)
    np.testing.assert_array_equal(first["pixels"], again["pixels"])
    assert_same(rows, roll(other, actions))
    assert not np.array_equal(env.reset(seed=6)[0]["pixels"], first["pixels"])


def test_unseeded_resets_differ_and_follow_from_the_last_seed(env: GroundTruthEnv) -> None:
    env.reset(seed=1)
    starts = [env.reset()[1]["privileged"]["cube_pos"] for _ in range(3)]
    assert len({tuple(start) for start in starts}) == 3
    env.reset(seed=1)
    np.testing.assert_array_equal(env.reset()[1]["privileged"]["cube_pos"], starts[0])


def test_restoring_a_state_repeats_the_future_bit_for_bit(env: GroundTruthEnv, other: GroundTruthEnv) -> None:
    rng = np.random.default_rng(3)
    for episode in range(2):
        actions = reach_and_wave(24, seed=episode)
        env.reset(seed=episode)
        points = sorted(rng.choice(np.arange(1, 20), 2, replace=False))
        saved, rows = {}, []
        for t, action in enumerate(actions):
            if t in points:
                saved[t] = (env.get_state(), env.simulation.render(64))
            rows += roll(env, action[None])
        for t, (state, pixels) in saved.items():
            for target in (env, other):
                target.reset(seed=77)
                roll(target, actions[:3])
                target.set_state(state)
                np.testing.assert_array_equal(target.simulation.render(64), pixels)
                assert_same(roll(target, actions[t : t + 5]), rows[t : t + 5])
    np.testing.assert_array_equal(env.reset()[1]["privileged"]["cube_pos"], env.privileged()["cube_pos"])


def test_an_episode_replays_from_its_recorded_first_state(env: GroundTruthEnv, other: GroundTruthEnv) -> None:
    actions = reach_and_wave(14)
    first, _ = env.reset(seed=11)
    state = env.simulation.flattened_state()
    rows = roll(env, actions)
    other.reset(seed=2)
    again, _ = other.reset(options={"state": state})
    np.testing.assert_array_equal(first["pixels"], again["pixels"])
    assert_same(rows, roll(other, actions))


def test_reset_to_a_saved_state_is_set_state(env: GroundTruthEnv, other: GroundTruthEnv) -> None:
    env.reset(seed=4)
    roll(env, reach_and_wave(5))
    state = env.get_state()
    observation, _ = other.reset(options={"state": state})
    np.testing.assert_array_equal(observation["pixels"], env.simulation.render(64))


def cube_in_image(pixels: np.ndarray) -> tuple[float, float]:
    """Row and column of the centre of the red pixels."""
    rgb = pixels.astype(int)
    rows, columns = np.nonzero((rgb[..., 0] > 90) & (rgb[..., 1] < 80) & (rgb[..., 2] < 80))
    assert len(rows) >= 4
    return rows.mean(), columns.mean()


@pytest.mark.parametrize("size", [64, 84, 128, 256])
def test_images_are_upright_with_the_cube_where_the_camera_sees_it(env: GroundTruthEnv, size: int) -> None:
    env.reset(seed=8)
    simulation = env.simulation
    pixels = simulation.render(size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    camera = simulation.model.camera("agentview").id
    axes = simulation.data.cam_xmat[camera].reshape(3, 3)
    x, y, z = (env.privileged()["cube_pos"] - simulation.data.cam_xpos[camera]) @ axes
    scale = size / 2 / np.tan(np.deg2rad(simulation.model.cam_fovy[camera]) / 2) / -z
    row, column = cube_in_image(pixels)
    assert abs(row - (size / 2 - y * scale)) < 0.03 * size
    assert abs(column - (size / 2 + x * scale)) < 0.03 * size


def test_images_are_the_callers_own(env: GroundTruthEnv) -> None:
    observation, _ = env.reset(seed=8)
    kept = observation["pixels"].copy()
    env.step(np.ones(7, dtype=np.float32))
    np.testing.assert_array_equal(observation["pixels"], kept)
    observation["pixels"][:] = 0
    assert env.simulation.render(64).any()


def test_culling_hides_nothing_and_leaves_the_model_as_it_was(env: GroundTruthEnv) -> None:
    env.reset(seed=8)
    roll(env, reach_and_wave(12))
    renderer = env.simulation._renderers[64]
    groups = env.simulation.model.geom_group.copy()
    culled = renderer.render(env.simulation.data)
    hidden = renderer._out_of_view(env.simulation.data)
    assert 0.2 < hidden.mean() < 0.95
    renderer._out_of_view = lambda data: np.zeros(len(groups), dtype=bool)  # type: ignore[method-assign]
    whole = renderer.render(env.simulation.data)
    del renderer._out_of_view
    np.testing.assert_array_equal(culled, whole)
    np.testing.assert_array_equal(groups, env.simulation.model.geom_group)


def test_render_has_its_own_size_and_may_be_off() -> None:
    env = GroundTruthEnv(render_size=100)
    env.reset(seed=0)
    frame = env.render()
    assert frame is not None and frame.shape == (100, 100, 3)
    env.render_mode = None
    assert env.render() is None
    env.close()


def test_success_is_robosuites_predicate_on_the_current_state(env: GroundTruthEnv) -> None:
    env.reset(seed=0)
    assert env.step(np.zeros(7))[4]["is_success"] is False
    state = env.simulation.flattened_state()
    cube = env.simulation.model.joint("cube_joint0").qposadr[0]
    for height, success in ((0.8401 + 0.002, True), (0.8399 - 0.002, False)):
        state[1 + cube + 2] = height
        _, info = env.reset(options={"state": state})
        assert info["is_success"] is success
    state[1 + cube + 2] = 1.0
    env.reset(options={"state": state})
    _, reward, terminated, _, info = env.step(np.zeros(7))
    assert (reward, terminated) == (1.0, False)
    assert {"is_success": True, "success_probability": 1.0}.items() <= info.items()
    env.terminate_on_success = True
    try:
        assert env.step(np.zeros(7))[2] is True
    finally:
        env.terminate_on_success = False


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("context", ["spawn", "fork"])
def test_async_vector_env_equals_single_envs(env: GroundTruthEnv, context: str) -> None:
    env.reset(seed=0)
    if rendering._unforkable_in is not None and context == "fork":
        pytest.skip("this machine's OpenGL does not survive a fork")
    vector = gymnasium.make_vec(
        "GroundTruth-Lift-v0",
        num_envs=2,
        vectorization_mode="async",
        vector_kwargs={"context": context},
        obs_type="pixels_agent_pos",
    )
    try:
        observations, _ = vector.reset(seed=[5, 6])
        actions = reach_and_wave(3)
        for action in actions:
            observations, _, _, _, infos = vector.step(np.stack([action, action]))
        assert infos["is_success"].tolist() == [False, False]
    finally:
        vector.close()
    for n, seed in enumerate((5, 6)):
        env.reset(seed=seed)
        pixels, agent_pos = roll(env, actions)[-1][:2]
        np.testing.assert_array_equal(observations["pixels"][n], pixels)
        np.testing.assert_array_equal(observations["agent_pos"][n], agent_pos)


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (np.zeros(6), r"shape \(7,\).*got shape \(6,\)"),
        (np.zeros((2, 7)), r"got shape \(2, 7\).*make_vec"),
        (np.array([0, 0, np.nan, 0, 0, 0, 0]), r"finite, got .*nan"),
        (np.array([0, 0, np.inf, 0, 0, 0, 0]), r"finite, got .*inf"),
        (np.zeros(7, dtype=int), r"floating dtype, got int64; convert it with astype\(np.float32\)"),
        ("up", r"floating dtype, got <U2"),
        ([[0.0], [0.0, 1.0]], r"shape \(7,\), got list"),
    ],
)
def test_a_bad_action_is_named_and_changes_nothing(env: GroundTruthEnv, action: object, says: str) -> None:
    env.reset(seed=0)
    before = env.simulation.flattened_state()
    with pytest.raises(InvalidAction, match=says):
        env.step(action)  # type: ignore[arg-type]
    np.testing.assert_array_equal(before, env.simulation.flattened_state())


def test_actions_outside_the_box_are_clipped(env: GroundTruthEnv, other: GroundTruthEnv) -> None:
    env.reset(seed=0)
    other.reset(seed=0)
    assert_same(roll(env, np.full((2, 7), 9.0)), roll(other, np.full((2, 7), 1.0)))


def test_wrong_arguments_say_what_is_right(env: GroundTruthEnv) -> None:
    with pytest.raises(UnknownName, match="unknown task 'juggle'; choose one of: lift, stack"):
        GroundTruthEnv(task="juggle")
    with pytest.raises(InvalidArgument, match="obs_type must be one of"):
        GroundTruthEnv(obs_type="depth")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="image_size must be a whole number from 8 to 1024, got 4"):
        GroundTruthEnv(image_size=4)
    with pytest.raises(InvalidArgument, match="render_mode must be None or one of"):
        GroundTruthEnv(render_mode="human")
    with pytest.raises(InvalidArgument, match=r"options must be one of \['start', 'state'\].*got \['begin'\]"):
        env.reset(options={"begin": 3})
    with pytest.raises(EnvironmentState, match="got str"):
        env.reset(options={"state": "yesterday"})
    with pytest.raises(EnvironmentState, match="32 finite numbers"):
        env.reset(options={"state": np.zeros(5)})
    state = env.reset(seed=0) and env.get_state()
    with pytest.raises(EnvironmentState, match="get_state.*of task 'lift'.*got version 1, task 'stack'"):
        env.set_state({**state, "task": "stack"})


def test_use_before_reset_and_after_close_is_an_error() -> None:
    env = GroundTruthEnv()
    for call in (lambda: env.step(np.zeros(7)), env.render, env.get_state, env.privileged):
        with pytest.raises(EnvironmentState, match=r"call reset\(\) before"):
            call()
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(np.zeros(7)), env.render):
        with pytest.raises(EnvironmentState, match="closed"):
            call()


@pytest.mark.parametrize("module", ["mujoco", "robosuite"])
def test_a_missing_extra_is_named_with_the_pip_line(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"'{module}' is needed for .*pip install \"hma_gym\[sim\]\""):
        GroundTruthEnv()


def test_a_fork_that_would_hang_is_an_error(env: GroundTruthEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(seed=0)
    monkeypatch.setattr(rendering, "_unforkable_in", os.getpid() + 1)
    with pytest.raises(RenderingUnavailable, match=r"forked.*vector_kwargs=\{'context': 'spawn'\}"):
        env.simulation.render(40)
    env.simulation.render(64)  # what was there before the fork is not in question


def test_an_unknown_gl_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    env = GroundTruthEnv()
    monkeypatch.setenv("MUJOCO_GL", "wgl")
    with pytest.raises(RenderingUnavailable, match=r"one of \['egl', 'glfw', 'osmesa'\], got 'wgl'"):
        env.reset(seed=0)
    env.close()


@pytest.mark.parametrize(
    "variables", [{"__EGL_VENDOR_LIBRARY_FILENAMES": "/nonexistent.json"}, {"MUJOCO_GL": "wgl"}], ids=["no-egl", "wgl"]
)
def test_without_opengl_the_error_brings_the_remedy(variables: dict[str, str]) -> None:
    code = (
        "from hma_gym.envs.ground_truth import GroundTruthEnv\n"
        "from hma_gym.errors import RenderingUnavailable\n"
        "try:\n"
        "    GroundTruthEnv().reset(seed=0)\n"
        "except RenderingUnavailable as error:\n"
        "    print('SAYS', error)\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "egl", **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "SAYS" in done.stdout, done.stderr
    assert f"with MUJOCO_GL='{environment['MUJOCO_GL']}'" in done.stdout
    assert "apt-get install libegl1 libgl1-mesa-dri" in done.stdout and "MUJOCO_EGL_DEVICE_ID" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_camera_projection_says_where_in_the_picture_things_are(env: GroundTruthEnv) -> None:
    matrix_34 = np.array(env.simulation.camera_projection()).reshape(3, 4)
    pixels = []
    for seed in range(6):
        observation, info = env.reset(seed=seed)
        image = observation["pixels"].astype(int)
        red = image[..., 0] - image[..., 1:].max(axis=-1) > 40
        u, v, depth = matrix_34 @ np.append(info["privileged"]["object_pos"], 1.0)
        size = len(image)
        seen = np.argwhere(red).mean(axis=0) + 0.5  # rows and columns, from the edge
        pixels.append(np.abs(seen - (np.array([v, u]) / depth + 1.0) * size / 2).max())
        assert depth > 0
    assert max(pixels) < 1.5 * size / 64
