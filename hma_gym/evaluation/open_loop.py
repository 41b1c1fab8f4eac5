"""Generation: one real frame, and the video that the model makes of given actions, or of an actor's answers to it.

Shape legend: B episodes, T steps, N tokens per frame, H W C image, P agent_pos dims, A action dims, X targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.refresh import refreshed
from hma_gym.errors import InvalidArgument


@dataclass(frozen=True)
class Generated:
    """What a model made of T actions; entry t of the time axis follows action t. All on the CPU.

    Attributes:
        frames_BTHWC: uint8; with ``last_only`` T is 1, the last frame.
        agent_pos_BTP: predicted proprioception, float32.
        targets_BTX: predicted privileged targets (for Lift the cube's position, metres), X = 0 without them.
    """

    frames_BTHWC: Tensor
    agent_pos_BTP: Tensor
    targets_BTX: Tensor


Actor = Callable[[int, Tensor, Tensor], Tensor]
"""What acts on a rollout's own predictions: the step, agent_pos (B, P) and the targets (B, X) before it, on the CPU, to
raw actions (B, A). At step 0 the targets are NaN: nothing was predicted yet."""


def device_of(checkpoint: Checkpoint) -> torch.device:
    """Where the checkpoint's weights are."""
    return next(checkpoint.dynamics.parameters()).device


@torch.inference_mode()
def generate(
    checkpoint: Checkpoint,
    frames_BHWC: Tensor,
    agent_pos_BP: Tensor,
    actions_BTA: Tensor,
    seeds_B: Tensor,
    *,
    batch: int = 32,
    last_only: bool = False,
    progress: str | None = None,
) -> Generated:
    """Roll the model out under given actions, ``batch`` episodes at a time.

    A row's randomness comes from its own seed, so the batch size changes nothing but speed (to float rounding).

    Args:
        checkpoint: tokenizer and dynamics.
        frames_BHWC: uint8 real frame that each episode starts from.
        agent_pos_BP: proprioception at that frame.
        actions_BTA: raw actions in env units.
        seeds_B: int64.
        batch: episodes per network call.
        last_only: decode the last frame only, for speed.
        progress: label of a progress bar; None for none.
    """
    total, steps = actions_BTA.shape[:2]
    if steps < 1 or not len(frames_BHWC) == len(agent_pos_BP) == len(seeds_B) == total:
        raise InvalidArgument(
            "frames, agent_pos, actions and seeds must have one row per episode and actions at least one step, got "
            f"{len(frames_BHWC)}, {len(agent_pos_BP)}, {tuple(actions_BTA.shape)} and {len(seeds_B)}."
        )
    parts: list[Generated] = []
    bar = tqdm(total=total * steps, desc=progress, unit="frame", disable=progress is None, leave=False)
    with bar:
        for start in range(0, total, batch):
            rows = slice(start, start + batch)
            actions = actions_BTA[rows]
            parts.append(
                _roll(
                    checkpoint,
                    frames_BHWC[rows],
                    agent_pos_BP[rows],
                    lambda t, agent_pos, targets, actions=actions: actions[:, t],  # type: ignore[misc]
                    steps,
                    seeds_B[rows],
                    last_only,
                    bar,
                )
            )
    return Generated(
        torch.cat([part.frames_BTHWC for part in parts]),
        torch.cat([part.agent_pos_BTP for part in parts]),
        torch.cat([part.targets_BTX for part in parts]),
    )


@torch.inference_mode()
def generate_closed_loop(
    checkpoint: Checkpoint,
    frames_BHWC: Tensor,
    agent_pos_BP: Tensor,
    actor: Actor,
    steps: int,
    seeds_B: Tensor,
    *,
    progress: str | None = None,
) -> Generated:
    """Roll the model out, all episodes at once, under an actor that answers what the model predicts; see
    :func:`generate`."""
    with tqdm(
        total=len(frames_BHWC) * steps, desc=progress, unit="frame", disable=progress is None, leave=False
    ) as bar:
        return _roll(checkpoint, frames_BHWC, agent_pos_BP, actor, steps, seeds_B, False, bar)


def _roll(
    checkpoint: Checkpoint,
    frames_BHWC: Tensor,
    agent_pos_BP: Tensor,
    actor: Actor,
    steps: int,
    seeds_B: Tensor,
    last_only: bool,
    bar: tqdm[None],
) -> Generated:
    device = device_of(checkpoint)
    tokens = checkpoint.tokenizer.encode(frames_BHWC.to(device))
    domain = checkpoint.domain
    state = checkpoint.dynamics.start(tokens, agent_pos_BP.to(device), seeds_B.to(device), domain.name)
    frames: list[Tensor] = []
    agent_pos = [agent_pos_BP.float().cpu()]
    targets = [torch.full((len(frames_BHWC), domain.target_dim), torch.nan)]
    for t in range(steps):
        action = actor(t, agent_pos[-1], targets[-1]).to(device)
        state, out = checkpoint.dynamics.step(state, action, in_place=True)
        state = refreshed(state, checkpoint.tokenizer, checkpoint.dynamics.config.refresh)
        agent_pos.append(out.agent_pos_BP.float().cpu())
        targets.append(out.targets_BX.float().cpu())
        if not last_only or t == steps - 1:
            frames.append(checkpoint.tokenizer.decode(out.tokens).cpu())
        bar.update(len(action))
    return Generated(torch.stack(frames, 1), torch.stack(agent_pos[1:], 1), torch.stack(targets[1:], 1))


@torch.inference_mode()
def reconstruct(checkpoint: Checkpoint, frames_BTHWC: Tensor, *, batch: int = 256) -> Tensor:
    """What the tokenizer alone makes of real frames: the ceiling of any generated video. uint8, on the CPU."""
    flat, device = frames_BTHWC.flatten(0, 1), device_of(checkpoint)
    parts = []
    for start in range(0, len(flat), batch):
        tokens = checkpoint.tokenizer.encode(flat[start : start + batch].to(device))
        parts.append(checkpoint.tokenizer.decode(tokens).cpu())
    return torch.cat(parts).reshape(frames_BTHWC.shape)
