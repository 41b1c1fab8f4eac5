"""Rotations: against scipy, both ways, and for numbers that are no rotation yet."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from hma_gym.data.object_pose import rotation_matrices
from hma_gym.nn.rotations import columns_of_matrix, matrix_of_columns, matrix_of_quaternion

TURNS = Rotation.random(50, random_state=0)
EXACT = {"rtol": 0.0, "atol": 1e-6}


def _quaternions() -> torch.Tensor:
    return torch.from_numpy(TURNS.as_quat().astype(np.float32))  # scipy's are xyzw, too


def test_quaternions_are_scipys_whatever_their_length_and_sign() -> None:
    wanted = torch.from_numpy(TURNS.as_matrix().astype(np.float32))
    for factor in (1.0, -1.0, 3.0, 0.01):
        torch.testing.assert_close(matrix_of_quaternion(factor * _quaternions()), wanted, **EXACT)
    shaped = matrix_of_quaternion(_quaternions().view(5, 10, 4))
    torch.testing.assert_close(shaped, wanted.view(5, 10, 3, 3), **EXACT)
    assert matrix_of_quaternion(torch.zeros(4)).isfinite().all()  # padding


def test_the_data_and_the_network_mean_the_same_rotation() -> None:
    matrices = rotation_matrices(TURNS.as_quat().reshape(5, 10, 4))
    np.testing.assert_allclose(matrices, TURNS.as_matrix().reshape(5, 10, 3, 3), atol=1e-12)
    ours = matrix_of_quaternion(torch.from_numpy(TURNS.as_quat().reshape(5, 10, 4)))
    np.testing.assert_allclose(matrices, ours.numpy(), atol=1e-12)


def test_columns_round_trip() -> None:
    matrix = torch.from_numpy(TURNS.as_matrix())
    columns = columns_of_matrix(matrix)
    torch.testing.assert_close(columns, torch.cat((matrix[:, :, 0], matrix[:, :, 1]), dim=-1))
    torch.testing.assert_close(matrix_of_columns(columns), matrix)


def test_columns_that_are_not_orthonormal_give_the_nearest_frame_of_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = 2.0 * torch.randn(50, 6, generator=generator, dtype=torch.float64)
    matrix = matrix_of_columns(columns)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3, dtype=torch.float64).expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(50, dtype=torch.float64))
    first, second = columns[:, :3], columns[:, 3:]
    torch.testing.assert_close(matrix[:, :, 0], first / first.norm(dim=-1, keepdim=True))
    assert ((matrix[:, :, 1] * second).sum(dim=-1) > 0).all()  # not mirrored
    third = torch.linalg.cross(first, second)  # the plane of both columns stays
    torch.testing.assert_close(matrix[:, :, 2], third / third.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(matrix_of_columns(columns * torch.tensor([5.0] * 3 + [0.1] * 3)), matrix)


def test_no_rotation_at_all_has_finite_gradients() -> None:
    columns, quaternion = torch.zeros(6, requires_grad=True), torch.zeros(4, requires_grad=True)
    (matrix_of_columns(columns).sum() + matrix_of_quaternion(quaternion).sum()).backward()  # type: ignore[no-untyped-call]
    for given in (columns, quaternion):
        assert given.grad is not None and given.grad.isfinite().all()
