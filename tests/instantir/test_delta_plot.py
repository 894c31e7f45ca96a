"""The plot of delta: a line where delta is, one for each picture."""

import pytest
import torch
from fourfold.nodes.instantir.delta_plot import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, delta_plot


def columns(plot, colour):
    """For each column of pixels the mean height in 0..1 (0 = the axis) at which `colour` is drawn, NaN where not."""
    found = ((plot[0] - torch.tensor(colour)[:, None, None] / 255).abs() < 0.01).all(dim=0).double()
    rows = torch.arange(HEIGHT, dtype=torch.float64)[:, None]
    return (HEIGHT - BOTTOM - (found * rows).sum(0) / found.sum(0)) / (HEIGHT - BOTTOM - TOP)


def test_the_line_follows_delta():
    plot = delta_plot(torch.linspace(0, 1, 11)[:, None])
    assert plot.shape == (1, 3, HEIGHT, WIDTH) and plot.min() >= 0 and plot.max() <= 1
    heights = columns(plot, COLOURS[0])
    for step in (1, 5, 9):
        x = round(LEFT + step / 10 * (WIDTH - LEFT - RIGHT))
        assert heights[x] == pytest.approx(step / 10, abs=0.03)


def test_every_picture_has_its_line_and_what_is_above_one_fits_in():
    plot = delta_plot(torch.tensor([[0.2, 1.0], [0.2, 4.0], [0.2, 2.0]]))
    low, high = (columns(plot, colour) for colour in COLOURS[:2])
    middle = round((LEFT + WIDTH - RIGHT) / 2)
    assert low[middle] == pytest.approx(0.05, abs=0.03) and high[middle] == pytest.approx(1.0, abs=0.03)


def test_one_step_is_a_point_and_none_is_refused():
    assert columns(delta_plot(torch.ones(1, 1)), COLOURS[0]).isfinite().sum() in range(5, 10)
    for shape in ((0, 1), (3,)):
        with pytest.raises(ValueError, match=r"expected \(steps, pictures\)"):
            delta_plot(torch.ones(shape))
