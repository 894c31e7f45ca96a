"""Settings of InstantIR's trainings: the paper's values, and what is refused."""

from dataclasses import replace

import pytest
from fourfold.trainers import train_instantir_aggregator as aggregator
from fourfold.trainers import train_instantir_dcp as dcp
from fourfold.trainers import train_instantir_previewer as previewer
from fourfold.trainers import train_tiny_sdxl as base
from fourfold.trainers.fit import parse
from fourfold.trainers.train_dit4sr import with_preset_defaults


def test_defaults_are_the_papers():
    for config_class, steps in ((dcp.DCPTraining, 200_000), (previewer.PreviewerTraining, 30_000),
                                (aggregator.AggregatorTraining, 200_000)):
        config = parse(config_class, [])
        assert (config.learning_rate, config.crop, config.max_steps, config.schedule) == (1e-4, 1024, steps, "constant")
        assert config.preset == "full" and not config.train_base and config.degradation == "real_esrgan"
    config = dcp.DCPTraining()
    assert (config.drop_image, config.drop_text, config.drop_both) == (0.05, 0.05, 0.05)
    config = previewer.PreviewerTraining()
    assert (config.lowest_guidance, config.highest_guidance, config.huber_c) == (3, 15, 0.001)
    config = aggregator.AggregatorTraining()
    assert (config.drop_image, config.prompted, config.alone, config.loss_weight) == (0.15, 0, 0, "none")
    assert (config.l1, config.edge) == (0, 0)


@pytest.mark.parametrize(("config_class", "defaults"), [
    (dcp.DCPTraining, dcp.TINY_DCP), (previewer.PreviewerTraining, previewer.TINY_PREVIEWER),
    (aggregator.AggregatorTraining, aggregator.TINY_AGGREGATOR)])
def test_tiny_has_defaults_of_its_own_that_can_be_overridden(config_class, defaults):
    config = parse(config_class, with_preset_defaults(["--preset", "tiny", "--batch_size", "3"], defaults))
    assert config.batch_size == 3 and config.crop == 128 and config.mixed_precision == "bf16"
    assert config.train_base == defaults.get("train_base", False)


@pytest.mark.parametrize(("fields", "message"), [
    ({"preset": "full", "train_base": True}, "--train_base is for the tiny preset"),
    ({"preset": "full", "edge": 1.0}, "only the tiny codec lets gradients through"),
    ({"preset": "tiny", "alone": 0.2}, "without --train_base such samples train nothing")])
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        aggregator.AggregatorTraining(**fields)


def test_what_is_missing_is_named(config, starts):
    with pytest.raises(ValueError, match="--start is missing: the file that the training before"):
        dcp.build(config("dcp", start=None))
    with pytest.raises(ValueError, match="has no adapter and no previewer: give the export of the training"):
        aggregator.build(config("aggregator", start=starts["dcp"]))
    full = replace(config("aggregator"), preset="full")
    for fields, missing in (({}, "--sdxl is missing: .*Stable Diffusion XL"), ({"sdxl": "x"}, "--dino is missing"),
                            ({"sdxl": "x", "dino": "y"}, "--adapter is missing: the adapter's file"),
                            ({"sdxl": "x", "dino": "y", "adapter": "z"}, "--previewer is missing")):
        with pytest.raises(ValueError, match=missing):
            aggregator.build(replace(full, **fields))


def test_base_is_tiny_only():
    with pytest.raises(SystemExit):
        base.main(["--preset", "full"])
