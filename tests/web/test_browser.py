"""The pages in a real headless Chromium, by keys and clicks, over a real server."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from web_serving import Server, make_queue, make_report, serving

from hma_gym.judges.human import LabelQueue

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.browser
PATIENCE_MS = 120_000  # for machines with much else to do; waiting ends as soon as the thing is there
ITEMS = 42


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A queue for two people, and the learned Lift that ships with the package."""
    data = tmp_path_factory.mktemp("browsed")
    make_queue(data / "labels", ITEMS, overlap=2)
    make_report(data / "evaluation")
    with serving(data, "--threads", "1", "--no-truth") as running:
        yield running


def open_page(browser: Browser, address: str, width: int = 1280) -> Page:
    """A page of its own (its own storage), which fails the test on any error of its scripts."""
    context = browser.new_context(viewport={"width": width, "height": 800}, has_touch=width < 500)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(address)
    return page


def open_play(page: Page, address: str) -> None:
    """Go to Play and wait until the world is there, or say why it is not."""
    page.goto(f"{address}/play")
    page.wait_for_selector("#play:not([hidden]), #notice:not([hidden])")
    assert not page.inner_text("#notice"), page.inner_text("#notice")


def says(page: Page, place: str, text: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator(place)).to_have_text(re.compile(text), timeout=PATIENCE_MS)


