"""A scripted Lift policy with a dial for competence and named ways to fail.

A learned simulator that saw only success cannot show failure, so the scripts cover what policies of
every quality do: clean lifts, grasps at the edge of what holds, closing too soon, releases, regrasps,
putting down, pushing, aimless motion, and changes of mind, each at varied speed, height, yaw, noise.

A script is a generator: it is sent the :class:`Situation` and yields the next action. It draws all its
randomness from its own ``numpy.random.Generator``, so an episode is a function of its seed.

Shape legend: N environments, A = 7 action dims (translation 3, rotation 3, gripper 1: -1 opens, +1 closes).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument, UnknownName

Vec = NDArray[np.float64]
Script = Generator[Vec, "Situation", None]
Motion = Generator[Vec, "Situation", "Situation"]
"""A part of a script: it returns the situation in which it ended."""

_METRES_PER_UNIT = 0.05  # OSC_POSE: an action of 1 asks for 5 cm, or .5 rad, from where the hand is now
_RADIANS_PER_UNIT = 0.5
_OPEN, _CLOSE = -1.0, 1.0
_LIFTED = 0.03  # metres above its rest height from which a script believes that it holds the cube


@dataclass(frozen=True)
class ScriptedConfig:
    """How a scripted policy behaves.

    Attributes:
        mode: a key of :data:`MODES`.
        competence: 0 to 1. Sets how far a grasp aims beside the cube, and how steady the hand is: success runs
            from under 5 percent at 0 to over 95 percent at 1 (docs/competence_sweep.md).
        noise: standard deviation of white noise on each action dim but the gripper, in action units; ``None``
            draws it anew for each episode (0 to .25, more for low competence).
        bias: constant action added to x, y, z, in action units.
    """

    mode: str = "expert"
    competence: float = 1.0
    noise: float | None = None
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownName("mode of the scripted policy", self.mode, list(MODES))
        if not 0.0 <= self.competence <= 1.0:
            raise InvalidArgument(f"competence must lie in [0, 1], got {self.competence}.")
        if self.noise is not None and not 0.0 <= self.noise <= 1.0:
            raise InvalidArgument(f"noise must lie in [0, 1] (action units) or be None, got {self.noise}.")
        if len(self.bias) != 3 or not np.isfinite(self.bias).all():
            raise InvalidArgument(f"bias must be three finite numbers (action units), got {self.bias}.")


@dataclass(frozen=True)
class Situation:
    """What a script sees of one environment: true poses in metres and radians, world frame."""

    eef: Vec
    cube: Vec
    cube_yaw: float
    finger_yaw: float
    tilt: Vec

    @classmethod
    def from_privileged(cls, privileged: Mapping[str, NDArray[Any]]) -> Situation:
        """Read one environment's ``privileged`` dict (see ``Simulation.privileged``)."""
        x, y, z, w = privileged["cube_quat"]
        hx, hy, hz, hw = privileged["eef_quat"]
        # z axis of the hand in the world; it points down (0, 0, -1) when upright.
        approach = np.array([2 * (hx * hz + hw * hy), 2 * (hy * hz - hw * hx), 1 - 2 * (hx**2 + hy**2)])
        axis = privileged["finger_axis"]
        return cls(
            eef=np.asarray(privileged["eef_pos"], dtype=np.float64),
            cube=np.asarray(privileged["cube_pos"], dtype=np.float64),
            cube_yaw=float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2))),
            finger_yaw=float(np.arctan2(axis[1], axis[0])),
            tilt=np.cross(approach, np.array([0.0, 0.0, -1.0]))[:2],
        )


