"""Settings of InstanceRSR's training: the paper's values, and what is refused."""

import pytest
from fourfold.trainers.fit import parse
from fourfold.trainers.instancersr_study import TINY, InstanceRSRTraining
from fourfold.trainers.train_dit4sr import with_preset_defaults
from fourfold.trainers.train_instancersr import build


def test_defaults_are_the_papers():
    config = parse(InstanceRSRTraining, [])
    assert (config.crop, config.batch_size, config.learning_rate, config.ema_decay) == (512, 256, 1e-4, 0.9999)
    assert (config.alignment_weight, config.scale_weight, config.map_weight) == (0.5, 0.1, 1)
    assert (config.loss_weight, config.l1, config.edge, config.degradation) == ("none", 0, 0, "real_esrgan")
    assert config.preset == "full" and not config.trains_base
    assert config.representation_learning and config.mask_modelling


def test_tiny_has_defaults_of_its_own_that_can_be_overridden():
    config = parse(InstanceRSRTraining, with_preset_defaults(["--preset", "tiny", "--batch_size", "3"], TINY))
    assert config.batch_size == 3 and config.crop == 128 and config.loss_weight == "x0" and config.trains_base


@pytest.mark.parametrize(("fields", "message"), [
    ({"edge": 1.0}, "--start and --edge are for the tiny preset"),
    ({"start": "x"}, "--start and --edge are for the tiny preset"),
    ({"mask_modelling": False, "map_weight": 0.5}, "without mask modelling there is no map's half")])
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        InstanceRSRTraining(**fields)


@pytest.mark.parametrize(("fields", "message"), [
    ({}, "--base is missing: the folder of .*DiT-XL-2-512"), ({"base": "x"}, "--dino is missing: the folder of .*dino"),
    ({"base": "nowhere", "representation_learning": False}, "nowhere")])
def test_what_is_missing_is_named(fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(InstanceRSRTraining(**fields))
