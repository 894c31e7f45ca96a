"""Settings of DiT4SR's trainer: the paper's, those of the tiny network, and what is missing."""

from dataclasses import replace

import pytest
from fourfold.nodes.dit4sr.config import Ablations
from fourfold.trainers.fit import parse
from fourfold.trainers.train_dit4sr import TINY, DiT4SRTraining, build, with_preset_defaults


def test_defaults_are_the_papers():
    config = parse(DiT4SRTraining, [])
    assert (config.learning_rate, config.schedule, config.max_steps, config.crop) == (5e-5, "constant", 150_000, 512)
    assert (config.degradation, config.null_prompt, config.t5_length) == ("seesr", 0.2, 77)
    assert (config.sigma_mean, config.sigma_std, config.sigma_shift) == (0, 1, 3)
    assert (config.loss_weight, config.l1) == ("sigma2", 0)
    assert not config.trains_base and DiT4SRTraining(train_base=True).trains_base
    assert config.ablations == Ablations()


def test_tiny_has_defaults_of_its_own_that_can_be_overridden():
    for argv in (["--preset", "tiny", "--l1", "0.1"], ["--preset=tiny", "--l1=0.1"]):
        config = parse(DiT4SRTraining, with_preset_defaults(argv, TINY))
        assert config.l1 == 0.1 and config.crop == TINY["crop"] and config.mixed_precision == "bf16"
        assert config.trains_base
    assert with_preset_defaults(["--preset", "full"], TINY) == ["--preset", "full"]


def test_full_size_needs_the_base(config):
    with pytest.raises(ValueError, match=r"--sd3 is missing: the folder of Stable Diffusion 3\.5"):
        build(replace(config, preset="full"))
    with pytest.raises(FileNotFoundError, match=r"Diffusion 3\.5 medium is missing: nowhere .*huggingface"):
        build(replace(config, preset="full", sd3="nowhere"))