@dataclass(frozen=True)
class _Style:
    """How one episode's hand moves, whatever it wants."""

    gain: float
    speed: float
    yaw_gain: float
    tilt_gain: float
    grip: float
    white: float
    drift: float
    hold: int
    burst_at: int
    burst_steps: int
    bias: Vec

    @classmethod
    def draw(cls, config: ScriptedConfig, rng: np.random.Generator) -> _Style:
        sloppy = 1.0 - config.competence
        # How loosely it moves: an able expert hardly at all, every other mode fully, for variety.
        loose = min(1.0, 3.0 * sloppy) if config.mode == "expert" else 1.0
        white = config.noise
        if white is None:
            white = float(rng.choice([0.0, 0.03, 0.08, 0.15])) + 0.12 * sloppy * rng.random()
        return cls(
            gain=rng.uniform(0.8 - 0.25 * loose, 1.3 + 0.1 * loose),
            speed=1.0 - (0.25 + 0.25 * loose) * rng.random() ** 1.5,
            yaw_gain=rng.uniform(0.3, 0.8),
            tilt_gain=rng.uniform(0.2, 0.6) if rng.random() < 0.8 else 0.0,
            grip=1.0 if rng.random() < 0.5 else rng.uniform(0.3, 1.0),
            white=white,
            drift=float(rng.choice([0.0, 0.0, 0.05, 0.15])) * (0.3 + 0.7 * loose),
            hold=int(rng.integers(2, 4)) if rng.random() < 0.2 * loose else 1,
            burst_at=int(rng.integers(5, 50)) if rng.random() < 0.05 + 0.15 * loose else -1000,
            burst_steps=int(rng.integers(3, 9)),
            bias=np.asarray(config.bias, dtype=np.float64),
        )


@dataclass(frozen=True)
class _Grasp:
    """One attempt: where the hand aims relative to the cube, and how it takes it."""

    offset: Vec  # metres, along the fingers' closing axis and across it
    depth: float  # metres above the cube's centre
    hover: float  # metres above the cube's centre before the descent
    yaw_off: float  # radians from being square to the cube
    pause: int
    close: int
    frozen: bool  # aims at where the cube was when the attempt began


