"""An object's pose as models take it, from robosuite's observation of it.

Shape legend: T rows of an episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: robomimic's observation of the object.
OBJECT_KEY = "object"

#: Columns of it: position (m), quaternion (xyzw).
POSITION, QUATERNION = slice(0, 3), slice(3, 7)


def rotation_matrices(quaternions: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(..., 4) unit quaternions xyzw -> (..., 3, 3)."""
    x, y, z, w = np.moveaxis(np.asarray(quaternions, dtype=np.float64), -1, 0)
    rows = (
        np.stack((1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)), axis=-1),
        np.stack((2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)), axis=-1),
        np.stack((2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)), axis=-1),
    )
    return np.stack(rows, axis=-2)


def object_poses(observations: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """robosuite's ``object`` observation (T, 7 or more) -> (T, 9): position, first two columns of the rotation."""
    matrices = rotation_matrices(observations[:, QUATERNION])
    parts = (observations[:, POSITION], matrices[..., 0], matrices[..., 1])
    return np.concatenate(parts, axis=-1).astype(np.float32)


def turned_alike(poses_T9: NDArray[np.float32], turns: int) -> NDArray[np.float32]:
    """The poses of one episode, all turned about the object's own upright axis by one of ``turns`` equal parts of a
    full turn, such that the first one's yaw is as near to 0 as it can be.

    An object that looks alike in so many positions is then described alike wherever it looks so at a start.
    """
    first, second = poses_T9[:, 3:6].astype(np.float64), poses_T9[:, 6:].astype(np.float64)
    part = 2 * np.pi / turns
    angle = -np.round(np.arctan2(first[0, 1], first[0, 0]) / part) * part
    cosine, sine = np.cos(angle), np.sin(angle)
    columns = (poses_T9[:, POSITION], cosine * first + sine * second, cosine * second - sine * first)
    return np.concatenate(columns, axis=-1).astype(np.float32)
