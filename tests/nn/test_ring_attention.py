"""Attention over a ring buffer equals plain attention over its frames in any order of slots."""

from __future__ import annotations

import pytest
import torch

from hma_gym.nn.attention import attend, attend_ring


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ring_attention_equals_attention(frames: int, dtype: torch.dtype) -> None:
    B, W, G, K = 2, 4, 6, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, frames, G, K, generator=generator, dtype=dtype) for _ in range(3))
    past_k, past_v = (torch.randn(B, W, G, K, generator=generator, dtype=dtype) for _ in range(2))
    mask = torch.rand(B, frames, W + frames, generator=generator) < 0.6
    mask[:, :, W:] = torch.eye(frames, dtype=torch.bool)  # each sees at least itself
    past_k[~mask[:, :, :W].any(dim=1)] = 1e30  # what nobody may see has no effect, whatever it holds
    wanted = attend(
        q.transpose(1, 2),
        torch.cat((past_k, k), dim=1).transpose(1, 2),
        torch.cat((past_v, v), dim=1).transpose(1, 2),
        0.3,
        mask[:, None],
        how="matmul",
    ).transpose(1, 2)
    given = attend_ring(q, (past_k, past_v), (k, v), 0.3, mask)
    assert given.dtype == dtype
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


def test_fused_attention_without_gradients_equals_matmul_with_them() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        fused = attend(q, k, v, 0.3)
    torch.testing.assert_close(fused, attend(q, k, v, 0.3, how="matmul"))
    assert attend(q.requires_grad_(), k, v, 0.3).grad_fn is not None
