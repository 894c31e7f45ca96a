"""Contact sheets."""

import pytest
import torch
from fourfold.commands.sheet import MARGIN, write_sheet
from fourfold.nodes.common.image_files import read_image


def test_a_sheet_has_a_column_a_label_and_rows_as_high_as_their_pictures(tmp_path):
    wide, square = torch.zeros(1, 3, 10, 40), torch.ones(1, 1, 8, 8)
    write_sheet(tmp_path / "sheet.png", [{"a": wide, "b": wide}, {"b": square}], cell=40)
    sheet = read_image(tmp_path / "sheet.png")
    top = sheet.shape[-2] - 10 - 40 - 2 * MARGIN
    assert sheet.shape[-1] == 3 * MARGIN + 2 * 40
    assert sheet[..., top:top + 10, MARGIN:MARGIN + 40].max() == 0
    assert sheet[..., top + 10, :].min() == 1  # the gap
    assert sheet[..., top + 10 + MARGIN:, :MARGIN + 40].min() == 1  # no picture for this label
    with pytest.raises(ValueError, match="at least one row"):
        write_sheet(tmp_path / "sheet.png", [])
