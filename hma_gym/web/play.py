"""Play: the learned robot under a hand on the keys, over one WebSocket.

The page sends JSON: ``{"type": "start", "start": 3 | null, "image": "..." | null, "truth": false}``,
``{"type": "action", "input": 17, "action": [7 numbers]}``, ``{"type": "pause"}``, ``{"type": "save"}``.
An action holds until the next one; the world runs at its own rate from the first action after a start or a pause, and a
new action does not wait for the tick. The app answers with JSON (``ready``, ``saved``, ``paused``, ``error``) and, for
each frame, one binary message: a little-endian uint32, that many bytes of JSON, then the RGB pixels of the learned
frame and, if MuJoCo runs beside, of the true one. ``input`` in it is that of the action which made the frame, so that
the page can measure the time from key to picture.

Shape legend: A numbers of an action, H W image.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import struct
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hma_gym.data.episodes import AttrValue
from hma_gym.envs.tasks import get_task
from hma_gym.envs.world import LearnedWorld, load_world
from hma_gym.errors import EnvironmentState, HMAError, InvalidArgument, UnknownName
from hma_gym.web.driving import (
    LearnedDrive,
    Look,
    TrueDrive,
    plain_env_args,
    read_picture,
    same_start,
    save_episode,
)
from hma_gym.web.kit import (
    BaseRoute,
    FileResponse,
    HTTPException,
    JSONResponse,
    Request,
    Response,
    Route,
    WebSocket,
    WebSocketDisconnect,
    WebSocketRoute,
    run_in_threadpool,
)
from hma_gym.web.requests import field, read_body
from hma_gym.web.serve import ServeConfig

_KEPT_PICTURES = 16
_RECORDINGS = {".hdf5": "application/x-hdf5", ".mp4": "video/mp4"}


class PlayRoom:
    """What all players share: the world, loaded when somebody first asks, and the pictures that were uploaded."""

    def __init__(self, config: ServeConfig) -> None:
        self.task = get_task(config.task)
        self.folder = config.data.resolve() / "play"
        self.places = asyncio.Semaphore(config.players)
        self.players = config.players
        self.upload_limit = int(config.upload_mb * 1e6)
        self._config = config
        self._lock = threading.Lock()
        self._world: LearnedWorld | None = None
        self._pictures: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()

    def world(self) -> LearnedWorld:
        """The learned world; the first call takes some seconds."""
        with self._lock:
            if self._world is None:
                torch.set_num_threads(self._config.threads)
                task = self._config.task if self._config.checkpoint is None else None
                self._world = load_world(task, self._config.checkpoint, None, None, None, None, None)
            return self._world

    def offers_truth(self) -> bool:
        """Whether MuJoCo can run beside."""
        installed = all(importlib.util.find_spec(name) is not None for name in ("mujoco", "robosuite"))
        return self._config.truth and installed and same_start(self.world())

    def keep_picture(self, content: bytes) -> str:
        """Decode an uploaded picture and keep it, with the last few others, under the name that is returned."""
        picture = read_picture(content, self.world().image_size)
        with self._lock:
            name = f"picture-{time.monotonic_ns():x}"
            self._pictures[name] = picture
            while len(self._pictures) > _KEPT_PICTURES:
                self._pictures.popitem(last=False)
            return name

    def picture(self, name: str) -> NDArray[np.uint8]:
        """A picture that was kept; :class:`UnknownName` if it is no longer there."""
        with self._lock:
            if name not in self._pictures:
                raise UnknownName("picture", name, list(self._pictures), "Upload it again.")
            return self._pictures[name]


def play_routes(room: PlayRoom) -> list[BaseRoute]:
    """The addresses of Play."""

    async def info(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(_info, room))

    async def start(request: Request) -> Response:
        content = await run_in_threadpool(_start_picture, room, request.path_params["index"])
        return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    async def upload(request: Request) -> Response:
        content = await read_body(request, room.upload_limit)
        return JSONResponse({"image": await run_in_threadpool(room.keep_picture, content)})

    async def recording(request: Request) -> Response:
        path = room.folder / request.path_params["name"]
        kind = _RECORDINGS.get(path.suffix)
        if kind is None or path.parent != room.folder or not path.is_file() or path.is_symlink():
            raise HTTPException(404, "there is no such recording; save the episode first.")
        return FileResponse(path, media_type=kind, filename=path.name)

    async def drive(websocket: WebSocket) -> None:
        await websocket.accept()
        if room.places.locked():
            reason = f"all {room.players} places to play are taken; wait, or serve with more --players."
            await websocket.send_json({"type": "error", "error": reason})
            await websocket.close()
            return
        async with room.places:
            await Player(room, websocket).run()

    return [
        Route("/info", info),
        Route("/starts/{index:int}", start),
        Route("/picture", upload, methods=["POST"]),
        Route("/recordings/{name}", recording),
        WebSocketRoute("/drive", drive),
    ]


def _info(room: PlayRoom) -> dict[str, Any]:
    world = room.world()
    return {
        "task": room.task.key,
        "checkpoint": world.checkpoint.name,
        "starts": len(world.bank),
        "height": world.image_size[0],
        "width": world.image_size[1],
        "rate": world.domain.control_hz / world.domain.stride,
        "actions": world.action_size,
        "truth": room.offers_truth(),
        "judge": None if world.judge is None else world.judge.name,
        "upload_mb": room.upload_limit / 1e6,
    }


def _start_picture(room: PlayRoom, index: int) -> bytes:
    frames_NHWC = room.world().bank.frames_NHWC
    if index >= len(frames_NHWC):
        raise UnknownName("start", index, [f"0 to {len(frames_NHWC) - 1}"])
    stream = io.BytesIO()
    Image.fromarray(frames_NHWC[index]).save(stream, format="PNG")
    return stream.getvalue()


class Player:
    """One WebSocket: reads what the page sends, and drives the worlds at their rate meanwhile."""

    def __init__(self, room: PlayRoom, websocket: WebSocket) -> None:
        self._room = room
        self._websocket = websocket
        self._learned: LearnedDrive | None = None
        self._truth: TrueDrive | None = None
        self._beside = False
        self._running = False
        self._started = ""
        self._action_A = np.zeros(0, np.float32)
        self._input = 0
        self._actions: list[NDArray[np.float32]] = []
        self._period = 0.05
        self._news = asyncio.Event()
        # A thread for each world: OpenGL contexts belong to theirs, and the two run at the same time.
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("learned", "truth")}
        # A start or a save does not fall between the halves of a step.
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Until the page goes away."""
        driving = asyncio.create_task(self._drive())
        try:
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    break
                if driving.done():  # it ends by itself at a fault only, which shall be seen
                    await driving
                await self._hear(message.get("text") or "")
        except WebSocketDisconnect:  # while something was being sent
            pass
        finally:
            driving.cancel()
            await asyncio.gather(driving, return_exceptions=True)
            if self._learned is not None:
                await self._in("learned", self._learned.close)
            if self._truth is not None:
                await self._in("truth", self._truth.close)
            for thread in self._threads.values():
                thread.shutdown(wait=False)

    async def _in(self, thread: str, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads[thread], function, *arguments)

    async def _hear(self, text: str) -> None:
        try:
            message = _read_message(text)
            kind = field(message, "type", str)
            if kind == "start":
                await self._start(message)
            elif kind == "action":
                self._act(message)
            elif kind == "pause":
                self._running = False
            elif kind == "save":
                await self._save()
            else:
                raise InvalidArgument(f"type must be one of start, action, pause and save, got {kind!r}.")
        except HMAError as error:
            await self._say("error", error=" ".join(str(error).split()))

    async def _say(self, kind: str, **values: Any) -> None:
        await self._websocket.send_json({"type": kind, **values})

    async def _start(self, message: dict[str, Any]) -> None:
        world = await run_in_threadpool(self._room.world)
        options, name, state_S = self._options(message, world)
        beside = message.get("truth") is True
        if beside and (state_S is None or not self._room.offers_truth()):
            raise InvalidArgument("truth must be false here: MuJoCo needs the extra sim and a start of the bank.")
        async with self._turn:
            self._running = False
            self._period = world.domain.stride / world.domain.control_hz
            if self._learned is None:
                self._learned = await self._in("learned", LearnedDrive, world)
            if beside and self._truth is None:
                self._truth = await self._in("truth", TrueDrive, self._room.task, world.image_size[0])
            seed = int(np.random.default_rng().integers(2**31))
            looks = [await self._in("learned", self._learned.start, options, seed)]
            if beside and self._truth is not None:
                looks.append(await self._in("truth", self._truth.start, state_S))
            self._beside, self._started, self._actions = beside, name, []
            self._action_A = np.zeros(world.action_size, np.float32)
            await self._say("ready", truth=beside, start=name)
            await self._send(looks, 0.0)

    def _options(
        self, message: dict[str, Any], world: LearnedWorld
    ) -> tuple[dict[str, Any], str, NDArray[np.float64] | None]:
        """Options of reset, a name for the start, and MuJoCo's state of it where it is known."""
        if message.get("image") is not None:
            name = field(message, "image", str)
            options: dict[str, Any] = {"image": self._room.picture(name)}
            return options | ({"agent_pos": "nearest"} if world.domain.state_dim else {}), name, None
        index = field(message, "start", int)
        if not 0 <= index < len(world.bank):
            raise InvalidArgument(f"start must lie in [0, {len(world.bank) - 1}], got {index}.")
        return {"start": index}, f"start-{index}", world.bank.states_NS[index] if same_start(world) else None

    def _act(self, message: dict[str, Any]) -> None:
        if self._learned is None:
            raise EnvironmentState("send start before action.")
        action_A = _read_action(field(message, "action", list), len(self._action_A))
        self._input = field(message, "input", int)
        self._action_A = action_A
        self._running = True
        self._news.set()

    async def _drive(self) -> None:
        """Step as long as the page drives; a new action wakes the sleep between two steps."""
        clock = asyncio.get_running_loop().time
        while True:
            if not self._running:
                self._news.clear()
                await self._news.wait()
            begun = clock()
            self._news.clear()
            try:
                async with self._turn:
                    if self._running:
                        await self._step()
            except HMAError as error:
                self._running = False
                await self._say("paused", error=" ".join(str(error).split()))
            except WebSocketDisconnect:
                return
            left = self._period - (clock() - begun)
            if left > 0 and self._running:
                try:
                    await asyncio.wait_for(self._news.wait(), left)
                except asyncio.TimeoutError:
                    pass

    async def _step(self) -> None:
        assert self._learned is not None
        action_A, number = self._action_A, self._input
        begun = time.perf_counter()
        steps = [self._in("learned", self._learned.step, action_A)]
        if self._beside and self._truth is not None:
            steps.append(self._in("truth", self._truth.step, action_A))
        looks = await asyncio.gather(*steps)
        self._actions.append(action_A)
        await self._send(looks, time.perf_counter() - begun, number)

    async def _send(self, looks: list[Look], seconds: float, number: int = 0) -> None:
        header = {
            "step": len(self._actions),
            "input": number,
            "ms": round(1000 * seconds, 1),
            "worlds": [
                {
                    "success": look.success,
                    "probability": look.probability,
                    "agent_pos": [round(float(x), 4) for x in look.agent_pos_P],
                }
                for look in looks
            ],
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        pixels = b"".join(np.ascontiguousarray(look.frame_HWC).tobytes() for look in looks)
        await self._websocket.send_bytes(struct.pack("<I", len(text)) + text + pixels)

    async def _save(self) -> None:
        async with self._turn:
            if self._learned is None:
                raise EnvironmentState("send start before save.")
            world = await run_in_threadpool(self._room.world)
            truth = self._truth if self._beside else None
            attrs: dict[str, AttrValue] = {
                "policy": "human",
                "mode": "play",
                "start": self._started,
                "checkpoint": world.checkpoint.name,
            }
            actions_TA = np.stack(self._actions) if self._actions else np.zeros((0, world.action_size), np.float32)
            files = await run_in_threadpool(
                save_episode,
                self._room.folder,
                _free_name(self._room.folder),
                self._learned.track,
                truth.track if truth is not None else None,
                actions_TA,
                attrs=attrs,
                env_args=truth.env_args if truth is not None else plain_env_args(self._room.task),
                fps=1 / self._period,
            )
        await self._say("saved", files=[path.name for path in files], folder=str(self._room.folder))


def _free_name(folder: Path) -> str:
    """A name by the time, and a number where that second has one already."""
    stem = time.strftime("play_%Y%m%d_%H%M%S")
    name, number = stem, 1
    while (folder / f"{name}.hdf5").exists():
        number += 1
        name = f"{stem}_{number}"
    return name


def _read_message(text: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"a message must be a JSON object, got {text[:80]!r}: {error}.") from error
    if not isinstance(message, dict):
        raise InvalidArgument(f"a message must be a JSON object, got {type(message).__name__}.")
    return message


def _read_action(values: list[Any], size: int) -> NDArray[np.float32]:
    numbers = all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9 for value in values
    )
    action_A = np.array(values, dtype=np.float32) if numbers else np.zeros(0, np.float32)
    if action_A.shape != (size,) or not np.isfinite(action_A).all():
        raise InvalidArgument(f"action must be {size} finite numbers in [-1, 1], got {values!r:.120}.")
    return np.clip(action_A, -1.0, 1.0)
