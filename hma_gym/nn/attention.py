"""Attention, in one place: the two implementations, rotary time positions and the ring buffer's geometry.

Notable choices:

- :func:`attend` is for whole frames and clips; ``matmul`` is the faster one to train on CPUs at these sizes (the
  backward pass of the fused kernel dominates there), ``fused`` on GPUs and without gradients;
- :func:`attend_ring` is for rollouts: one or two queries against the frames of a ring buffer, read where they lie. As
  matrix products these are thousands of 1 x W ones on permuted copies; as sums of products they are five times faster;
- time is encoded by rotary positions (Su et al. 2021, arXiv 2104.09864) and seen through a window of W frames, in
  training as in inference, so a cache of W frames is exact however long the rollout is.

Shape legend: B rows, T new frames, W window (frames in the cache), H heads, K head dim, Q queries, S keys,
G = N * H heads of all tokens of a frame.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Implementation = Literal["auto", "matmul", "fused"]


def attend(
    q_BHQK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    scale: float,
    mask: Tensor | None = None,
    how: Implementation = "auto",
) -> Tensor:
    """Softmax attention.

    Args:
        q_BHQK, k_BHSK, v_BHSK: queries, keys and values; any equal leading dims in place of B and H.
        scale: multiplies the scores; 1/sqrt(K) classically, proportional to 1/K under muP.
        mask: bool, broadcastable to (..., Q, S); True where a query may look.
        how: ``matmul``, ``fused`` (PyTorch's scaled_dot_product_attention), or ``auto``: matmul where a CPU computes
            gradients, else fused.

    Returns:
        (..., Q, K) in the dtype of the values.
    """
    if how == "fused" or (how == "auto" and (q_BHQK.is_cuda or not torch.is_grad_enabled())):
        return F.scaled_dot_product_attention(q_BHQK, k_BHSK, v_BHSK, attn_mask=mask, scale=scale)
    scores = (q_BHQK * scale) @ k_BHSK.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).to(v_BHSK.dtype) @ v_BHSK


def attend_ring(
    q_BTGK: Tensor,
    past_BWGK: tuple[Tensor, Tensor],
    new_BTGK: tuple[Tensor, Tensor],
    scale: float,
    mask_BTS: Tensor,
) -> Tensor:
    """Softmax attention over time of a few new frames, to a ring buffer and to each other, without copying it.

    Args:
        q_BTGK: queries.
        past_BWGK, new_BTGK: keys and values of the ring buffer's slots and of the new frames.
        scale: multiplies the scores.
        mask_BTS: bool (B, T, W + T), True where a new frame may look.

    Returns:
        (B, T, G, K) in the dtype of the new values.
    """
    if q_BTGK.is_cuda:
        return _attend_ring_at_once(q_BTGK, past_BWGK, new_BTGK, scale, mask_BTS)
    frames = []
    ones_K1 = q_BTGK.new_ones(q_BTGK.shape[-1], 1)  # as a product, the sum over the last dim is three times faster
    for t in range(q_BTGK.shape[1]):
        q_B1GK = q_BTGK[:, t, None] * scale
        products = [(k * q_B1GK).to(q_B1GK.dtype) @ ones_K1 for k in (past_BWGK[0], new_BTGK[0])]
        scores_BSG1 = torch.cat(products, dim=1)
        scores_BSG1 = scores_BSG1.masked_fill(~mask_BTS[:, t, :, None, None], torch.finfo(scores_BSG1.dtype).min)
        share_BSG1 = scores_BSG1.softmax(dim=1)
        past, new = share_BSG1.tensor_split((past_BWGK[0].shape[1],), dim=1)
        frames.append(_weighted_sum(past_BWGK[1], past) + _weighted_sum(new_BTGK[1], new))
    return torch.stack(frames, dim=1).to(new_BTGK[1].dtype)


def _attend_ring_at_once(
    q_BTGK: Tensor,
    past_BWGK: tuple[Tensor, Tensor],
    new_BTGK: tuple[Tensor, Tensor],
    scale: float,
    mask_BTS: Tensor,
) -> Tensor:
    """The same for a GPU: few large operations, which its compiler makes one or two kernels of."""
    q_BT1GK = (q_BTGK * scale)[:, :, None]
    scores_BTSG = torch.cat([(k[:, None] * q_BT1GK).sum(dim=-1) for k in (past_BWGK[0], new_BTGK[0])], dim=2)
    scores_BTSG = scores_BTSG.masked_fill(~mask_BTS[..., None], torch.finfo(scores_BTSG.dtype).min)
    share_BTSG1 = scores_BTSG.softmax(dim=2)[..., None]
    past, new = share_BTSG1.tensor_split((past_BWGK[0].shape[1],), dim=2)
    parts = [(v[:, None] * share).sum(dim=2) for v, share in ((past_BWGK[1], past), (new_BTGK[1], new))]
    return (parts[0] + parts[1]).to(new_BTGK[1].dtype)


def _weighted_sum(values_BSGK: Tensor, share_BSG1: Tensor) -> Tensor:
    """The sum over S, (B, G, K), term by term, which stays in a CPU's caches."""
    total_BGK = values_BSGK[:, 0] * share_BSG1[:, 0]
    for s in range(1, values_BSGK.shape[1]):
        total_BGK = torch.addcmul(total_BGK, values_BSGK[:, s], share_BSG1[:, s])
    return total_BGK


def rotary_angles(position: Tensor, dim: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions.

    Args:
        position: integer frame positions, any shape.
        dim: head dim K, even.
        base: longest wavelength over 2 pi, in frames; contexts here are tens of frames.

    Returns:
        cos, sin of shape (*position.shape, dim / 2), float32. Angles are formed in float64, so that position
        100,000 loses nothing against position 0.
    """
    frequency = base ** (-torch.arange(0, dim, 2, device=position.device, dtype=torch.float64) / dim)
    angle = position.to(torch.float64).unsqueeze(-1) * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (first half, second half of the last dim) by the given angles; keeps the dtype of ``x``."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def window_mask(frames: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: frame t may look at frames t - window + 1 .. t."""
    time = torch.arange(frames, device=device)
    age = time[:, None] - time[None, :]
    return (age >= 0) & (age < window)


def ring_positions(step_B: Tensor, window: int) -> Tensor:
    """Which frame each slot of a ring buffer holds, (B, W).

    Slot w holds the latest frame p < step with p % window == w; p < 0 where nothing was written yet.
    """
    slot = torch.arange(window, device=step_B.device)
    last = step_B[:, None] - 1
    return last - torch.remainder(last - slot, window)
