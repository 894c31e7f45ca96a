"""Sizes: what the paper and FLUX say, what is refused, and the full network counted without memory."""

import sys

import pytest
import torch
from fourfold.nodes.dreamsr.config import PRESETS, DreamSRConfig, Sampling
from fourfold.nodes.dreamsr.model import DreamSR


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.fixture(scope="module")
def built():
    with torch.device("meta"):
        return {name: DreamSR(preset.network) for name, preset in PRESETS.items()}


def test_full_size_in_numbers(built):
    """19 + 38 blocks of width 3072 (FLUX.1-dev), 9 copies, rank 256: counted on the meta device."""
    full, width = built["full"], 3072
    assert (len(full.base.transformer_blocks), len(full.base.single_transformer_blocks)) == (19, 38)
    assert full.config.inner_dim == width and full.config.control_layers == (0, 2, 4, 6, 8, 10, 12, 14, 16)
    base, control, lora = (count(ps) for ps in
                           (full.base_parameters(), full.control_parameters(), full.lora_parameters()))
    sys.stdout.write(f"\nDreamSR full: FLUX {base:,}, MM-ControlNet {control:,}, RA-LoRA {lora:,} values\n")
    assert base == 11_901_408_320

    linear = width * width + width
    double = 2 * 6 * linear + 8 * linear + 4 * 128 + 2 * (8 * width * width + 5 * width)
    injections = 2 * linear + 3 * linear + 2 * linear + 2 * 128  # zero MLP; Q, K, V, M and the two norms
    times = 2 * (256 * width + width + linear) + (768 * width + width + linear)
    embedders = times + (4096 * width + width) + (64 * width + width)
    assert control == 9 * (double + injections) + embedders == 3_698_267_904

    attention, mlp = 2 * width, 5 * width  # in + out of a linear
    per_double = 8 * attention + 4 * mlp
    per_single = 3 * attention + mlp + (5 * width + width)
    assert lora == 256 * (19 * per_double + 38 * per_single) == 1_045_954_560


def test_tiny_size_in_numbers(built):
    tiny = built["tiny"]
    sizes = [count(ps) for ps in (tiny.base_parameters(), tiny.control_parameters(), tiny.lora_parameters())]
    sys.stdout.write(f"\nDreamSR tiny: base {sizes[0]:,}, MM-ControlNet {sizes[1]:,}, RA-LoRA {sizes[2]:,} values\n")
    assert sum(sizes) < 8_000_000 and sizes[0] > 4_000_000 and sizes[1] > 2_000_000


def test_presets_are_the_papers():
    full = PRESETS["full"]
    assert full.network.lora_rank == 256 and full.network.t_dr == 1.0 and full.network.anchor == "none"
    assert (full.sampling.steps, full.sampling.start, full.sampling.guidance) == (16, 0.8, 3.5)
    assert (full.sampling.tile, full.sampling.overlap, full.sampling.min_short_side) == (64, 16, 512)
    assert (full.network.latent_shift, full.network.latent_scale) == (0.1159, 0.3611)


@pytest.mark.parametrize(("layers", "wanted"), [
    (19, tuple(range(0, 17, 2))), (4, (0, 2)), (3, (0,)), (8, (0, 2, 4, 6))])
def test_half_of_the_double_blocks_are_copied(layers, wanted):
    sizes = DreamSRConfig(num_layers=max(layers, 17)).flux() | {"num_layers": layers}
    assert DreamSRConfig.of_flux(sizes).control_layers == wanted


@pytest.mark.parametrize(("fields", "text"), [
    ({"in_channels": 18}, "a token holds 2 x 2 latents"), ({"axes_dims_rope": (16, 56, 50)}, "with the sum 128"),
    ({"control_layers": (0, 19)}, "0 to 18, are expected"), ({"control_layers": (2, 0)}, "rising numbers"),
    ({"t_dr": 0.0}, r"in \(0, 1\]"), ({"t_dr": 1.5}, r"in \(0, 1\]"), ({"lora_rank": -1}, "1 or more"),
    ({"anchor": "x"}, "anchor is 'x'; 'none' or 'lr'")])
def test_sizes_that_do_not_fit_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        DreamSRConfig(**fields)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="spacing is 'karras'; 'uniform' or 'flux'"):
        Sampling(spacing="karras")
    with pytest.raises(ValueError, match="tile is 63 latents; it must be even"):
        Sampling(tile=63)
