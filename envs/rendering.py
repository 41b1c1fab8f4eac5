"""Off-screen images of a MuJoCo model: one persistent OpenGL context per model and size.

robosuite's own image path builds the scene for every camera read, flips images and costs twice as
much. Here a frame is drawn at twice the asked size without multisampling and averaged down 2 x 2, which
gives the same anti-aliasing on every driver. Only visual geoms are drawn, and only those in view.
"""

from __future__ import annotations

import atexit
import os
import weakref
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import MissingExtra, RenderingUnavailable
from hma_gym.extras import require

SUPERSAMPLE = 2
_VISUAL_GEOM_GROUP = 1  # robosuite puts collision geoms in group 0 and visual geoms in group 1
_HIDDEN_GEOM_GROUP = 5
_REMEDY = (
    "On Debian or Ubuntu without a GPU: apt-get install libegl1 libgl1-mesa-dri (software rendering, MUJOCO_GL=egl), "
    "or apt-get install libosmesa6 and set MUJOCO_GL=osmesa. On a headless NVIDIA machine: install the driver's EGL "
    "library (libnvidia-gl-<version>; in a container set NVIDIA_DRIVER_CAPABILITIES=all) and set MUJOCO_EGL_DEVICE_ID "
    "to a GPU that is visible."
)


def import_mujoco() -> ModuleType:
    """Import mujoco, with settings for where the user chose nothing.

    ``MUJOCO_GL=egl`` needs no display. ``LP_NUM_THREADS=0`` keeps Mesa's software renderer free of threads: frames
    this small gain nothing from them, and a forked process (``AsyncVectorEnv``) hangs without them.

    Raises:
        MissingExtra: mujoco is not installed.
        RenderingUnavailable: the OpenGL library named by ``MUJOCO_GL`` does not load.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "0")
    try:
        return require("mujoco", extra="sim", purpose="the ground-truth environments")
    except (AttributeError, OSError, RuntimeError) as error:
        raise _unavailable(error) from error


def _unavailable(error: BaseException) -> RenderingUnavailable:
    return RenderingUnavailable(
        f"MuJoCo cannot make an OpenGL context with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} "
        f"({type(error).__name__}: {error}). {_REMEDY}"
    )


_unforkable_in: int | None = None  # process that uses an OpenGL which does not survive a fork


def _make_context(size: int) -> Any:
    """A current OpenGL context. mujoco's own choice is fixed when it is first imported; this one asks now."""
    global _unforkable_in
    if _unforkable_in not in (None, os.getpid()):
        raise RenderingUnavailable(
            "this process was forked from one that had rendered, and this machine's OpenGL does not survive that; "
            "start the workers with 'spawn', e.g. gymnasium.make_vec(..., vector_kwargs={'context': 'spawn'})."
        )
    backend = os.environ.get("MUJOCO_GL", "").lower() or "egl"
    modules = {"egl": "mujoco.egl", "osmesa": "mujoco.osmesa", "glfw": "mujoco.glfw"}
    if backend not in modules:
        raise RenderingUnavailable(
            f"MUJOCO_GL must be one of {sorted(modules)}, got {backend!r}; unset it to render without a display (egl)."
        )
    try:
        kind = require(modules[backend], extra="sim", purpose="rendering").GLContext
        context = kind.__new__(kind)
        context._context = None  # else its __del__ complains on stderr where __init__ fails
        context.__init__(size, size)
        context.make_current()
    except MissingExtra:
        raise
    # The backends raise what ctypes and PyOpenGL happen to raise; PyOpenGL's own errors derive from Exception only.
    except Exception as error:
        raise _unavailable(error) from error
    gl = require("OpenGL.GL", extra="sim", purpose="rendering")
    if b"llvmpipe" not in gl.glGetString(gl.GL_RENDERER) or os.environ.get("LP_NUM_THREADS") != "0":
        _unforkable_in = os.getpid()
    return context


def _close_at_exit(reference: weakref.ref[CameraRenderer]) -> None:
    renderer = reference()
    if renderer is not None:
        renderer.close()


class CameraRenderer:
    """Draws one camera of one model at one size.

    Args:
        model: ``mujoco.MjModel``.
        camera: name of a camera in the model.
        size: height and width of the frames in pixels.

    Raises:
        RenderingUnavailable: no OpenGL context can be made; the message says what to install.
    """

    def __init__(self, model: Any, camera: str, size: int) -> None:
        self._mujoco = mujoco = import_mujoco()
        self.size = size
        self._model = model
        drawn = size * SUPERSAMPLE
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(int(model.vis.global_.offwidth), drawn)
        model.vis.global_.offheight = max(int(model.vis.global_.offheight), drawn)
        self._context = _make_context(drawn)
        try:
            self._resources = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        except mujoco.FatalError as error:
            self._context.free()
            raise _unavailable(error) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._resources)
        self._viewport = mujoco.MjrRect(0, 0, drawn, drawn)
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = 0
        self._options.geomgroup[_VISUAL_GEOM_GROUP] = 1
        self._options.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = model.camera(camera).id
        self._drawn = np.empty((drawn, drawn, 3), dtype=np.uint8)
        self._closed = False
        # Left to the interpreter's exit, the context would be freed after the display that it lives on.
        atexit.register(_close_at_exit, weakref.ref(self))

    def render(self, data: Any) -> NDArray[np.uint8]:
        """Draw ``data`` (``mujoco.MjData`` with current kinematics): a fresh (size, size, 3) array, upright."""
        mujoco = self._mujoco
        groups = self._model.geom_group.copy()
        self._model.geom_group[self._out_of_view(data)] = _HIDDEN_GEOM_GROUP
        mujoco.mjv_updateScene(
            self._model, data, self._options, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        self._model.geom_group[:] = groups
        self._context.make_current()
        mujoco.mjr_render(self._viewport, self._scene, self._resources)
        mujoco.mjr_readPixels(self._drawn, None, self._viewport, self._resources)
        k, n = SUPERSAMPLE, self.size
        total = self._drawn.reshape(n, k, n, k, 3).sum(axis=(1, 3), dtype=np.uint16)
        frame: NDArray[np.uint8] = ((total[::-1] + k * k // 2) // (k * k)).astype(np.uint8)
        return frame  # the right way up: OpenGL counts rows from the bottom

    def _out_of_view(self, data: Any) -> NDArray[np.bool_]:
        """Geoms whose bounding sphere lies outside the square view: two thirds of a Panda's mesh faces."""
        model, camera = self._model, self._camera.fixedcamid
        axes = data.cam_xmat[camera].reshape(3, 3)  # x right, y up, -z ahead
        local = (data.geom_xpos - data.cam_xpos[camera]) @ axes
        ahead, radius = -local[:, 2], model.geom_rbound
        half = np.deg2rad(model.cam_fovy[camera]) / 2
        beside = np.abs(local[:, :2]) * np.cos(half) - ahead[:, None] * np.sin(half) > radius[:, None]
        bounded = radius > 0  # planes have radius 0
        return np.asarray(bounded & (beside.any(axis=1) | (ahead < -radius)))

    def close(self) -> None:
        """Free the OpenGL context. Calling it twice is harmless."""
        if not self._closed:
            self._closed = True
            self._context.make_current()
            self._resources.free()
            self._context.free()