class _Hand:
    """One episode's hand: motion primitives that scripts are made of."""

    def __init__(self, config: ScriptedConfig, rng: np.random.Generator) -> None:
        self.config = config
        self.rng = rng
        self.style = _Style.draw(config, rng)
        self.rest_height = 0.82

    def lifted(self, s: Situation) -> bool:
        return bool(s.cube[2] > self.rest_height + _LIFTED)

    def toward(self, s: Situation, goal: Vec, grip: float, *, yaw: float | None = None, spin: float = 0.0) -> Vec:
        """The action that moves the hand toward ``goal`` and turns the fingers toward ``yaw`` (modulo 90 degrees)."""
        move = self.style.gain * (goal - s.eef) / _METRES_PER_UNIT * 2.2
        length = float(np.linalg.norm(move))
        if length > self.style.speed:
            move *= self.style.speed / length
        turn = spin
        if yaw is not None:
            error = (yaw - s.finger_yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
            turn = float(np.clip(self.style.yaw_gain * error / _RADIANS_PER_UNIT * 2.0, -0.6, 0.6))
        level = np.clip(self.style.tilt_gain * s.tilt / _RADIANS_PER_UNIT * 2.0, -0.4, 0.4)
        return np.concatenate([move, level, [turn, grip * self.style.grip]])

    def go(
        self,
        s: Situation,
        goal: Vec,
        grip: float,
        *,
        steps: int,
        tolerance: float,
        yaw: float | None = None,
        spin: float = 0.0,
    ) -> Motion:
        """Move until the hand is within ``tolerance`` metres of ``goal`` or ``steps`` are over."""
        for _ in range(steps):
            s = yield self.toward(s, goal, grip, yaw=yaw, spin=spin)
            if np.linalg.norm(goal - s.eef) < tolerance:
                break
        return s

    def grip_still(self, s: Situation, grip: float, steps: int) -> Motion:
        """Stay about here while the gripper opens or closes."""
        here = s.eef.copy()
        for _ in range(steps):
            s = yield self.toward(s, here, grip)
        return s

    def draw_grasp(self, competence: float) -> _Grasp:
        rng, sloppy = self.rng, 1.0 - competence
        radius = sloppy**1.2 * 0.055 * rng.uniform(0.5, 1.4) + 0.010 * sloppy * abs(rng.standard_normal())
        radius += 0.004 * rng.random()
        angle = rng.uniform(0, 2 * np.pi)
        return _Grasp(
            offset=radius * np.array([np.cos(angle), np.sin(angle)]),
            depth=rng.uniform(-0.006, 0.006) + max(0.0, sloppy * 0.018 * rng.standard_normal()),
            hover=rng.uniform(0.035, 0.11),
            yaw_off=sloppy * rng.uniform(-0.5, 0.5) + rng.uniform(-0.12, 0.12),
            pause=int(rng.integers(0, 4)) if rng.random() < 0.3 else 0,
            close=int(rng.integers(5, 9)) - (int(rng.integers(0, 4)) if rng.random() < 0.7 * sloppy else 0),
            frozen=rng.random() < 0.3,
        )

    def reach(self, s: Situation, grasp: _Grasp, grip: float = _OPEN) -> Motion:
        """Hover, descend: ends with the hand around, beside or above the cube."""
        rng = self.rng
        cube, cube_yaw = s.cube.copy(), s.cube_yaw

        def aim(s: Situation, height: float) -> tuple[Vec, float]:
            at, at_yaw = (cube, cube_yaw) if grasp.frozen else (s.cube, s.cube_yaw)
            yaw = at_yaw + grasp.yaw_off
            along = np.array([np.cos(s.finger_yaw), np.sin(s.finger_yaw)])
            across = np.array([-along[1], along[0]])
            shift = grasp.offset[0] * along + grasp.offset[1] * across
            return np.array([at[0] + shift[0], at[1] + shift[1], at[2] + height]), yaw

        for _ in range(int(rng.integers(18, 30))):
            goal, yaw = aim(s, grasp.hover)
            s = yield self.toward(s, goal, grip, yaw=yaw)
            if np.linalg.norm((goal - s.eef)[:2]) < 0.016 and abs(goal[2] - s.eef[2]) < 0.04:
                break
        if grasp.pause:
            s = yield from self.grip_still(s, grip, grasp.pause)
        for _ in range(int(rng.integers(12, 20))):
            goal, yaw = aim(s, grasp.depth)
            goal[2] = max(goal[2], 0.81)
            s = yield self.toward(s, goal, grip, yaw=yaw)
            if np.linalg.norm(goal - s.eef) < 0.01:
                break
        return s

    def raise_hand(self, s: Situation, height: float, steps: int, grip: float = _CLOSE) -> Motion:
        """Lift ``height`` metres straight up, or a little aside."""
        aside = self.rng.normal(0, 0.01, 2) if self.rng.random() < 0.5 else np.zeros(2)
        goal = s.eef + np.array([aside[0], aside[1], height])
        return (yield from self.go(s, goal, grip, steps=steps, tolerance=0.01))

    def lift(self, s: Situation, competence: float) -> Motion:
        """Attempts until the cube is up (not always a second or third one)."""
        rng = self.rng
        keen = rng.random() < 0.6
        while True:
            grasp = self.draw_grasp(competence)
            s = yield from self.reach(s, grasp)
            s = yield from self.grip_still(s, _CLOSE, grasp.close)
            s = yield from self.raise_hand(s, rng.uniform(0.06, 0.22), int(rng.integers(8, 14)))
            if self.lifted(s) or not keen:
                return s
            s = yield from self.grip_still(s, _OPEN, int(rng.integers(2, 6)))

    def carry(self, s: Situation, grip: float = _CLOSE) -> Script:
        """Hold for ever: still, wandering between places, up and down, or turning."""
        rng = self.rng
        kind = rng.choice(["still", "places", "turn", "high"], p=[0.35, 0.4, 0.15, 0.1])
        here = s.eef.copy()
        while True:
            if kind == "still":
                s = yield self.toward(s, here, grip)
            elif kind == "high":
                s = yield from self.go(s, here + np.array([0, 0, 0.2]), grip, steps=40, tolerance=0.0)
            elif kind == "turn":
                spin = float(rng.uniform(-0.8, 0.8))
                s = yield from self.go(s, here, grip, steps=int(rng.integers(6, 20)), tolerance=0.0, spin=spin)
            else:
                goal = np.array([rng.uniform(-0.2, 0.15), rng.uniform(-0.2, 0.2), rng.uniform(0.87, 1.1)])
                s = yield from self.go(s, goal, grip, steps=int(rng.integers(8, 25)), tolerance=0.015)


def _expert(hand: _Hand, s: Situation) -> Script:
    s = yield from hand.lift(s, hand.config.competence)
    yield from hand.carry(s)


def _near_miss(hand: _Hand, s: Situation) -> Script:
    """Grasps at the edge of what holds, then acts as if it held, or tries again."""
    rng = hand.rng
    again = rng.random() < 0.4
    while True:
        plain = hand.draw_grasp(0.95)
        kind = rng.choice(["beside", "above", "askew"], p=[0.6, 0.25, 0.15])
        angle = rng.uniform(0, 2 * np.pi)
        radius = rng.uniform(0.014, 0.045) if kind == "beside" else 0.0
        grasp = _Grasp(
            offset=plain.offset + radius * np.array([np.cos(angle), np.sin(angle)]),
            depth=rng.uniform(0.014, 0.045) if kind == "above" else plain.depth,
            hover=plain.hover,
            yaw_off=rng.uniform(0.5, 1.0) if kind == "askew" else plain.yaw_off,
            pause=plain.pause,
            close=plain.close - int(rng.integers(0, 4)),
            frozen=plain.frozen,
        )
        s = yield from hand.reach(s, grasp)
        s = yield from hand.grip_still(s, _CLOSE, grasp.close)
        s = yield from hand.raise_hand(s, rng.uniform(0.05, 0.22), int(rng.integers(8, 14)))
        if not again or hand.lifted(s):
            break
        s = yield from hand.grip_still(s, _OPEN, int(rng.integers(3, 7)))
    yield from hand.carry(s)


def _premature_close(hand: _Hand, s: Situation) -> Script:
    """Closes on the way down, so that the fingers land on the cube or shove it, then lifts nothing."""
    rng = hand.rng
    grasp = hand.draw_grasp(rng.uniform(0.7, 1.0))
    early = _Grasp(grasp.offset, rng.uniform(0.02, 0.08), grasp.hover, grasp.yaw_off, grasp.pause, grasp.close, False)
    s = yield from hand.reach(s, early, grip=_OPEN)
    down = s.eef - np.array([0.0, 0.0, s.eef[2] - s.cube[2] - rng.uniform(0.0, 0.02)])
    s = yield from hand.go(s, down, _CLOSE, steps=int(rng.integers(8, 16)), tolerance=0.006)
    s = yield from hand.raise_hand(s, rng.uniform(0.05, 0.2), int(rng.integers(8, 14)))
    if rng.random() < 0.25:
        s = yield from hand.grip_still(s, _OPEN, int(rng.integers(4, 7)))
        s = yield from hand.lift(s, rng.uniform(0.6, 1.0))
    yield from hand.carry(s)


def _drop(hand: _Hand, s: Situation) -> Script:
    """Lifts, then lets go: in the air or on the table, for good or to grasp again."""
    rng = hand.rng
    while True:
        s = yield from hand.lift(s, rng.uniform(0.85, 1.0))
        place = np.array([rng.uniform(-0.2, 0.12), rng.uniform(-0.18, 0.18), s.eef[2] + rng.uniform(-0.03, 0.15)])
        if rng.random() < 0.6:
            s = yield from hand.go(s, place, _CLOSE, steps=int(rng.integers(1, 18)), tolerance=0.01)
        kind = rng.choice(["release", "fling", "put_down", "slip"], p=[0.45, 0.15, 0.2, 0.2])
        if kind == "put_down":
            goal = np.array([s.eef[0], s.eef[1], hand.rest_height + rng.uniform(-0.005, 0.03)])
            s = yield from hand.go(s, goal, _CLOSE, steps=int(rng.integers(8, 20)), tolerance=0.008)
            s = yield from hand.grip_still(s, _OPEN, int(rng.integers(4, 9)))
        elif kind == "fling":
            goal = s.eef + rng.uniform(-0.15, 0.15, 3) * np.array([1, 1, 0.5])
            s = yield from hand.go(s, goal, _OPEN, steps=int(rng.integers(5, 10)), tolerance=0.0)
        elif kind == "slip":
            s = yield from hand.grip_still(s, _OPEN, int(rng.integers(1, 6)))
            s = yield from hand.grip_still(s, _CLOSE, int(rng.integers(2, 10)))
        else:
            s = yield from hand.grip_still(s, _OPEN, int(rng.integers(4, 10)))
        after = rng.choice(["regrasp", "retreat", "stay", "close"], p=[0.25, 0.3, 0.25, 0.2])
        if after == "regrasp":
            continue
        grip = _CLOSE if after == "close" else _OPEN
        if after == "retreat":
            s = yield from hand.raise_hand(s, rng.uniform(0.03, 0.15), 12, grip)
        yield from hand.carry(s, grip)


def _push(hand: _Hand, s: Situation) -> Script:
    """Comes down beside the cube and shoves it across the table, once or more."""
    rng = hand.rng
    while True:
        grip = _CLOSE if rng.random() < 0.6 else _OPEN
        angle = rng.uniform(0, 2 * np.pi)
        way = np.array([np.cos(angle), np.sin(angle), 0.0])
        beside = s.cube - way * rng.uniform(0.05, 0.09)
        low = rng.uniform(0.815, 0.845)
        s = yield from hand.go(
            s, np.array([beside[0], beside[1], low + rng.uniform(0.04, 0.1)]), grip, steps=25, tolerance=0.02
        )
        s = yield from hand.go(s, np.array([beside[0], beside[1], low]), grip, steps=14, tolerance=0.01)
        through = np.array([s.cube[0], s.cube[1], low]) + way * rng.uniform(0.02, 0.14)
        s = yield from hand.go(s, through, grip, steps=int(rng.integers(8, 22)), tolerance=0.01)
        if rng.random() < 0.5:
            s = yield from hand.raise_hand(s, rng.uniform(0.05, 0.15), 10, grip)
            if rng.random() < 0.4:
                yield from hand.carry(s, grip)


def _wander(hand: _Hand, s: Situation) -> Script:
    """Aimless: smooth or jerky random actions, random places near the table, gripper toggles, large rotations."""
    rng = hand.rng
    kind = rng.choice(["smooth", "jerky", "places", "rotate"], p=[0.35, 0.2, 0.25, 0.2])
    scale = np.concatenate([rng.uniform(0.2, 1.0, 3), rng.uniform(0.05, 0.5, 3)])
    if kind == "rotate":
        scale[3:] = rng.uniform(0.5, 1.0, 3)
    memory = rng.uniform(0.75, 0.97)
    toggle = rng.uniform(0.02, 0.3)
    grip = float(rng.choice([_OPEN, _CLOSE]))
    wave = np.zeros(6)
    while True:
        if rng.random() < toggle:
            grip = -grip
        if kind == "places":
            goal = s.cube + np.array([rng.normal(0, 0.08), rng.normal(0, 0.08), rng.uniform(-0.01, 0.15)])
            steps, spin = int(rng.integers(4, 16)), rng.normal(0, 0.3)
            s = yield from hand.go(s, goal, grip, steps=steps, tolerance=0.01, spin=spin)
            continue
        if kind == "jerky":
            wave = rng.uniform(-1, 1, 6)
        else:
            wave = memory * wave + np.sqrt(1 - memory**2) * rng.standard_normal(6)
        action = np.concatenate([wave * scale, [grip * hand.style.grip]])
        # A soft floor and fence: without them the hand spends the episode pressed on the table or out of view.
        action[2] += 0.5 * max(0.0, 0.83 - s.eef[2]) / 0.02 - 0.5 * max(0.0, s.eef[2] - 1.1) / 0.05
        action[:2] -= 0.5 * np.sign(s.eef[:2]) * np.maximum(0.0, np.abs(s.eef[:2]) - 0.22) / 0.05
        s = yield action


def _random(hand: _Hand, s: Situation) -> Script:
    """Independent uniform actions, as an untrained policy samples them."""
    while True:
        yield hand.rng.uniform(-1, 1, 7)


def _roam(hand: _Hand, s: Situation) -> Script:
    """Anywhere the arm gets, for as long as it lasts: uniform noise, slow strong drifts, far places, and another
    script's motions aimed at a cube that is not there. No fence: it presses on the table and leaves the picture."""
    rng = hand.rng
    while True:
        kind = rng.choice(["uniform", "drift", "places", "elsewhere"], p=[0.3, 0.25, 0.25, 0.2])
        steps = int(rng.integers(30, 120))
        if kind == "uniform":
            for _ in range(steps):
                s = yield rng.uniform(-1, 1, 7)
        elif kind == "drift":
            memory, wave = rng.uniform(0.8, 0.98), np.zeros(7)
            scale = np.concatenate([rng.uniform(0.3, 1.2, 3), rng.uniform(0.05, 0.8, 3), [2.0]])
            for _ in range(steps):
                wave = memory * wave + np.sqrt(1 - memory**2) * rng.standard_normal(7)
                s = yield wave * scale
        elif kind == "places":
            for _ in range(steps // 15):
                goal = np.array([rng.uniform(-0.35, 0.3), rng.uniform(-0.45, 0.45), rng.uniform(0.8, 1.35)])
                grip, spin = float(rng.choice([_OPEN, _CLOSE])), rng.normal(0, 0.4)
                s = yield from hand.go(s, goal, grip, steps=int(rng.integers(8, 25)), tolerance=0.01, spin=spin)
        else:
            shift = np.array([rng.uniform(-0.25, 0.25), rng.uniform(-0.3, 0.3), rng.uniform(-0.01, 0.25)])

            def imagined(s: Situation, shift: Vec = shift) -> Situation:
                return replace(s, cube=s.cube + shift)

            script = (_expert, _near_miss, _drop, _push)[int(rng.integers(4))](hand, imagined(s))
            action = next(script)
            for _ in range(steps):
                s = yield action
                action = script.send(imagined(s))


def _clumsy(hand: _Hand, s: Situation) -> Script:
    """What a regressor of demonstrations does that sees badly: it is drawn to where it believes the cube to be, slower
    the nearer it gets, presses on the table, cannot decide to close or to lift, and begins again."""
    rng = hand.rng
    misread = rng.choice([0.003, 0.008, 0.015]) * rng.standard_normal(3) * (1.0, 1.0, 0.6)
    size = rng.choice([0.002, 0.006, 0.015])
    wander = np.zeros(3)
    depth, slack = rng.uniform(-0.035, 0.015), rng.uniform(0.008, 0.04)
    doubt, lift = rng.uniform(0.05, 0.8), rng.uniform(0.02, 0.2)
    gain, turn = rng.uniform(0.3, 1.0), rng.uniform(-0.4, 0.4)
    closed = 0.0
    while True:
        wander = 0.95 * wander + 0.31 * size * rng.standard_normal(3)
        believed = s.cube + misread + wander
        beside = float(np.linalg.norm((believed - s.eef)[:2]))
        above = float(s.eef[2] - believed[2])
        over = 0.08 / (1.0 + np.exp(-(beside - slack) / 0.006))
        there = np.exp(-((beside / slack) ** 2) - (max(above - 0.005, 0.0) / 0.015) ** 2)
        closed = 0.8 * closed + 0.2 * (1.0 if rng.random() < max(there, 0.9 * closed) else 0.0)
        up = lift * max(0.0, closed - doubt) / (1.0 - 0.9 * doubt)
        goal = believed + np.array([0.0, 0.0, (depth + over) * (1.0 - closed) + up + closed * max(above, 0.0) * 0.8])
        action = hand.toward(s, goal, 2.0 * closed - 1.0 + doubt * rng.standard_normal(), yaw=s.cube_yaw + turn)
        action[:3] *= gain
        s = yield action


def _home(hand: _Hand, s: Situation) -> Script:
    goal = np.array([-0.1, 0.0, 1.0]) + hand.rng.normal(0, 0.04, 3)
    grip = float(hand.rng.choice([_OPEN, _CLOSE]))
    while True:
        s = yield hand.toward(s, goal, grip)


def _switch(hand: _Hand, s: Situation) -> Script:
    """Follows one intent, then drops it midway for another, once or twice."""
    rng = hand.rng
    while True:
        intents = (_expert, _near_miss, _premature_close, _drop, _push, _wander, _home)
        intent = intents[int(rng.integers(len(intents)))]
        script = intent(hand, s)
        action = next(script)
        for _ in range(int(rng.integers(8, 40))):
            s = yield action
            action = script.send(s)


MODES: dict[str, Callable[[_Hand, Situation], Script]] = {
    "expert": _expert,
    "near_miss": _near_miss,
    "premature_close": _premature_close,
    "drop": _drop,
    "push": _push,
    "wander": _wander,
    "switch": _switch,
    "random": _random,
    "roam": _roam,
    "clumsy": _clumsy,
}
"""Mode name -> script. ``expert`` with a low competence fails in the ways that a bad policy does."""

CATEGORY_OF_FAILURE = {
    "expert": "near_miss",
    "near_miss": "near_miss",
    "premature_close": "near_miss",
    "drop": "near_miss",
    "push": "pushed",
    "wander": "random_walk",
    "switch": "switched",
    "random": "random_walk",
    "roam": "random_walk",
    "clumsy": "near_miss",
}
"""Mode -> category of an episode in which the cube was never up."""


class LiftScript:
    """One episode of the scripted policy.

    >>> script = LiftScript(ScriptedConfig("drop"), np.random.default_rng(0))  # doctest: +SKIP
    >>> action_A = script.act(simulation.privileged())  # doctest: +SKIP
    """

    def __init__(self, config: ScriptedConfig, rng: np.random.Generator) -> None:
        self._config = config
        self._rng = rng
        self._hand = _Hand(config, rng)
        self._script: Script | None = None
        self._drift = np.zeros(6)
        self._held = np.zeros(7)
        self._step = 0

    def act(self, privileged: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The next action (7,) float32 in [-1, 1], from the true state of one environment."""
        situation = Situation.from_privileged(privileged)
        if self._script is None:
            self._script = MODES[self._config.mode](self._hand, situation)
            wanted = next(self._script)
        else:
            wanted = self._script.send(situation)
        style, rng = self._hand.style, self._rng
        if style.burst_at <= self._step < style.burst_at + style.burst_steps:
            wanted = np.concatenate([rng.uniform(-1, 1, 6) * np.array([1, 1, 1, 0.5, 0.5, 0.5]), wanted[6:]])
        if self._step % style.hold == 0:
            self._held = wanted
        self._step += 1
        self._drift = 0.9 * self._drift + np.sqrt(1 - 0.81) * rng.standard_normal(6)
        action = self._held.copy()
        scale = np.array([1, 1, 1, 0.4, 0.4, 0.6])
        action[:6] += (style.white * rng.standard_normal(6) + style.drift * self._drift) * scale
        action[:3] += style.bias
        action[6] += 0.1 * style.white * rng.standard_normal()
        return np.clip(action, -1.0, 1.0).astype(np.float32)


class ScriptedLift:
    """The scripted policy for N environments, as a :class:`~hma_gym.policies.protocol.Policy`.

    It reads ``observation["privileged"]`` (arrays with N leading), which only ground truth has: make it
    with ``privileged_info=True`` and pass ``info["privileged"]`` along.

    Args:
        config: behaviour of every environment's policy.
        num_envs: N.
        seed: environment n's k-th episode draws from ``(seed, n, k)``.
    """

    def __init__(self, config: ScriptedConfig, num_envs: int = 1, seed: int = 0) -> None:
        self.config = config
        self.num_envs = num_envs
        self._seed = seed
        self._episode_N = np.full(num_envs, -1)
        self._scripts = [self._new_script(n) for n in range(num_envs)]

    def _new_script(self, n: int) -> LiftScript:
        self._episode_N[n] += 1
        return LiftScript(self.config, np.random.default_rng([self._seed, n, int(self._episode_N[n])]))

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Start a new episode's script where ``mask_N`` is true."""
        for n in np.flatnonzero(mask_N):
            self._scripts[n] = self._new_script(int(n))

    def act(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """Actions (N, 1, 7).

        Raises:
            InvalidArgument: the observation has no ``privileged`` entry.
        """
        if "privileged" not in observation:
            raise InvalidArgument(
                "the scripted policy needs observation['privileged'], which only ground truth has; got keys "
                f"{sorted(observation)}. In a learned env, replay recorded actions instead."
            )
        privileged = observation["privileged"]
        rows = [{key: value[n] for key, value in privileged.items()} for n in range(self.num_envs)]
        return np.stack([script.act(row) for script, row in zip(self._scripts, rows, strict=True)])[:, None]
