import base64

import numpy as np
import pytest

from gptjax.explore.pictures import MOST_COLUMNS, STEPS, picture


def decoded(found):
    cells = np.frombuffer(base64.b64decode(found.cells), np.int8)
    return cells.reshape(found.rows, found.columns) / STEPS * found.largest


def test_a_picture_holds_the_array_to_a_step():
    x = np.linspace(-1, 1, 12).reshape(3, 4)
    found = picture(x)
    assert (found.rows, found.columns, found.shape) == (3, 4, (3, 4))
    np.testing.assert_allclose(
        decoded(found), np.clip(x, -found.largest, found.largest), atol=found.largest / STEPS
    )
    assert found.norm == pytest.approx(np.linalg.norm(x))


def test_a_cell_of_many_shows_the_largest():
    x = np.zeros((2, 4 * MOST_COLUMNS))
    x[1, 9] = -5
    found = picture(x)
    assert found.columns == MOST_COLUMNS
    assert decoded(found)[1, 2] == -found.largest < 0
    assert np.count_nonzero(decoded(found)) == 1


@pytest.mark.parametrize(
    ("shape", "grid"), [((5,), (1, 5)), ((), (1, 1)), ((8, 2, 4), (8, 8)), ((2, 4, 8), (8, 8))]
)
def test_axes_are_split_into_rows_and_columns(shape, grid):
    found = picture(np.ones(shape))
    assert (found.rows, found.columns) == grid


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_what_has_no_scale_is_blank(value):
    assert not np.frombuffer(base64.b64decode(picture(np.full((2, 2), value)).cells), np.int8).any()
