"""Scripted policies: determinism, the dial of competence, the named failures, and the protocol."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hma_gym.envs.simulation import Simulation, check_action
from hma_gym.envs.tasks import get_task
from hma_gym.errors import InvalidArgument, UnknownName
from hma_gym.policies.protocol import Policy
from hma_gym.policies.scripted import CATEGORY_OF_FAILURE, MODES, LiftScript, ScriptedConfig, ScriptedLift, Situation


def standing_still(steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Privileged states of a hand that never moves, above a cube on the table."""
    for _ in range(steps):
        yield {
            "cube_pos": np.array([0.01, -0.02, 0.82]),
            "cube_quat": np.array([0.0, 0.0, np.sin(0.4), np.cos(0.4)]),
            "eef_pos": np.array([-0.1, 0.0, 1.0]),
            "eef_quat": np.array([1.0, 0.0, 0.0, 0.0]),
            "finger_axis": np.array([0.0, 1.0, 0.0]),
        }


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_acts_within_bounds_and_by_its_seed_alone(mode: str) -> None:
    def actions(seed: int) -> np.ndarray:
        script = LiftScript(ScriptedConfig(mode, competence=0.5), np.random.default_rng(seed))
        return np.stack([script.act(privileged) for privileged in standing_still(150)])

    first = actions(0)
    assert first.dtype == np.float32 and first.shape == (150, 7)
    assert np.isfinite(first).all() and np.abs(first).max() <= 1
    np.testing.assert_array_equal(first, actions(0))
    assert not np.array_equal(first, actions(1))
    assert mode in CATEGORY_OF_FAILURE


def test_noise_and_bias_are_added_as_asked() -> None:
    def actions(**settings: object) -> np.ndarray:
        script = LiftScript(ScriptedConfig("expert", **settings), np.random.default_rng(2))  # type: ignore[arg-type]
        return np.stack([script.act(privileged) for privileged in standing_still(12)])

    calm, noisy = actions(noise=0.0), actions(noise=0.4)
    assert np.diff(noisy[:, 4]).std() > 2 * np.diff(calm[:, 4]).std()
    biased = actions(noise=0.0, bias=(0.0, 0.0, 0.25))
    np.testing.assert_allclose(biased[:, 2], np.clip(calm[:, 2] + 0.25, -1, 1), atol=1e-6)


def test_the_situation_knows_yaw_and_tilt() -> None:
    privileged = next(standing_still(1))
    situation = Situation.from_privileged(privileged)
    assert situation.finger_yaw == pytest.approx(np.pi / 2)
    assert situation.cube_yaw == pytest.approx(0.8)
    np.testing.assert_allclose(situation.tilt, 0, atol=1e-12)
    tilted = privileged | {"eef_quat": np.array([np.cos(0.1), 0.0, 0.0, np.sin(0.1)])}  # .2 rad about x from downward
    turned = Situation.from_privileged(tilted).tilt
    assert abs(turned[0]) == pytest.approx(np.sin(0.2)) and turned[1] == pytest.approx(0)


def run(simulation: Simulation, config: ScriptedConfig, seed: int, steps: int = 60) -> np.ndarray:
    """Success at each step of one episode."""
    simulation.reset(seed)
    script = LiftScript(config, np.random.default_rng(seed))
    success = []
    for _ in range(steps):
        simulation.step(check_action(script.act(simulation.privileged()), 7))
        success.append(simulation.is_success())
    return np.array(success)


@pytest.fixture(scope="module")
def simulation() -> Iterator[Simulation]:
    simulation = Simulation(get_task("lift"))
    yield simulation
    simulation.close()


@pytest.mark.gl
def test_competence_decides_success(simulation: Simulation) -> None:
    good = [run(simulation, ScriptedConfig(competence=1.0), seed)[-1] for seed in range(3)]
    bad = [run(simulation, ScriptedConfig(competence=0.0), seed)[-1] for seed in range(3)]
    assert sum(good) == 3 and sum(bad) == 0


@pytest.mark.gl
def test_a_drop_lifts_and_then_does_not_hold(simulation: Simulation) -> None:
    episodes = [run(simulation, ScriptedConfig("drop"), seed) for seed in range(4)]
    let_go = [e for e in episodes if np.any(np.diff(e.astype(int)) < 0)]
    assert let_go


@pytest.mark.gl
def test_a_push_moves_the_cube_along_the_table(simulation: Simulation) -> None:
    moved = []
    for seed in range(3):
        simulation.reset(seed)
        start = simulation.privileged()["cube_pos"]
        assert not run(simulation, ScriptedConfig("push", noise=0.0), seed, steps=50).any()
        moved.append(np.linalg.norm((simulation.privileged()["cube_pos"] - start)[:2]))
    assert max(moved) > 0.02


def test_the_batched_policy_keeps_the_protocol() -> None:
    policy = ScriptedLift(ScriptedConfig("wander"), num_envs=2, seed=3)
    assert isinstance(policy, Policy)
    rows = list(standing_still(6))
    batches = [{"privileged": {key: np.stack([row[key]] * 2) for key in row}} for row in rows]
    policy.reset(np.array([True, True]))
    before = np.stack([policy.act(batch) for batch in batches[:3]])
    assert before.shape == (3, 2, 1, 7) and before.dtype == np.float32
    assert not np.array_equal(before[:, 0], before[:, 1])
    twin = ScriptedLift(ScriptedConfig("wander"), num_envs=2, seed=3)
    twin.reset(np.array([True, True]))
    np.testing.assert_array_equal(before, np.stack([twin.act(batch) for batch in batches[:3]]))
    twin.reset(np.array([False, True]))
    np.testing.assert_array_equal(policy.act(batches[3])[0], twin.act(batches[3])[0])
    assert not np.array_equal(policy.act(batches[4])[1], twin.act(batches[4])[1])


def test_wrong_settings_say_what_is_right() -> None:
    with pytest.raises(
        UnknownName, match="unknown mode of the scripted policy 'juggle'; choose one of: clumsy, drop, expert"
    ):
        ScriptedConfig("juggle")
    with pytest.raises(InvalidArgument, match=r"competence must lie in \[0, 1\], got 1.5"):
        ScriptedConfig(competence=1.5)
    with pytest.raises(InvalidArgument, match="noise must lie in"):
        ScriptedConfig(noise=-0.1)
    with pytest.raises(InvalidArgument, match="bias must be three finite numbers"):
        ScriptedConfig(bias=(0.0, float("nan"), 0.0))
    with pytest.raises(InvalidArgument, match=r"needs observation\['privileged'\].*got keys \['pixels'\]"):
        ScriptedLift(ScriptedConfig()).act({"pixels": np.zeros((1, 64, 64, 3))})
