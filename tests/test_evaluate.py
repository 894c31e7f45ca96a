"""Evaluation: the same pairs every time, numbers that point the right way, a verdict that can fail, no downloads."""

import csv
import json
import logging
import math
import socket
from pathlib import Path

import pytest
import torch
from fourfold import cli
from fourfold.commands import methods
from fourfold.nodes.common import metrics as metrics_module
from fourfold.nodes.common.degradation import LIGHT
from fourfold.nodes.common.evaluation import (
    Pair,
    Row,
    bicubic,
    centre_crop,
    evaluate,
    list_photographs,
    summarise,
    validation_pairs,
)
from fourfold.nodes.common.image_files import write_image
from fourfold.nodes.common.metrics import MEASURES, Metric, load_metrics

SUITE = Path(__file__).resolve().parents[1]
CLEAN_EXAMPLES = SUITE / "photographs" / "clean"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"something wants to connect to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def no_niqe_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


@pytest.fixture(scope="module")
def pairs():
    return validation_pairs(CLEAN_EXAMPLES, LIGHT, crop=96)


@pytest.fixture(scope="module")
def metrics():
    pytest.importorskip("pyiqa", reason="pyiqa (extra `metrics`) is not installed", exc_type=ImportError)
    return load_metrics(("psnr", "psnr_rgb", "ssim", "fsim", "gmsd", "nlpd"))


def plain(name: str) -> Metric:
    """A measure without pyiqa: the mean absolute difference (psnr: its negative), or the brightness for niqe."""
    class Network(torch.nn.Module):
        def forward(self, sr, hr=None):
            return sr.mean().reshape(1) if hr is None else (sr - hr).abs().mean(dim=(1, 2, 3)) * (
                1 if MEASURES[name].lower_better else -1)

    return Metric(name, MEASURES[name], Network())


def test_pairs_depend_on_place_and_settings_alone(pairs):
    again = validation_pairs(CLEAN_EXAMPLES, LIGHT, crop=96, limit=2)
    assert [pair.name for pair in pairs] == ["astronaut", "camera", "cat", "coffee", "rocket"]
    assert len(again) == 2
    for first, second in zip(pairs, again, strict=False):
        assert torch.equal(first.lr, second.lr) and torch.equal(first.hr, second.hr)
    assert pairs[0].lr.shape == (1, 3, 24, 24) and pairs[0].hr.shape == (1, 3, 96, 96)


def test_centre_crop_takes_the_middle():
    picture = torch.arange(7 * 5.0).reshape(1, 1, 7, 5)
    assert torch.equal(centre_crop(picture, 3), picture[..., 2:5, 1:4])
    with pytest.raises(ValueError, match=r"small has 5 x 7 px, less than the 6 px"):
        centre_crop(picture, 6, "small")


def test_a_folder_without_photographs_is_said(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="no photographs in"):
        list_photographs(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_photographs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="multiple of the scale 4; got 90"):
        validation_pairs(CLEAN_EXAMPLES, LIGHT, crop=90)


def test_rows_do_not_depend_on_the_batch(pairs):
    def noisy(lr, seed):
        noise = [torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(seed + b)) for b in range(len(lr))]
        return bicubic(lr) + 0.1 * torch.cat(noise)

    scores = {"psnr": plain("psnr")}
    single = evaluate(pairs, {"noisy": noisy}, scores)
    batched = evaluate(pairs, {"noisy": noisy}, scores, batch=3)
    assert [(row.name, row.method) for row in single] == [(row.name, row.method) for row in batched]
    for first, second in zip(single, batched, strict=True):
        assert first.scores["psnr"] == pytest.approx(second.scores["psnr"], abs=1e-6)


def test_a_gap_in_the_indices_starts_a_new_batch(pairs):
    seeds = []

    def restore(lr, seed):
        seeds.append((seed, len(lr)))
        return bicubic(lr)

    evaluate([pairs[0], pairs[2], pairs[3], pairs[4]], {"x": restore}, {}, batch=3)
    assert seeds == [(0, 1), (2, 3)]


