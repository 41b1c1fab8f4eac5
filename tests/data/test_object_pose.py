"""An object's pose: taken off observations, and described alike where the object looks alike."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from hma_gym.data.cache import targets_of
from hma_gym.data.episodes import EEF_POS, Episode
from hma_gym.data.object_pose import object_poses, turned_alike

ROWS = 15


def _observed(seed: int, yaw: float = 0.0) -> NDArray[np.float64]:
    """A thing that tumbles and slides, of this yaw at first: position, quaternion and three more numbers."""
    rng = np.random.default_rng(seed)
    tumble = Rotation.from_rotvec(np.cumsum(0.2 * rng.normal(size=(ROWS, 3)), axis=0) * (np.arange(ROWS)[:, None] > 0))
    turned = tumble * Rotation.from_euler("z", yaw)
    place = np.cumsum(0.01 * rng.normal(size=(ROWS, 3)), axis=0)
    return np.concatenate((place, turned.as_quat(), rng.normal(size=(ROWS, 3))), axis=1)


def _matrices(poses_T9: NDArray[np.float32]) -> NDArray[np.float32]:
    first, second = poses_T9[:, 3:6], poses_T9[:, 6:]
    return np.stack((first, second, np.cross(first, second)), axis=-1)


def _episode(observed: NDArray[np.float64] | None, hand: NDArray[np.float64] | None, agent_pos_TP: NDArray[np.float64]):  # type: ignore[no-untyped-def]
    obs = {key: value for key, value in (("object", observed), (EEF_POS, hand)) if value is not None}
    return Episode(
        images_THWC=np.zeros((ROWS, 8, 8, 3), np.uint8),
        agent_pos_TP=agent_pos_TP.astype(np.float32),
        actions_TA=np.zeros((ROWS, 2), np.float32),
        states_TS=np.zeros((ROWS, 0)),
        rewards_T=np.zeros(ROWS, np.float32),
        dones_T=np.zeros(ROWS, bool),
        obs=obs,
    )


def test_poses_are_position_and_two_columns_of_the_rotation() -> None:
    observed = _observed(0, yaw=1.0)
    poses = object_poses(observed)
    assert poses.shape == (ROWS, 9) and poses.dtype == np.float32
    np.testing.assert_allclose(poses[:, :3], observed[:, :3], atol=1e-6)
    np.testing.assert_allclose(_matrices(poses), Rotation.from_quat(observed[:, 3:7]).as_matrix(), atol=1e-6)
    flipped = observed.copy()
    flipped[::2, 3:7] *= -1.0  # the other name of the same rotation
    np.testing.assert_array_equal(object_poses(flipped), poses)


@pytest.mark.parametrize("yaw", np.deg2rad([0.0, 44.0, 46.0, 100.0, 134.0, 170.0, -50.0, -91.0, -179.0]))
@pytest.mark.parametrize("turns", [4, 2])
def test_a_turned_thing_looks_as_before_and_begins_nearly_straight(yaw: float, turns: int) -> None:
    before = object_poses(_observed(1, yaw))
    after = turned_alike(before, turns)
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    turn = Rotation.from_matrix(np.swapaxes(_matrices(before), 1, 2) @ _matrices(after)).as_rotvec()  # in its own frame
    np.testing.assert_allclose(turn[:, :2], 0.0, atol=1e-5)
    parts = turn[:, 2] / (2 * np.pi / turns)
    np.testing.assert_allclose(parts, np.round(parts), atol=1e-5)
    np.testing.assert_allclose(np.cos(turn[:, 2]), np.cos(turn[0, 2]), atol=1e-5)  # one turn for the whole episode
    np.testing.assert_allclose(np.sin(turn[:, 2]), np.sin(turn[0, 2]), atol=1e-5)
    assert abs(np.arctan2(after[0, 4], after[0, 3])) <= np.pi / turns + 1e-6
    assert (abs(yaw) > np.pi / turns) == (not np.allclose(before, after, atol=1e-3))
    np.testing.assert_allclose(turned_alike(after, turns), after, atol=1e-6)


def test_things_that_look_alike_are_described_alike() -> None:
    described = [turned_alike(object_poses(_observed(2, 0.3 + quarter * np.pi / 2)), 4) for quarter in range(4)]
    for other in described[1:]:
        np.testing.assert_allclose(other, described[0], atol=1e-5)


def test_a_thing_that_looks_alike_only_after_a_full_turn_is_left_alone() -> None:
    for yaw in np.deg2rad([0.0, 91.0, 180.0, -135.0]):
        before = object_poses(_observed(3, yaw))
        np.testing.assert_array_equal(turned_alike(before, 1), before)


def test_targets_are_a_pose_a_position_or_nothing() -> None:
    observed, rng = _observed(4), np.random.default_rng(0)
    hand = rng.normal(size=(ROWS, 3))
    agent_pos = np.concatenate((hand, rng.normal(size=(ROWS, 6))), axis=1)
    position = observed[:, :3].astype(np.float32)
    for columns in (7, 10):
        np.testing.assert_array_equal(
            targets_of(_episode(observed[:, :columns], hand, agent_pos)), object_poses(observed)
        )
    for other in (
        _episode(observed[:, :3], hand, agent_pos),  # no rotation
        _episode(observed, None, agent_pos),  # no hand
        _episode(observed, hand + 0.01, agent_pos),  # agent_pos is something else
        _episode(observed, hand, agent_pos[:, :3]),  # the hand's rotation is not in it
    ):
        np.testing.assert_array_equal(targets_of(other), position)
    assert targets_of(_episode(None, hand, agent_pos)).shape == (ROWS, 0)
