"""Sheets of film strips hold the frames they are given, where they are expected."""

from __future__ import annotations

import numpy as np
import pytest

from hma_gym.errors import InvalidImage
from hma_gym.evaluation.strips import GAP, MARGIN, Panel, Strip, draw_sheet


def _strip(value: int, columns: int = 3) -> Strip:
    return Strip("name", np.full((columns, 8, 8, 3), value, dtype=np.uint8))


def test_frames_are_where_they_belong() -> None:
    sheet = np.asarray(
        draw_sheet([Panel("one", (_strip(10), _strip(200)))], ["0", "1", "2"], title="t", scale=2.0, label_width=50)
    )
    assert sheet.shape[1] == 2 * MARGIN + 50 + 3 * (16 + GAP)
    column = sheet[:, MARGIN + 50 + 16 + GAP + 8, 0]
    assert (column == 10).sum() == 16 and (column == 200).sum() == 16
    assert np.argmax(column == 10) < np.argmax(column == 200)


def test_strips_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidImage, match="same rows for all"):
        draw_sheet([Panel("one", (_strip(10), _strip(10, columns=2)))], ["0", "1", "2"])
    with pytest.raises(InvalidImage, match="at least one strip"):
        draw_sheet([], ["0"])
