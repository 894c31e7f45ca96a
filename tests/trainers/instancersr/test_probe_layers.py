"""Linear probing: right answers on made-up features, and a whole run with its table and plot."""

import csv

import pytest
import torch
from fourfold.nodes.common.images import read_image
from fourfold.trainers import probe_layers
from fourfold.trainers.probe_layers import COLOURS, Probed, RidgeRegression, draw_plot, told_right
from fourfold.trainers.train_instancersr import train


def test_regression_finds_a_linear_map_with_its_constant():
    draws = torch.Generator().manual_seed(0)
    x, weight, constant = (torch.randn(shape, generator=draws) for shape in ((200, 6), (6, 3), (3,)))
    probe = RidgeRegression()
    for part in x.split(64):
        probe.add(part, part @ weight + constant)
    fresh = torch.randn(20, 6, generator=draws)
    torch.testing.assert_close(probe(fresh).float(), fresh @ weight + constant, atol=0.02, rtol=0.02)


def test_instances_are_told_where_features_say_them():
    draws = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 7, 7, 31]).repeat(64)
    noise = torch.randn(256, 8, generator=draws)
    knowing = noise + 8 * torch.nn.functional.one_hot(labels, 32).float() @ torch.randn(32, 8, generator=draws)
    assert told_right(knowing, labels, torch.Generator().manual_seed(1)) > 0.95
    assert told_right(noise, labels, torch.Generator().manual_seed(1)) < 0.7


def test_curves_are_drawn_at_their_heights():
    rows = [Probed(block, 0.25, 0.75) for block in range(1, 6)]
    picture = (draw_plot(rows)[0] * 255).round().long()
    for name, low, high in (("dino", 0.2, 0.3), ("instances", 0.7, 0.8)):
        colour = torch.tensor(COLOURS[name])[:, None]
        column = (picture[:, :, 320] == colour).all(dim=0).nonzero().float()
        height = 1 - (column.mean() - probe_layers.TOP) / (picture.shape[1] - probe_layers.TOP - probe_layers.BOTTOM)
        assert low < float(height) < high
    assert draw_plot(rows[:1]).shape == draw_plot(rows * 20).shape


def test_every_block_is_probed(config, network, photographs, instances, vision, tmp_path):
    folder = train(config(max_steps=1), network).folder
    arguments = ["--model", str(folder), "--dino", str(vision), "--photographs", str(photographs), "--instances",
                 str(instances), "--output", str(tmp_path / "results" / "probing"), "--crops", "5", "--crop", "32",
                 "--batch_size", "2", "--degradation", "light", "--device", "cpu"]
    probed = probe_layers.main(arguments)
    assert [row.block for row in probed] == [1, 2, 3]
    assert all(-1 <= row.dino <= 1 and 0 <= row.instances <= 1 for row in probed)
    with open(tmp_path / "results" / "probing.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["instances"]) for line in lines] == pytest.approx([row.instances for row in probed], abs=1e-4)
    assert read_image(tmp_path / "results" / "probing.png").shape == (1, 3, 360, 640)
    assert probe_layers.main(arguments) == probed


@pytest.mark.parametrize("arguments", [["--crops", "1"], ["--timestep", "1000"], ["--timestep", "-1"]])
def test_numbers_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        probe_layers.main(arguments)
    assert "must be at least" in capsys.readouterr().err
