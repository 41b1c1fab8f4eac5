"""Success of the scripted Lift policy against its competence, in ground truth, without images.

    hma-gym bench competence

8 points of 50 episodes take about 4 minutes of one CPU core. Writes ``<out>/competence_sweep.md`` and ``.png``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from hma_gym.envs.simulation import Simulation, check_action
from hma_gym.envs.tasks import get_task
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.provenance import provenance
from hma_gym.metrics.statistics import Interval, wilson_interval
from hma_gym.policies.scripted import LiftScript, ScriptedConfig


@dataclass(frozen=True)
class CompetenceConfig:
    """One run of the benchmark.

    Attributes:
        points: competences, ascending.
        episodes: per point; every point has the same starts.
        steps: per episode; success is read at the last.
        seed: of the starts and the policy's noise.
        out: folder of the results.
        progress: show a progress bar.
    """

    points: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
    episodes: int = 50
    steps: int = 63
    seed: int = 0
    out: Path = Path("docs")
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.points or list(self.points) != sorted(set(self.points)):
            raise InvalidArgument(f"points must be ascending competences, got {self.points}.")
        if self.episodes < 1 or self.steps < 1:
            raise InvalidArgument(f"episodes and steps must be at least 1, got {self.episodes} and {self.steps}.")


@dataclass(frozen=True)
class Point:
    """One competence: successes at the last step, at any step, and the mean step of the first success."""

    competence: float
    episodes: int
    final: int
    ever: int
    first_step: float

    @property
    def interval(self) -> Interval:
        """Wilson's 95 percent interval of the success rate at the last step."""
        return wilson_interval(self.final, self.episodes)


def measure(simulation: Simulation, config: CompetenceConfig, competence: float) -> Point:
    """Run one point's episodes."""
    final = ever = 0
    first_steps = []
    for episode in range(config.episodes):
        simulation.reset(seed=1_000_000 + 1000 * config.seed + episode)
        script = LiftScript(ScriptedConfig(competence=competence), np.random.default_rng([config.seed, episode, 4]))
        success = []
        for _ in range(config.steps):
            simulation.step(check_action(script.act(simulation.privileged()), simulation.task.action_dim))
            success.append(simulation.is_success())
        final += success[-1]
        if any(success):
            ever += 1
            first_steps.append(success.index(True) + 1)
    return Point(competence, config.episodes, final, ever, float(np.mean(first_steps)) if first_steps else float("nan"))


def competence(config: CompetenceConfig) -> Path:
    """Run the sweep and write its table and plot; returns the table's path."""
    simulation = Simulation(get_task("lift"))
    points = [measure(simulation, config, c) for c in tqdm(config.points, unit="point", disable=not config.progress)]
    simulation.close()
    config.out.mkdir(parents=True, exist_ok=True)
    plot(points).save(config.out / "competence_sweep.png")
    path = config.out / "competence_sweep.md"
    path.write_text(to_markdown(config, points))
    return path


def to_markdown(config: CompetenceConfig, points: list[Point]) -> str:
    """The table, how it was made, and a link to the plot."""
    facts = provenance(torch.device("cpu"))
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    rows = "\n".join(
        f"| {p.competence:.2f} | {p.final}/{p.episodes} | {p.interval.value:.2f} | "
        f"{p.interval.low:.2f} to {p.interval.high:.2f} | {p.ever}/{p.episodes} | "
        f"{'none' if np.isnan(p.first_step) else format(p.first_step, '.0f')} |"
        for p in points
    )
    return f"""# Success of the scripted Lift policy against its competence

Mode `expert` in ground truth: {config.episodes} episodes of {config.steps} steps a point, the same starts at every
point, seed {config.seed}. Success is robosuite's predicate at the last step; intervals are Wilson's at 95 percent.

| competence | successes | rate | interval | success at any step | mean step of the first success |
| ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

![Success rate against competence](competence_sweep.png)

Made by `hma-gym bench competence` at commit {facts["commit"]} on {facts["date"]}; {facts["processor"]},
{facts["system"]}, Python {facts["python"]}, {versions}.
"""


def plot(points: list[Point]) -> Image.Image:
    """Rates with their intervals, competence 0 to 1 from left to right, rate 0 to 1 from bottom to top."""
    width, height, margin = 640, 400, 50
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        return margin + x * (width - 2 * margin), height - margin - y * (height - 2 * margin)

    for tick in np.linspace(0, 1, 6):
        draw.line([at(0, tick), at(1, tick)], fill="#dddddd")
        draw.text((margin - 28, at(0, tick)[1] - 6), f"{tick:.1f}", fill="black")
        draw.text((at(tick, 0)[0] - 8, height - margin + 6), f"{tick:.1f}", fill="black")
    draw.text((width / 2 - 30, height - 24), "competence", fill="black")
    draw.text((margin, margin - 26), "success rate at the last step, with 95 % intervals", fill="black")
    draw.line([at(p.competence, p.interval.value) for p in points], fill="#1f77b4", width=2)
    for point in points:
        draw.line([at(point.competence, point.interval.low), at(point.competence, point.interval.high)], fill="#1f77b4")
        x, y = at(point.competence, point.interval.value)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill="#1f77b4")
    return image
