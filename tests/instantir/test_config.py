"""The config: sizes off shapes, presets, its JSON; and the adaptive modes' numbers by hand."""

import json
from dataclasses import replace

import pytest
import torch
from fourfold.nodes.common.color_fix import METHODS
from fourfold.nodes.common.schedulers import SCHEDULERS
from fourfold.nodes.instantir.adaptive import MODES, AdaptiveRestoration
from fourfold.nodes.instantir.config import PRESETS, SDXL_UNET, InstantIRConfig, ResamplerConfig
from fourfold.nodes.instantir.resampler import Resampler

SIZES = ResamplerConfig(embedding_dim=6, dim=8, depth=2, dim_head=4, heads=3, num_queries=5, output_dim=10, ff_mult=3)


def test_the_resamplers_sizes_are_read_off_its_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Resampler(SIZES).state_dict().items()}
    assert ResamplerConfig.from_shapes(shapes, dim_head=4) == SIZES
    assert ResamplerConfig.from_shapes(shapes, dim_head=6) == replace(SIZES, dim_head=6, heads=2)
    with pytest.raises(ValueError, match="12 wide"):
        ResamplerConfig.from_shapes(shapes, dim_head=5)
    with pytest.raises(ValueError, match="lack 'latents'"):
        ResamplerConfig.from_shapes({k: v for k, v in shapes.items() if k != "latents"}, dim_head=4)


def test_the_resampler_takes_any_number_of_tokens_and_reads_all():
    torch.manual_seed(0)
    resampler, features = Resampler(SIZES), torch.randn(2, 9, 6)
    tokens = resampler(features)
    assert tokens.shape == (2, 5, 10) == resampler(features[:, :1]).shape
    changed = features.clone()
    changed[:, -1] += 1
    assert not torch.allclose(resampler(changed), tokens)
    torch.testing.assert_close(resampler(features.flip(1)), tokens)  # as a set, without an order


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hang_together(preset):
    network, sampling = PRESETS[preset].network, PRESETS[preset].sampling
    assert InstantIRConfig.from_json(json.loads(json.dumps(network.to_json()))).resampler == network.resampler
    assert network.resampler.output_dim == network.unet["cross_attention_dim"]
    assert sampling.scheduler in SCHEDULERS and sampling.adaptive in MODES and sampling.color_fix in METHODS
    assert sampling.max_long_side == sampling.tile * network.downscale, "one window as long as one holds the picture"
    levels = len(network.unet["block_out_channels"]) - 1
    assert sampling.multiple % (network.downscale * 2**levels) == 0


def test_the_full_preset_is_the_papers():
    full = PRESETS["full"]
    assert (full.sampling.steps, full.sampling.guidance, full.sampling.scheduler) == (30, 7.0, "ddim")
    assert (full.network.latent_scale, full.network.prediction, full.network.previewer.rank) == (0.13025, "epsilon", 64)
    assert full.prompt.startswith("Photorealistic") and full.negative_prompt.endswith("lowres")


def test_what_no_config_can_be():
    with pytest.raises(ValueError, match="prediction is 'x'"):
        InstantIRConfig(SDXL_UNET, prediction="x")
    with pytest.raises(ValueError, match="SDXL"):
        InstantIRConfig({"addition_embed_type": None})


# adaptive restoration ---------------------------------------------------------------------------------------------

def full_of(*values):
    """A sample of 1 x 2 x 2 filled with each value: its squared norm is 4 value^2."""
    return torch.tensor(values).float()[:, None, None, None].expand(-1, 1, 2, 2).clone()


def test_equation_7_sample_by_sample():
    """delta = |p - x0|^2 / |p - p_before|^2: (3-2)^2 / 3^2, then (4-2)^2 / (4-3)^2, and for the other sample alone."""
    adaptive, all_two = AdaptiveRestoration("release", 2), torch.tensor([True, True])
    torch.testing.assert_close(adaptive.update(full_of(3, 1), full_of(2, 3), all_two), torch.tensor([1 / 9, 4.0]))
    torch.testing.assert_close(adaptive.factor(), torch.tensor([1 / 9, 1.0]))
    ratio = adaptive.update(full_of(4, 9), full_of(2, 9), torch.tensor([True, False]))
    assert ratio[0] == 4 and ratio[1].isnan()
    torch.testing.assert_close(adaptive.delta, torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(adaptive.previous, full_of(4, 1))


def test_what_delta_does_in_each_mode():
    preview, lq = full_of(1, 1, 1), full_of(3, 3, 3)
    delta = torch.tensor([0.05, 0.25, 7.0])
    off, paper, release = (AdaptiveRestoration(mode, 3, 0.5) for mode in ("off", "paper", "release"))
    for adaptive in (off, paper, release):
        assert adaptive.factor().tolist() == [min(1, adaptive.factor()[0])] * 3
        adaptive.delta = delta
    torch.testing.assert_close(paper.reference(preview, lq), full_of(1.1, 1.5, 3))
    assert torch.equal(off.reference(preview, lq), preview) and torch.equal(release.reference(preview, lq), preview)
    torch.testing.assert_close(release.scale(), torch.tensor([0.05, 0.25, 0.5]))
    assert release.aggregating().tolist() == [False, True, True]
    assert off.scale().tolist() == paper.scale().tolist() == [0.5] * 3 and paper.aggregating().all()
    twice = paper.reference(torch.cat([preview, preview]), torch.cat([lq, lq]))
    torch.testing.assert_close(twice, full_of(1.1, 1.5, 3, 1.1, 1.5, 3))


def test_previews_that_stand_still_give_a_finite_delta():
    adaptive = AdaptiveRestoration("paper", 1)
    for x0 in (0, 5):
        assert adaptive.update(full_of(0), full_of(x0), torch.tensor([True])).isfinite().all() or x0
        assert 0 <= adaptive.factor().item() <= 1
