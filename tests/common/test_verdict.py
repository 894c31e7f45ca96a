"""The bar of the tiny family: what clears it, what does not, and what cannot be said."""

import math

import pytest
from fourfold.nodes.common.evaluation import CLEAN
from fourfold.nodes.common.verdict import judge

BICUBIC = {"psnr": 23.0, "psnr_rgb": 21.0, "ssim": 0.6, "fsim": 0.7, "gmsd": 0.2, "nlpd": 0.5, "niqe": 9.0}
OURS = {"psnr": 23.5, "psnr_rgb": 21.0, "ssim": 0.65, "fsim": 0.75, "gmsd": 0.15, "nlpd": 0.4, "niqe": 6.0}


def verdict_on(**changes):
    """The verdict on a method with `OURS` and these changes; None = not measured."""
    ours = {name: value for name, value in (OURS | changes).items() if value is not None}
    return judge({"m": ours, "bicubic": BICUBIC, CLEAN: {"niqe": 5.0}}, "m")


@pytest.mark.parametrize("changes, passed", [
    ({}, True),
    ({"ssim": 0.59}, True),  # three of four are enough
    ({"ssim": 0.59, "gmsd": 0.21}, False),
    ({"psnr": 22.51}, True),
    ({"psnr": 22.49}, False),
    ({"psnr_rgb": 20.49}, False),
    ({"niqe": 2.0}, True),  # 3 below the clean photographs', where bicubic is 4 above
    ({"niqe": 0.9}, False)])  # too low is wrong, too: noise fools NIQE
def test_the_bar(changes, passed):
    verdict = verdict_on(**changes)
    assert verdict.passed is passed and verdict.not_measured == ()
    assert any(reason.startswith("FAIL") for reason in verdict.reasons) is not passed
    assert str(verdict) == ("clears the bar" if passed else "does not clear the bar")


@pytest.mark.parametrize("changes, passed, missing", [
    ({"niqe": None}, True, ("NIQE",)),
    ({"niqe": math.nan}, True, ("NIQE",)),  # defined for no picture
    ({"niqe": None, "psnr": 22.0}, False, ("NIQE",)),
    ({"psnr": None, "psnr_rgb": None}, True, ("PSNR", "PSNR RGB")),
    ({"fsim": None}, True, ("FSIM",)),  # the other three are better
    ({"fsim": None, "ssim": 0.5}, True, ("FSIM",)),  # two better, one worse: the fourth would decide
    ({"fsim": None, "ssim": 0.5, "nlpd": 0.6}, False, ("FSIM",))])
def test_what_is_not_measured_is_named_and_counts_neither_way(changes, passed, missing):
    verdict = verdict_on(**changes)
    assert verdict.passed is passed and verdict.not_measured == missing
    assert not any(label in reason.partition(":")[0] for label in missing for reason in verdict.reasons)
    assert f"not measured: {', '.join(missing)}" in str(verdict)


def test_nothing_measured_is_no_pass():
    verdict = judge({"m": {"seconds": 1.0}, "bicubic": {}}, "m")
    assert not verdict.passed and str(verdict).startswith("nothing of the bar was measured (SSIM, FSIM")