def test_pictures_are_judged_as_they_would_be_saved():
    hr = torch.full((1, 3, 8, 8), 100 / 255)
    pair = Pair("flat", 0, hr[..., :2, :2], hr)
    rows = evaluate([pair], {"near": lambda lr, seed: hr + 0.4 / 255}, {"gmsd": plain("gmsd")})
    assert rows[0].scores["gmsd"] == 0


@pytest.mark.parametrize("picture, complaint", [
    (torch.zeros(1, 3, 8, 8), r"bad gave \(1, 3, 8, 8\) for p, but the clean photograph is \(1, 3, 16, 16\)"),
    (torch.full((1, 3, 16, 16), float("nan")), "bad gave values that are not finite for p")])
def test_a_method_that_gives_nonsense_is_named(picture, complaint):
    pair = Pair("p", 0, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=complaint):
        evaluate([pair], {"bad": lambda lr, seed: picture}, {})


def test_means_leave_out_what_is_undefined():
    rows = [Row("a", 0, "m", {"niqe": 4.0, "psnr": 20.0}, 1.0), Row("b", 1, "m", {"niqe": math.nan, "psnr": 30.0}, 3.0)]
    assert summarise(rows) == {"m": {"niqe": 4.0, "psnr": 25.0, "seconds": 2.0}}
    assert math.isnan(summarise([Row("a", 0, "m", {"niqe": math.nan})])["m"]["niqe"])


