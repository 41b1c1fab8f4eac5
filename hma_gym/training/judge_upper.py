"""The second stage of training a classifier judge: all above the codes of frames, on codes.

A code depends on its frame alone, so each frame is read once, and a step costs a fiftieth of one that reads pictures:
in a minute the layers that weigh the window and agent_pos see more windows than in an hour of the first stage. Frames
are not damaged here; codes get a little noise in place of that.

Lift, 2120 episodes real and drawn, one core: 1500 steps in a minute halve the errors of 10 minutes of the first stage.

Shape legend: B windows, K window, F rows, D numbers of a picture's code, S those of agent_pos, P agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hma_gym.judges.classifier import ClassifierJudge
from hma_gym.judges.rows import LabelledRows
from hma_gym.training import Every, OptimizerConfig, ParameterGroup, TrainConfig, default_parameter_groups, train

#: Windows of a step.
BATCH = 512

#: Most noise on codes, in units of each number's own standard deviation: a window's level is drawn evenly up to it.
CODE_NOISE = 0.1

#: The loss of (logit, position), success (B,) and place (B, 3).
Loss = Callable[[tuple[Tensor, Tensor], Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]

#: agent_pos (B, K, P) as the judge is told it, (B, K, S).
Told = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class CodedRows:
    """Rows with the codes of their pictures, (F, D) float16."""

    rows: LabelledRows
    codes_FD: NDArray[np.float16]


@torch.inference_mode()
def coded_rows(
    judge: ClassifierJudge, rows: LabelledRows, frames_FHWC: NDArray[np.uint8], batch: int = 256
) -> CodedRows:
    """Rows, and the codes of these frames in place of their own."""
    parts = [
        judge.code(torch.from_numpy(frames_FHWC[start : start + batch]))[:, : judge.config.width].half().numpy()
        for start in range(0, len(frames_FHWC), batch)
    ]
    return CodedRows(rows, np.concatenate(parts))


class CodeBatches:
    """Windows of codes, half near the deciding height, half evenly; a pure function of the step."""

    def __init__(self, parts: Sequence[CodedRows], window: int, decision_height: float | None, seed: int) -> None:
        self.parts, self.window, self.seed = parts, window, seed
        self.near = [part.rows.near(decision_height) for part in parts]
        sizes = np.array([len(part.rows) for part in parts], dtype=np.float64)
        self.share = sizes / sizes.sum()

    def batch(self, step: int) -> Mapping[str, Tensor]:
        """``codes_BKD`` and ``agent_pos_BKP`` float32, ``success_B`` bool, ``position_B3`` float32 (m)."""
        generator = np.random.default_rng((self.seed, step))
        columns: dict[str, list[NDArray[np.generic]]] = {}
        for part, near, count in zip(self.parts, self.near, generator.multinomial(BATCH, self.share), strict=True):
            chosen_B = part.rows.draw(near, count, generator)
            index_BK = part.rows.windows(chosen_B, self.window)
            found: dict[str, NDArray[np.generic]] = {
                "codes_BKD": part.codes_FD[index_BK].astype(np.float32),
                "agent_pos_BKP": part.rows.agent_pos_FP[index_BK],
                "success_B": part.rows.success_F[chosen_B],
                "position_B3": part.rows.position_F3[chosen_B],
            }
            for key, value in found.items():
                columns.setdefault(key, []).append(value)
        return {key: torch.from_numpy(np.concatenate(values)) for key, values in columns.items()}


class UpperTraining(nn.Module):
    """A judge whose reading of single frames is left as it is, for :func:`hma_gym.training.loop.train`.

    Args:
        judge: what is trained.
        told: what it is told of agent_pos.
        loss_of: of what it says.
        code_std_D: standard deviation of the codes.
    """

    code_std_D: Tensor

    def __init__(self, judge: ClassifierJudge, told: Told, loss_of: Loss, code_std_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("code_std_D", code_std_D, persistent=False)
        self.judge, self.told, self.loss_of = judge, told, loss_of
        for part in (judge.encoder, judge.project):
            part.requires_grad_(False)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """On noisy codes and noisy agent_pos."""
        codes_BKD = batch["codes_BKD"]
        level_B11 = CODE_NOISE * torch.rand(len(codes_BKD), 1, 1, generator=generator, device=codes_BKD.device)
        noise_BKD = torch.randn(codes_BKD.shape, generator=generator, device=codes_BKD.device)
        told_BKS = self.told(batch["agent_pos_BKP"], generator)
        said = self.judge.read_codes(codes_BKD + level_B11 * self.code_std_D * noise_BKD, told_BKS)
        return self.loss_of(said, batch["success_B"].float(), batch["position_B3"])

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """All that is above the codes."""
        return default_parameter_groups(self)


def train_upper(
    judge: ClassifierJudge,
    parts: Sequence[CodedRows],
    told: Told,
    loss_of: Loss,
    out: Path,
    *,
    steps: int,
    decision_height: float | None,
    seed: int,
    progress: bool,
) -> None:
    """Train the judge's upper layers in place, in ``<out>/upper``; resumes where it stopped."""
    some_FD = np.concatenate([part.codes_FD[:: max(len(part.codes_FD) // 10_000, 1)] for part in parts])
    model = UpperTraining(judge, told, loss_of, torch.from_numpy(some_FD.astype(np.float32).std(axis=0)))
    config = TrainConfig(
        out=out / "upper",
        steps=steps,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.05),
        warmup_steps=min(100, max(steps // 5, 1)),
        decay="linear",
        ema_decay=0.995,
        checkpoint=Every(minutes=2),
        seed=seed,
        progress=progress,
        recipe={"upper_steps": steps},
    )
    result = train(model, CodeBatches(parts, judge.window, decision_height, seed), config)
    model.load_state_dict(result.ema.state_dict(model))