def plays(page: Page) -> None:
    """The video runs at some time: it also rests at its end, and starts again."""
    for _ in range(PATIENCE_MS // 70):
        if not page.locator("#video").evaluate("video => video.paused"):
            return
        page.wait_for_timeout(70)
    pytest.fail("the video does not play")


def enter(browser: Browser, server: Server, name: str, width: int = 1280) -> Page:
    page = open_page(browser, f"{server.address}/label", width)
    page.fill("#name", name)
    page.click("#enter button")
    page.wait_for_selector("#work:not([hidden])")
    return page


def outcomes_of(server: Server, name: str) -> list[str]:
    with LabelQueue.open(server.data / "labels") as queue:
        return [found.verdicts[name] for found in queue.outcomes().values() if name in found.verdicts]


def fits(page: Page) -> bool:
    """Whether nothing makes the page scroll sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


def test_thirty_videos_by_keyboard_with_undo_reload_and_a_second_person(browser: Browser, labelled: Server) -> None:
    ana, bob = enter(browser, labelled, "ana"), enter(browser, labelled, "bob")
    given = [("s", "success"), ("f", "failure"), ("u", "unsure")]
    for i in range(30):
        key, _ = given[i % 3]
        ana.keyboard.press(key)
        says(ana, "#count", f"^{i + 1} judged")
        if i < 5:
            bob.keyboard.press("f")
            says(bob, "#count", f"^{i + 1} judged")
        if i == 9:  # a mistake: taken back, and judged again
            ana.keyboard.press("z")
            says(ana, "#count", "^9 judged")
            ana.keyboard.press(key)
            says(ana, "#count", "^10 judged")
        if i == 19:
            before = ana.get_attribute("#video", "data-item")
            ana.reload()
            ana.wait_for_selector("#work:not([hidden])")
            says(ana, "#count", "^20 judged")
            assert ana.get_attribute("#video", "data-item") == before, "a reload goes on where it was"
    assert "a minute" in ana.inner_text("#pace") and fits(ana)
    assert sorted(outcomes_of(labelled, "ana")) == sorted(verdict for _, verdict in given * 10)
    assert outcomes_of(labelled, "bob") == ["failure"] * 5
    source = ana.evaluate("(async () => (await (await fetch('/api/queues')).json()).length)()")
    assert source == 1 and "secret-policy" not in ana.content()
    for page in (ana, bob):
        page.context.close()


def test_the_video_pauses_and_steps(browser: Browser, labelled: Server) -> None:
    page = enter(browser, labelled, "stepper")
    says(page, "#frame", r"^\d / 6$")
    page.keyboard.press("ArrowLeft")
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    says(page, "#frame", "^1 / 6$")
    page.keyboard.press("ArrowRight")
    says(page, "#frame", "^2 / 6$")
    page.keyboard.press(" ")
    plays(page)
    page.context.close()


def test_a_video_that_is_stepped_before_it_is_there_stays_where_it_is(browser: Browser, labelled: Server) -> None:
    page = open_page(browser, f"{labelled.address}/label")
    held: list[Route] = []
    page.route("**/videos/*", lambda route: held.append(route))  # they are on their way until we let them go
    page.fill("#name", "hasty")
    page.click("#enter button")
    page.wait_for_selector("#work:not([hidden])")
    while not held:
        page.wait_for_timeout(50)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.unroute("**/videos/*")  # which also lets go those that are held
    video = page.locator("#video")
    while video.evaluate("video => video.readyState") < 2:
        page.wait_for_timeout(50)
    page.wait_for_timeout(1200)  # longer than it takes to play to its end, and to start again
    assert video.evaluate("video => video.paused && !video.ended")
    says(page, "#frame", "^3 / 6$")
    page.keyboard.press(" ")
    plays(page)
    page.context.close()


def test_the_grid_on_a_phone(browser: Browser, labelled: Server) -> None:
    page = enter(browser, labelled, "eve", width=390)
    page.click("#many")
    page.wait_for_selector(".tile:nth-child(3)")
    tiles = page.locator(".tile")
    count = tiles.count()
    tiles.nth(0).click()  # success
    tiles.nth(1).click()
    tiles.nth(1).click()  # failure
    page.click("#rest")
    page.click("#save")
    says(page, "#saved", f"{count} verdicts saved")
    said = outcomes_of(labelled, "eve")
    assert sorted(said) == ["failure"] * (count - 1) + ["success"] and fits(page)
    page.keyboard.press("z")
    says(page, "#saved", f"{count} verdicts taken back")
    assert outcomes_of(labelled, "eve") == []
    page.context.close()


def test_a_verdict_that_was_not_saved_is_not_shown_as_saved(browser: Browser, tmp_path: Path) -> None:
    make_queue(tmp_path, 3)
    with serving(tmp_path) as server:
        page = enter(browser, server, "ana")
        before = page.get_attribute("#video", "data-item")
        server.kill()
        page.keyboard.press("s")
        says(page, "#notice", "does not answer")
        assert page.get_attribute("#video", "data-item") == before and "✓" not in page.inner_text("#saved")
        page.context.close()


def test_reports_are_listed_and_open(browser: Browser, labelled: Server) -> None:
    page = open_page(browser, f"{labelled.address}/reports", width=390)
    page.wait_for_selector("#queues table")
    assert fits(page)
    page.click("text=Toy report")
    page.wait_for_url("**/report.html")
    assert page.title() == "Toy report"
    open_play(page, labelled.address)
    assert page.locator(".starts button").count() > 10 and fits(page), "many starts scroll in a strip of their own"
    page.context.close()


def header(page: Page) -> Any:
    """What came with the last frame; None before the first."""
    return json.loads(page.evaluate("JSON.stringify(window.hmaPlay.header)"))


def drive(page: Page, key: str, steps: int) -> list[float]:
    """Hold a key for some steps; where the hand is afterwards."""
    until = header(page)["step"] + steps
    page.keyboard.down(key)
    while header(page)["step"] < until:
        page.wait_for_timeout(20)
    page.keyboard.up(key)
    position: list[float] = header(page)["worlds"][0]["agent_pos"][:3]
    return position


def test_keys_drive_the_arm_the_right_way_and_a_picture_starts_an_episode(browser: Browser, labelled: Server) -> None:
    page = open_page(browser, labelled.address)
    open_play(page, labelled.address)
    says(page, "#state", "Press a key")
    while header(page) is None:
        page.wait_for_timeout(20)
    start = header(page)["worlds"][0]["agent_pos"][:3]
    right = drive(page, "d", 6)
    assert right[1] - start[1] > 0.02, "right in the picture is +y"
    left = drive(page, "ArrowLeft", 10)
    assert left[1] < right[1] - 0.02
    down = drive(page, "f", 6)
    assert down[2] < left[2] - 0.015
    shown = page.evaluate("document.getElementById('learned').toDataURL()")
    assert page.inner_text("#latency").endswith("ms") and fits(page)
    page.click("#saveepisode")
    says(page, "#recordings", "HDF5.*mp4")
    picture = Image.new("RGB", (300, 200), (30, 160, 60))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG")
    page.set_input_files("#file", {"name": "mine.jpg", "mimeType": "image/jpeg", "buffer": stream.getvalue()})
    page.wait_for_selector('.starts button[title="Your picture"][aria-pressed="true"]')
    while header(page)["step"] != 0 or page.evaluate("document.getElementById('learned').toDataURL()") == shown:
        page.wait_for_timeout(50)
    pixels = page.evaluate("[...document.getElementById('learned').getContext('2d').getImageData(0, 0, 1, 1).data]")
    assert np.abs(np.array(pixels[:3]) - (30, 160, 60)).max() < 8, "the picture is the first frame"
    page.set_input_files("#file", {"name": "not.png", "mimeType": "image/png", "buffer": b"no picture"})
    says(page, "#notice", "PNG, JPEG or WebP")
    page.context.close()


def test_the_benchmark_reads_the_clocks_of_the_page(toy_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: playwright's plain API runs once in each."""
    options = ("--presses", "2", "--hold-ms", "150", "--warm-up", "1", "--checkpoint", str(toy_folder))
    command = [sys.executable, "-m", "hma_gym.cli", "bench", "play", *options, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "frames a second in the browser" in done.stdout, done.stderr
    result = json.loads((tmp_path / "play.json").read_text())
    assert result["frames"] >= 2 and result["frames_a_second"] > 0
    measured = result["key_to_picture_ms"]
    assert measured["presses"] >= 1 and 0 < measured["low"] <= measured["value"] <= measured["high"]
