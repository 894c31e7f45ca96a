"""Which photographs are restored, and what their results are called."""

from pathlib import Path

from fourfold.commands.jobs import plan


def test_folders_keep_their_layout_and_never_take_their_own_results(tmp_path, picture):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "deep" / "b.jpg")
    picture(tmp_path / "in" / "out" / "a.png")
    out = tmp_path / "in" / "out"

    def planned(**options):
        return [str(job.target.relative_to(out)) for job in plan([tmp_path / "in"], out, "png", **options)[0]]

    assert planned() == ["a.png"]
    assert planned(recursive=True) == ["a.png", str(Path("deep") / "b.png")]


def test_photographs_that_would_share_a_result_get_names_of_their_own(tmp_path, picture):
    files = [picture(tmp_path / name) for name in ("x/a.jpg", "x/a.png", "y/a.png", "x/b.png")]
    names = [job.target.name for job in plan([*files, files[0]], tmp_path / "out", "png")[0]]
    assert names == ["a-jpg.png", "a-png.png", "a-png-2.png", "b.png"]
