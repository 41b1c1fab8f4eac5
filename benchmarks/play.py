"""Play in a real browser: generated frames a second, and the time from a key press to the changed picture.

    hma-gym bench play

Starts ``hma-gym serve`` and a headless Chromium that drives the robot by keys, as a person would, and reads the page's
own clocks: a press counts from the key event's time stamp until after the animation frame in which the first frame
made with its action was drawn. Takes about a minute on two idle CPU cores; needs Chromium, the extra ``web`` and
playwright (extra ``dev``). Writes ``<out>/play.json``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hma_gym.data.robomimic_hdf5 import write_atomically
from hma_gym.errors import InvalidArgument, MissingExtra, StorageError
from hma_gym.evaluation.provenance import provenance
from hma_gym.extras import require
from hma_gym.metrics.statistics import Interval, bootstrap_interval

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
KEYS = ("d", "a", "r", "f", "w", "s")


@dataclass(frozen=True)
class PlayConfig:
    """One run of the benchmark.

    Attributes:
        presses: measured key presses, after the warm-up.
        hold_ms: how long each key is held, and as long a pause follows.
        warm_up: presses that do not count.
        checkpoint: name, folder or hub id.
        threads: CPU threads of the learned world.
        truth: whether MuJoCo runs beside.
        out: folder of the result.
    """

    presses: int = 60
    hold_ms: int = 400
    warm_up: int = 5
    checkpoint: str | None = None
    threads: int = 1
    truth: bool = False
    out: Path = Path("outputs/bench")

    def __post_init__(self) -> None:
        if self.presses < 2 or self.warm_up < 0 or self.hold_ms < 1:
            raise InvalidArgument(
                "presses must be at least 2, warm_up at least 0 and hold_ms at least 1, got "
                f"presses={self.presses}, warm_up={self.warm_up}, hold_ms={self.hold_ms}."
            )


def play(config: PlayConfig) -> Path:
    """Measure, print and write; returns the file."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise MissingExtra("no Chromium was found for the benchmark; on Debian and Ubuntu: apt-get install chromium")
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hma_gym.cli", "serve", "--data", folder, "--port", "0"]
        command += ["--threads", str(config.threads), "--truth" if config.truth else "--no-truth"]
        command += ["--checkpoint", config.checkpoint] if config.checkpoint is not None else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                line = server.stdout.readline()
                address = re.search(r"http://\S+", line)
                if address is None:
                    raise StorageError(f"hma-gym serve did not start: {line!r}; run it by hand to see why.")
                clocks = _drive(found, address.group(), config)
            finally:
                server.kill()
    latencies = np.array(clocks["latencies"][-config.presses :])
    gaps = np.diff(np.array(clocks["arrivals"]))
    rate = 1000 / float(np.mean(gaps))
    latency = bootstrap_interval(latencies, statistic=np.median)
    result: dict[str, Any] = {
        "config": {**asdict(config), "out": str(config.out)},
        "frames_a_second": rate,
        "frames": len(gaps) + 1,
        "key_to_picture_ms": {**asdict(latency), "p90": float(np.quantile(latencies, 0.9)), "presses": len(latencies)},
        "load_average_before": load_before,
        "provenance": provenance(torch.device("cpu")),
    }
    _say(rate, latency, load_before)
    path = config.out / "play.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
    return path


def _drive(browser: str, address: str, config: PlayConfig) -> dict[str, list[float]]:
    """The page's clocks after all presses: latencies (ms) and times of arrival (ms) while driving."""
    api = require("playwright.sync_api", extra="dev", purpose="driving the browser")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        page.goto(f"{address}play")
        page.wait_for_selector("#play:not([hidden])")
        if config.truth:
            page.check("#beside")
            page.wait_for_selector("#truthfigure:not([hidden])")
        for number in range(config.warm_up + config.presses):
            if number == config.warm_up:
                page.evaluate("window.hmaPlay.arrivals.length = window.hmaPlay.latencies.length = 0")
            key = KEYS[number % len(KEYS)]
            page.keyboard.down(key)
            page.wait_for_timeout(config.hold_ms)
            page.keyboard.up(key)
            page.wait_for_timeout(config.hold_ms)
        clocks: dict[str, list[float]] = json.loads(page.evaluate("JSON.stringify(window.hmaPlay)"))
        chromium.close()
    return clocks


def _say(rate: float, latency: Interval, load: tuple[float, float, float]) -> None:
    print(f"{rate:.1f} frames a second in the browser")
    print(f"key press to changed picture: median {latency.value:.0f} ms ({latency.low:.0f} to {latency.high:.0f})")
    print(f"load of the machine before: {load[0]:.1f} on {os.cpu_count()} CPUs")
