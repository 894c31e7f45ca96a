"""The bundled photographs are there, in pairs that fit each other."""

import pytest
from fourfold.nodes.examples.photos import FOLDER, example_names, load_example

NAMES = example_names()


def test_there_are_several_and_each_has_its_licence_told():
    assert len(NAMES) >= 3
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_clean_is_four_times_the_damaged_one_and_shows_the_same(name):
    low_quality, clean = load_example(name)
    assert low_quality.shape[:2] == clean.shape[:2] == (1, 3)
    assert [4 * side for side in low_quality.shape[2:]] == list(clean.shape[2:])
    small = clean.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).mean(dim=(3, 5))
    assert (small - low_quality).abs().mean() < 0.1  # noise and blur, but the same picture
    assert (small - low_quality).abs().mean() > 1 / 255


def test_missing_photograph_names_the_folder_and_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nobody\.png.*cat"):
        load_example("nobody")
    with pytest.raises(FileNotFoundError, match="none"):
        load_example("cat", tmp_path)