def test_pyiqa_measures_point_the_right_way(pairs, metrics):
    hr = torch.cat([pair.hr for pair in pairs[:2]])
    close = (hr + 0.02 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    far = (hr + 0.2 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for name, metric in metrics.items():
        good, bad, single = metric(close, hr), metric(far, hr), metric(close[1:], hr[1:])
        assert len(good) == 2 and single[0] == pytest.approx(good[1], rel=1e-5)
        assert all((g < b) is metric.measure.lower_better for g, b in zip(good, bad, strict=True)), name


def test_psnr_is_that_of_matlabs_luma(metrics):
    hr = torch.full((1, 3, 16, 16), 0.5)
    sr = hr + torch.tensor([0.1, 0.0, 0.0]).view(1, 3, 1, 1)
    luma = 0.1 * 65.481 / 255  # MATLAB's rgb2ycbcr weighs red with 65.481 of 255
    assert metrics["psnr"](sr, hr)[0] == pytest.approx(-20 * math.log10(luma), abs=0.01)
    assert metrics["psnr_rgb"](sr, hr)[0] == pytest.approx(-10 * math.log10(0.1**2 / 3), abs=0.01)


def test_a_reference_measure_wants_a_reference(metrics):
    with pytest.raises(ValueError, match=r"SSIM compares with a clean picture of shape \(1, 3, 16, 16\), but got none"):
        metrics["ssim"](torch.zeros(1, 3, 16, 16))


def test_without_parameters_niqe_is_left_out_and_named(no_niqe_cache, metrics, caplog):
    with caplog.at_level(logging.WARNING):
        assert list(load_metrics(("ssim", "niqe"))) == ["ssim"]
    assert "NIQE is left out" in caplog.text
    with pytest.raises(FileNotFoundError, match="no NIQE parameter file at nowhere"):
        load_metrics(niqe_parameters="nowhere.mat")
    with pytest.raises(ValueError, match="unknown measure lpips; there are psnr"):
        load_metrics(["lpips"])


def test_niqe_of_pictures_for_which_it_is_undefined(metrics, niqe_parameters, caplog):
    niqe = load_metrics(["niqe"], niqe_parameters=niqe_parameters)["niqe"]
    photograph = torch.rand(2, 3, 96, 192, generator=torch.Generator().manual_seed(0))
    photograph[0] = 0.5
    values = niqe(photograph)
    assert math.isnan(values[0]) and math.isfinite(values[1])
    assert math.isnan(niqe(photograph[..., :191])[1])
    assert "flat picture" in caplog.text and "two blocks of 96 px" in caplog.text


@pytest.fixture
def niqe_parameters(tmp_path):
    """A parameter file in pyiqa's form with made-up numbers: enough to see that the file is used."""
    scipy_io = pytest.importorskip("scipy.io")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 36, generator=generator, dtype=torch.float64)
    file = tmp_path / "niqe.mat"
    mean, covariance = features.mean(0, keepdim=True), features.T.cov()
    scipy_io.savemat(file, {"mu_prisparam": mean.numpy(), "cov_prisparam": covariance.numpy()})
    return file


def test_missing_pyiqa_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyiqa", None)
    with pytest.raises(metrics_module.MetricsNotInstalledError, match=r"pip install 'comfyui-fourfold\[metrics\]'"):
        load_metrics()


def test_the_command(tmp_path, monkeypatch, metrics, niqe_parameters, capsys):
    class Sharper:
        def __init__(self, name, options):
            self.settings = {}

        def __call__(self, lr, seed):
            enlarged = bicubic(lr)
            return (enlarged + 0.5 * (enlarged - torch.nn.functional.avg_pool2d(enlarged, 5, 1, 2))).clamp(0, 1)

    monkeypatch.setattr(methods, "Method", Sharper)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i in range(2):
        write_image(photographs / f"{i}.png", torch.rand(1, 3, 200, 220, generator=torch.Generator().manual_seed(i)))
    out = tmp_path / "out"
    assert cli.main(["evaluate", "--data", str(photographs), "--crop", "192", "--degradation", "light", "--sheet", "1",
                     "--method", "dit4sr", "--niqe-parameters", str(niqe_parameters), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "PSNR ↑" in said and "GMSD ↓" in said and "the bar" in said
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["method"]) for row in rows] == [
        (name, method) for name in "01" for method in ("bicubic", "dit4sr", "clean")]
    assert rows[2]["ssim"] == "" and float(rows[2]["niqe"]) > 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["left_out"] == [] and summary["photographs"] == 2
    mean = (float(rows[0]["psnr"]) + float(rows[3]["psnr"])) / 2
    assert summary["means"]["bicubic"]["psnr"] == pytest.approx(mean, rel=1e-4)
    assert isinstance(summary["verdicts"]["dit4sr"]["passed"], bool)
    assert (out / "sheet.png").is_file()


def test_the_command_counts_what_is_not_measured_neither_as_failed_nor_as_passed(
        tmp_path, monkeypatch, no_niqe_cache, metrics, capsys):
    class Perfect:
        def __init__(self, name, options):
            self.settings = {}

        def __call__(self, lr, seed):
            return validation_pairs(CLEAN_EXAMPLES, LIGHT, crop=64, limit=1)[0].hr

    monkeypatch.setattr(methods, "Method", Perfect)
    assert cli.main(["evaluate", "--data", str(CLEAN_EXAMPLES), "--crop", "64", "--limit", "1", "--degradation",
                     "light", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "dit4sr: clears the bar as far as it was measured (not measured: NIQE)" in said and "FAIL" not in said
    verdict = json.loads((tmp_path / "summary.json").read_text())["verdicts"]["dit4sr"]
    assert verdict["passed"] is True and verdict["not_measured"] == ["NIQE"]


def test_the_command_names_what_it_leaves_out(tmp_path, no_niqe_cache, metrics, capsys):
    assert cli.main(["evaluate", "--data", str(CLEAN_EXAMPLES), "--crop", "64", "--limit", "1", "--baseline-only"]) == 0
    assert "left out: NIQE" in capsys.readouterr().out


def test_wrong_names_are_errors(capsys, metrics):
    assert cli.main(["evaluate", "--data", str(CLEAN_EXAMPLES), "--degradation", "fog"]) == 1
    assert "unknown degradation 'fog'; there are real_esrgan, seesr, light" in capsys.readouterr().err
