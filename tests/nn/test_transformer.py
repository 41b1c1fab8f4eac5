"""The trunk with a cache equals the trunk without one, however long, for rows at any step, after any shuffling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hma_gym.errors import InvalidArgument
from hma_gym.nn.transformer import Cache, SpaceTimeTransformer, TrunkConfig

WINDOW = 4
TINY = TrunkConfig(layers=2, width=32, heads=2, window=WINDOW, mlp_ratio=2.0)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _trunk(config: TrunkConfig) -> SpaceTimeTransformer:
    torch.manual_seed(0)
    trunk = SpaceTimeTransformer(config)
    for parameter in trunk.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return trunk.eval().requires_grad_(False)


def _clip(config: TrunkConfig, rows: int, frames: int, tokens: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, frames, tokens, config.width, generator=generator)
    modulation = 0.3 * torch.randn(
        rows, frames, config.layers, config.modulation_vectors, config.width, generator=generator
    )
    return x, modulation


def _step_by_step(
    trunk: SpaceTimeTransformer, x: Tensor, modulation: Tensor, in_place: bool = False
) -> tuple[Tensor, Cache]:
    cache = trunk.new_cache(len(x), x.shape[2], x.device, x.dtype)
    shown = []
    for t in range(x.shape[1]):
        y, cache = trunk.extend(x[:, t : t + 1], modulation[:, t : t + 1], cache, 1, in_place)
        shown.append(y)
    return torch.cat(shown, dim=1), cache


@pytest.mark.parametrize("modulation", ["adaln", "residual"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("frames", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_cached_equals_uncached(modulation: str, rows: int, frames: int) -> None:
    config = dataclasses.replace(TINY, modulation=modulation)  # type: ignore[arg-type]
    trunk = _trunk(config)
    x, m = _clip(config, rows, frames)
    torch.testing.assert_close(_step_by_step(trunk, x, m)[0], trunk(x, m), **TOLERANCE)


@pytest.mark.parametrize(("how", "frames"), [("fused", 100), ("matmul", 501)])
def test_cached_equals_uncached_in_long_rollouts(how: str, frames: int) -> None:
    trunk = _trunk(dataclasses.replace(TINY, attention=how))  # type: ignore[arg-type]
    x, m = _clip(TINY, 2, frames)
    torch.testing.assert_close(_step_by_step(trunk, x, m, in_place=True)[0], trunk(x, m), **TOLERANCE)


def test_the_window_ends_the_memory_of_one_layer() -> None:
    config = dataclasses.replace(TINY, layers=1)
    trunk = _trunk(config)
    x, m = _clip(config, 1, 10)
    before = trunk(x, m)
    x[:, 3] = x[:, 3].flip(-1)
    changed = (trunk(x, m) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert changed.tolist() == [3 <= t < 3 + WINDOW for t in range(10)]


def test_rows_at_different_steps_in_one_batch() -> None:
    """Rows that were reset at different times, mixed from two caches, go on as if each had run alone."""
    trunk = _trunk(TINY)
    x, m = _clip(TINY, 2, 20)
    _, old = _step_by_step(trunk, x[:, :9], m[:, :9])
    _, young = _step_by_step(trunk, x[:, :2], m[:, :2])
    mixed = Cache(*(torch.stack((getattr(old, f)[0], getattr(young, f)[1])) for f in _FIELDS))
    offset = torch.tensor([9, 2])
    for step in range(6):
        at = offset + step
        rows = torch.arange(2)
        y, mixed = trunk.extend(x[rows, at][:, None], m[rows, at][:, None], mixed, 1)
        for row in range(2):
            wanted = trunk(x[row : row + 1, : at[row] + 1], m[row : row + 1, : at[row] + 1])
            torch.testing.assert_close(y[row], wanted[0, -1:], **TOLERANCE)


_FIELDS = [field.name for field in dataclasses.fields(Cache)]


def test_selected_and_forked_rows_go_on_alike() -> None:
    trunk = _trunk(TINY)
    x, m = _clip(TINY, 3, 8)
    _, cache = _step_by_step(trunk, x[:, :7], m[:, :7])
    index = torch.tensor([2, 0, 0, 1])
    picked = Cache(*(getattr(cache, f)[index] for f in _FIELDS))
    y, _ = trunk.extend(x[index, 7:], m[index, 7:], picked, 1)
    torch.testing.assert_close(y, trunk(x, m)[index, 7:], **TOLERANCE)


@pytest.mark.parametrize("past", [0, 1, WINDOW - 1, WINDOW, 2 * WINDOW + 1])
def test_several_new_frames_at_once(past: int) -> None:
    trunk = _trunk(TINY)
    x, m = _clip(TINY, 2, past + 5)
    wanted = trunk(x, m)
    _, cache = _step_by_step(trunk, x[:, :past], m[:, :past]) if past else (None, _empty(trunk, x))
    y, after = trunk.extend(x[:, past : past + 2], m[:, past : past + 2], cache, 2)
    torch.testing.assert_close(y, wanted[:, past : past + 2], **TOLERANCE)
    # commit the first of two, as in-place conditioning does, and go on from there
    y, after = trunk.extend(x[:, past + 2 : past + 4], m[:, past + 2 : past + 4], after, 1)
    torch.testing.assert_close(y, wanted[:, past + 2 : past + 4], **TOLERANCE)
    assert after.step_B.tolist() == [past + 3] * 2
    y, _ = trunk.extend(x[:, past + 3 : past + 5], m[:, past + 3 : past + 5], after, 0)
    torch.testing.assert_close(y, wanted[:, past + 3 :], **TOLERANCE)


def _empty(trunk: SpaceTimeTransformer, x: Tensor) -> Cache:
    return trunk.new_cache(len(x), x.shape[2], x.device, x.dtype)


def test_committing_more_frames_than_the_window_holds_keeps_the_last() -> None:
    trunk = _trunk(TINY)
    x, m = _clip(TINY, 2, 12)
    y, cache = trunk.extend(x[:, :11], m[:, :11], _empty(trunk, x), 11)
    torch.testing.assert_close(y, trunk(x[:, :11], m[:, :11]), **TOLERANCE)
    y, _ = trunk.extend(x[:, 11:], m[:, 11:], cache, 1)
    torch.testing.assert_close(y, trunk(x, m)[:, 11:], **TOLERANCE)


def test_in_place_equals_copy_and_copies_leave_the_old_state_alone() -> None:
    trunk = _trunk(TINY)
    x, m = _clip(TINY, 2, 7)
    _, cache = _step_by_step(trunk, x[:, :6], m[:, :6])
    kept = Cache(*(getattr(cache, f).clone() for f in _FIELDS))
    y_copy, after_copy = trunk.extend(x[:, 6:], m[:, 6:], cache, 1)
    assert all(torch.equal(getattr(cache, f), getattr(kept, f)) for f in _FIELDS)
    assert after_copy.keys_BLWND.data_ptr() != cache.keys_BLWND.data_ptr()
    y_in_place, after_in_place = trunk.extend(x[:, 6:], m[:, 6:], cache, 1, in_place=True)
    assert torch.equal(y_copy, y_in_place)
    assert all(torch.equal(getattr(after_copy, f), getattr(after_in_place, f)) for f in _FIELDS)
    assert after_in_place.keys_BLWND.data_ptr() == cache.keys_BLWND.data_ptr()


def test_residual_stream_keeps_its_size_with_depth() -> None:
    """Initialisation: writes to the stream are scaled by sqrt(2 L), so that depth does not blow it up."""
    sizes = []
    for layers in (2, 16):
        config = TrunkConfig(layers=layers, width=64, heads=4, window=4)
        torch.manual_seed(0)
        x, m = _clip(config, 1, 4)
        with torch.no_grad():
            sizes.append(float((SpaceTimeTransformer(config)(x, 0 * m) - x).std()))
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize(
    "fields", [{"width": 30}, {"layers": 0}, {"window": 0}, {"modulation": "film"}, {"positions": "sine"}]
)
def test_wrong_geometry_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="trunk: "):
        TrunkConfig(**fields)  # type: ignore[arg-type]
