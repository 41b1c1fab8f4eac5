"""One attention behind two implementations; rotary time is relative; the ring buffer knows what it holds."""

from __future__ import annotations

import torch

from hma_gym.nn.attention import attend, ring_positions, rotary_angles, rotate, window_mask


def _qkv(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 8, generator=generator)
    k, v = torch.randn(2, 2, 3, keys, 8, generator=generator).unbind(0)
    return q, k, v


def test_matmul_equals_fused() -> None:
    q, k, v = _qkv(5, 7)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 0] = True
    for how in (None, mask):
        by_hand = attend(q, k, v, 0.3, how, how="matmul")
        torch.testing.assert_close(by_hand, attend(q, k, v, 0.3, how, how="fused"), rtol=1e-5, atol=1e-6)


def test_masked_keys_have_no_influence() -> None:
    q, k, v = _qkv(4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    before = attend(q, k, v, 0.3, mask)
    k[:, :, 3], v[:, :, 3] = 100.0, -100.0
    after = attend(q, k, v, 0.3, mask)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.allclose(before[:, :, 3], after[:, :, 3])


def test_scale_multiplies_the_scores() -> None:
    q, k, v = _qkv(3, 3)
    torch.testing.assert_close(attend(q, k, v, 0.5), attend(2 * q, k, v, 0.25))


def test_rotary_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator)

    def score(query_at: int, key_at: int) -> float:
        (cos_q, sin_q), (cos_k, sin_k) = (rotary_angles(torch.tensor(p), 16) for p in (query_at, key_at))
        return float(rotate(q, cos_q, sin_q) @ rotate(k, cos_k, sin_k))

    near = score(5, 2)
    assert abs(score(3, 0) - near) < 1e-5
    assert abs(score(100_003, 100_000) - near) < 1e-5  # as exact late in a rollout as at its start
    assert abs(score(5, 3) - near) > 1e-2


def test_rotation_keeps_length_and_dtype() -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(torch.arange(4), 16)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, cos, sin)[0], x[0])  # position 0 is not turned


def test_window_mask() -> None:
    mask = window_mask(5, 3, torch.device("cpu"))
    wanted = [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert [row.nonzero()[:, 0].tolist() for row in mask] == wanted


def test_ring_positions_against_a_simulated_ring() -> None:
    window = 4
    ring = [-1] * window
    for step in range(11):
        held = ring_positions(torch.tensor([step]), window)[0].tolist()
        assert [p if p >= 0 else -1 for p in held] == ring
        ring[step % window] = step
