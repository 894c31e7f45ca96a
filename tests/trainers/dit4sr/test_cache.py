"""A training of DiT4SR from cached latents and prompts."""

from dataclasses import replace

import pytest
import torch
from fourfold.trainers import dit4sr_cache, train_dit4sr
from fourfold.trainers.order import generator_of
from fourfold.trainers.train_dit4sr import build, train


def spy_on_encode(monkeypatch):
    """Notes how many crops every call of `encode` got."""
    counts = []
    encode = train_dit4sr.DiT4SRStudy.encode
    monkeypatch.setattr(train_dit4sr.DiT4SRStudy, "encode",
                        lambda study, batch: counts.append(len(batch["hr"])) or encode(study, batch))
    return counts


def test_cached_training_reads_the_cache_alone_and_gives_the_same_losses(
        config, curve, tmp_path, monkeypatch, program, batch_of):
    counts = spy_on_encode(monkeypatch)
    config = replace(config, cache=str(tmp_path / "cache"), cached_crops=5, max_steps=4)
    train(config, program.NETWORK)
    assert counts == [2, 2, 1]
    again = replace(config, output_dir=config.output_dir + "2")
    train(again, program.NETWORK)
    assert counts == [2, 2, 1] and curve(again.output_dir) == curve(config.output_dir)

    study = build(config, program.NETWORK)
    batch = batch_of(study, config)
    cached = study.encode(batch)
    assert set(cached) == {"latent", "lr_latent", "prompt_ids", "prompt_mask"}
    assert torch.equal(study(cached, generator_of(1)), study(batch, generator_of(1)))


def test_interrupted_caching_continues(config, tmp_path, monkeypatch, program):
    config = replace(config, cache=str(tmp_path / "cache"), cached_crops=6, max_steps=1)
    counts = spy_on_encode(monkeypatch)
    encode = train_dit4sr.DiT4SRStudy.encode

    def interrupted(study, batch):
        if len(counts) == 2:
            raise KeyboardInterrupt
        return encode(study, batch)

    monkeypatch.setattr(train_dit4sr.DiT4SRStudy, "encode", interrupted)
    monkeypatch.setattr(dit4sr_cache, "SHARD_ITEMS", 2)
    with pytest.raises(KeyboardInterrupt):
        train(config, program.NETWORK)
    monkeypatch.setattr(train_dit4sr.DiT4SRStudy, "encode", encode)
    train(config, program.NETWORK)
    assert counts == [2, 2, 2]


def test_a_cache_of_another_configuration_is_refused(config, tmp_path, program):
    config = replace(config, cache=str(tmp_path / "cache"), cached_crops=2, max_steps=1)
    train(config, program.NETWORK)
    other = replace(config, degradation="light", output_dir=config.output_dir + "2")
    with pytest.raises(ValueError, match=r"configuration: photographs and degradation was \w+, now \w+\. Train"):
        train(other, program.NETWORK)
    train(replace(other, degradation=config.degradation, cached_crops=3), program.NETWORK)  # more of the same
