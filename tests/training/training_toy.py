"""A two-layer model and its data, shared by the tests of training; run as a script it trains until it is killed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hma_gym.nn.parameters import ParameterGroup, default_parameter_groups
from hma_gym.training import Every, OptimizerConfig, TrainConfig, train


class Toy(nn.Module):
    """Learns to square; its loss uses the generator given, its dropout torch's own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Linear(4, 16)
        self.out = nn.Linear(16, 4)
        self.dropout = nn.Dropout(0.1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.dropout(torch.relu(self.hidden(x))))
        return result

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"]
        noisy = x + 0.01 * torch.randn(x.shape, generator=generator, device=x.device)
        loss = (self(noisy) - batch["y"]).square().mean()
        return loss, {"error": loss.detach().sqrt()}

    def parameter_groups(self) -> list[ParameterGroup]:
        return default_parameter_groups(self, not_matrices=[self.out.weight])


class Squares:
    """Batches of x and x squared."""

    def batch(self, step: int) -> dict[str, Tensor]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1000 + step))
        return {"x": x, "y": x.square()}


def toy_config(out: Path, optimizer: str = "adamw", steps: int = 40) -> TrainConfig:
    return TrainConfig(
        out=out,
        steps=steps,
        optimizer=OptimizerConfig(name="muon" if optimizer == "muon" else "adamw", lr=1e-2),
        warmup_steps=5,
        ema_decay=0.9,
        deterministic=True,
        log_every=10,
        progress=False,
    )


def endless_config(out: Path) -> TrainConfig:
    """Saves every 20 steps and does not end by itself."""
    return dataclasses.replace(toy_config(out, steps=1_000_000), decay="constant", checkpoint=Every(steps=20))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Toy(), Squares(), endless_config(Path(sys.argv[1])))
