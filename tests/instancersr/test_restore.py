"""`sample` on latents and `restore` on pictures, with small random networks."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from fourfold.nodes.common.codec import CodecConfig, LinearCodec
from fourfold.nodes.common.errors import NonFiniteLatentError
from fourfold.nodes.common.images import resize
from fourfold.nodes.common.sampling import cpu_noise
from fourfold.nodes.instancersr.config import Ablations, Sampling
from fourfold.nodes.instancersr.model import InstanceRSR
from fourfold.nodes.instancersr.palette import labels_of_map
from fourfold.nodes.instancersr.restore import halves, load_system, restore, restore_with_map, sample


@pytest.fixture
def calls(network):
    """A small network that notes the arguments of every forward."""
    model, seen = network(prediction="x0"), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    return model, seen


@pytest.fixture
def case():
    """`case(batch, height, width)`: LR latent and noise."""

    def make(batch=2, height=8, width=8, channels=8):
        z_lr = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(2))
        return z_lr, cpu_noise(3, (batch, channels, height, width))

    return make


# sample -----------------------------------------------------------------------------------------------------------

def test_equal_arguments_give_equal_latents(network, case):
    model, (z_lr, noise) = network(), case()
    runs = [sample(model, z_lr, noise, steps=3) for _ in range(2)]
    assert torch.equal(*runs) and runs[0].dtype == torch.float32 and runs[0].shape == (2, 8, 8, 8)
    assert not torch.equal(sample(model, z_lr, -noise, steps=3), runs[0])
    assert not torch.allclose(sample(model, -z_lr, noise, steps=3), runs[0], atol=1e-3)


@pytest.mark.parametrize(("spacing", "timesteps"), [
    ("leading", [750, 500, 250, 0]), ("trailing", [999, 749, 499, 249])])
def test_ddim_by_hand(network, case, spacing, timesteps):
    """x' = alpha' x0 + sigma' eps with x0 = (x - sigma eps) / alpha, nothing clipped."""
    model, (z_lr, noise) = network(prediction="x0"), case()
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    x = noise.double()
    for t in timesteps:
        a, b = kept[t], kept[t - 250] if t >= 250 else torch.tensor(1.0).double()
        eps = model(x.float(), z_lr, torch.tensor(t)).eps.double()
        clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * clean + (1 - b).sqrt() * eps
    ours = sample(model, z_lr, noise, steps=4, spacing=spacing)
    assert (ours - x).norm() < 1e-3 * x.norm() and x.abs().max() > 1


def test_a_start_below_one_noises_the_lr_latent_and_spends_all_steps_below(calls, case):
    model, seen = calls
    z_lr, noise = case()
    sample(model, z_lr, noise, steps=4, start=0.5)
    latent, _, t = seen[0]
    assert [int(arguments[2]) for arguments in seen] == [375, 250, 125, 0] and t == 375
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)[375]
    clean = torch.cat([z_lr, torch.zeros_like(z_lr)], dim=1)
    torch.testing.assert_close(latent, (kept.sqrt() * clean + (1 - kept).sqrt() * noise).float(), atol=1e-5, rtol=1e-5)
    del seen[:]
    sample(model, z_lr, noise, steps=2)
    assert torch.equal(seen[0][0], noise) and len(seen) == 2


def test_windows_see_their_part_of_the_lr_latent(calls, case):
    model, seen = calls
    z_lr, noise = case(2, 8, 20)
    progress = []
    sample(model, z_lr, noise, steps=1, tile=8, overlap=2, tile_batch=2,
           on_window=lambda done, total: progress.append((done, total)))
    assert progress == [(2, 3), (3, 3)]
    for index, whole in ((0, noise), (1, z_lr)):
        windows = torch.cat([arguments[index] for arguments in seen])
        assert torch.equal(windows, torch.cat([whole[..., left:left + 8] for left in (0, 6, 12)]))


def test_one_window_that_covers_all_is_bit_equal_to_untiled(network, case):
    model, arguments = network(prediction="x0"), case(2, 8, 12)
    runs = [sample(model, *arguments, steps=2, tile=tile, overlap=4) for tile in (12, 64, None)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_windows_in_one_call_and_singles_of_a_batch_change_nothing(network, case):
    model, (z_lr, noise) = network(prediction="x0"), case(2, 12, 20)
    both = [sample(model, z_lr, noise, steps=2, tile=8, overlap=4, tile_batch=size) for size in (1, 5)]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)
    for row in range(2):
        one = slice(row, row + 1)
        single = sample(model, z_lr[one], noise[one], steps=2, tile=8, overlap=4)
        torch.testing.assert_close(both[0][one], single, atol=1e-4, rtol=1e-4)


def test_on_step_reports_every_step_and_may_stop(network, case):
    seen = []

    def on_step(i, n, x, x0):
        seen.append((i, n))
        assert x.shape == x0.shape == (2, 8, 8, 8)
        if i == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(network(), *case(), steps=5, on_step=on_step)
    assert seen == [(0, 5), (1, 5)]


def test_weights_that_are_not_numbers_give_an_error_that_names_the_step(network, case):
    model = network()
    model.proj_out_2.bias[0] = float("nan")
    with pytest.raises(NonFiniteLatentError, match=r"after step 1 of 3.*the network's prediction"):
        sample(model, *case(), steps=3)


@pytest.mark.parametrize(("settings", "text"), [
    ({"steps": 0}, "steps is 0"), ({"steps": 1001}, "steps is 1001"), ({"start": 0.0}, "start 0.0"),
    ({"start": 1.5}, "at most 1"), ({"tile": 7}, "tile is 7 latents; it must be a multiple"),
    ({"tile": 4, "overlap": 4}, "overlap is 4"), ({"tile_batch": 0}, "tile_batch is 0")])
def test_impossible_settings_are_refused(network, case, settings, text):
    with pytest.raises(ValueError, match=text):
        sample(network(), *case(), **settings)


def test_noise_of_another_shape_is_refused(network, case):
    z_lr, noise = case()
    with pytest.raises(ValueError, match=r"noise is \(2, 4, 8, 8\).*expected \(2, 8, 8, 8\): noise for"):
        sample(network(), z_lr, noise[:, :4])


def test_halves():
    z = torch.arange(8.0).reshape(1, 8, 1, 1)
    picture, instances = halves(z, 4)
    assert picture.flatten().tolist() == [0, 1, 2, 3] and instances.flatten().tolist() == [4, 5, 6, 7]
    assert halves(z, 8)[1] is None


# restore ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 3, 9, 7), (1, 3, 1, 1), (1, 1, 5, 12), (2, 4, 8, 8), (1, 2, 3, 30)])
def test_any_size_and_kind_comes_back_at_the_target_size(system, shape):
    lr = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    picture, instances, labels = restore_with_map(lr, system, scale=4)
    target = (4 * shape[2], 4 * shape[3])
    assert picture.shape == (*shape[:2], *target) and picture.min() >= 0 and picture.max() <= 1
    assert instances.shape == (shape[0], 3, *target) and labels.shape == (shape[0], *target)
    assert labels.dtype == torch.int64 and picture.dtype == torch.float32
    if shape[1] in (2, 4):
        torch.testing.assert_close(picture[:, -1:], resize(lr[:, -1:], target))


def test_restore_gives_the_picture_of_restore_with_map(system):
    lr = torch.rand(1, 3, 10, 8)
    assert torch.equal(restore(lr, system, scale=2, seed=5), restore_with_map(lr, system, scale=2, seed=5).picture)


def test_a_batch_equals_its_pictures_with_seeds_counted_up(system):
    lr = torch.rand(2, 3, 10, 8)
    both = restore(lr, system, seed=5)
    for row in range(2):
        single = restore(lr[row:row + 1], system, seed=5 + row)
        torch.testing.assert_close(both[row:row + 1], single, atol=1e-4, rtol=1e-4)


def test_labels_are_those_of_the_map_at_the_size_it_was_drawn_at(system, monkeypatch):
    """Instances of a decoded map: white on the left, nothing on the right."""
    edge = 32

    def white_up_to_the_edge(latent):
        height, width = (4 * side for side in latent.shape[-2:])
        return (torch.arange(width) < edge).float().expand(1, 3, height, width)

    monkeypatch.setattr(system.autoencoder, "decode", white_up_to_the_edge)
    _, instances, labels = restore_with_map(torch.rand(1, 3, 8, 8), system, scale=8)
    assert labels[0, :, :32].eq(1).all() and labels[0, :, 32:].eq(0).all()
    assert torch.equal(labels_of_map(instances, 4), labels)
    edge = 18  # of 36 px, which are padded to 40
    _, _, padded = restore_with_map(torch.rand(1, 3, 9, 9), system, scale=4)
    assert padded[0, :, :18].eq(1).all() and padded[0, :, 18:].eq(0).all()
    edge = 16
    _, _, small = restore_with_map(torch.rand(1, 3, 4, 4), system, scale=2)  # drawn at 32 px, shown at 8
    assert small[0, :, :4].eq(1).all() and small[0, :, 4:].eq(0).all()


def test_large_targets_are_tiled_or_drawn_at_the_working_size(system):
    seen = []
    system.network.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    lr = torch.rand(1, 3, 32, 48)
    tiled = restore(lr, system, scale=4, steps=1)
    assert {shape[-2:] for shape in seen} == {(16, 16)} and len(seen) > 1
    del seen[:]
    whole = restore(lr, system, scale=4, steps=1, tiling=False, tile=8)
    assert seen == [(1, 8, 8, 12)], "a short side of 32 px, a quarter of that in latents, in one go"
    assert tiled.shape == whole.shape == (1, 3, 128, 192)
    shown = restore(lr, replace(system, sampling=replace(system.sampling, tiling=False)), size=(32, 48), steps=1)
    assert torch.equal(restore(lr, system, size=(32, 48), steps=1, tile=64), shown), "at this size they are the same"


def test_settings_are_told_and_replaced(system):
    told = []
    restore(torch.rand(2, 3, 8, 8), system, steps=3, color_fix="adain", on_settings=told.append)
    assert told[0]["steps"] == 3 and told[0]["color_fix"] == "adain" and told[0]["prompt"] == ["", ""]
    assert told[0]["tile"] == 16


def test_colour_fix_brings_the_mean_back(system):
    lr = torch.full((1, 3, 16, 16), 0.5)
    lr[:, 0] = 0.9
    target = torch.tensor([0.9, 0.5, 0.5])
    plain, fixed = (restore(lr, system, scale=2, color_fix=method).mean((0, 2, 3)) for method in ("none", "wavelet"))
    assert (plain - target).abs().max() > 0.3 and (fixed - target).abs().max() < 0.1
    with pytest.raises(ValueError, match="colour fix is 'magic'"):
        restore(lr, system, color_fix="magic")


def test_text_is_refused(system):
    with pytest.raises(ValueError, match="takes no text"):
        restore(torch.rand(1, 3, 8, 8), system, prompt="a cat")


def test_without_mask_modelling_there_is_no_map(system, network):
    system = replace(system, network=network(ablations=Ablations(mask_modelling=False), learned_variance=False))
    picture, instances, labels = restore_with_map(torch.rand(1, 3, 8, 8), system)
    assert picture.shape == (1, 3, 32, 32) and instances is None and labels is None


# loading ----------------------------------------------------------------------------------------------------------

def test_an_exported_tiny_training_loads(system, tmp_path):
    system.network.save_pretrained(tmp_path)
    system.autoencoder.save(tmp_path / "codec.safetensors")
    loaded = load_system(tmp_path, device="cpu")
    lr, settings = torch.rand(1, 3, 8, 8), dict(steps=2, tile=16, overlap=4)
    again = replace(loaded, sampling=system.sampling)
    torch.testing.assert_close(restore(lr, again, **settings), restore(lr, system, **settings), atol=1e-5, rtol=1e-4)
    assert loaded.sampling.min_short_side == 128


def test_a_full_training_takes_the_vae_of_its_base(network, tmp_path):
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "dit" / "vae")
    network(latent_scale=0.18215).save_pretrained(tmp_path / "mine")
    system = load_system(tmp_path / "mine", base=tmp_path / "dit", device="cpu")
    assert system.autoencoder.downscale == 8 and system.sampling == Sampling()
    small = replace(system, sampling=Sampling(steps=1, min_short_side=32))
    assert restore(torch.rand(1, 3, 8, 10), small).shape == (1, 3, 32, 40)
    with pytest.raises(FileNotFoundError, match="no VAE in"):
        load_system(tmp_path / "mine", device="cpu")


def test_an_autoencoder_of_other_channels_is_refused(network, tmp_path):
    network().save_pretrained(tmp_path)
    LinearCodec(CodecConfig(latent_channels=16)).save(tmp_path / "codec.safetensors")
    with pytest.raises(ValueError, match=r"latents of 16 channels, but .* takes 4"):
        load_system(tmp_path, device="cpu")
    with pytest.raises(FileNotFoundError, match="InstanceRSR network is missing"):
        load_system(tmp_path / "nowhere", device="cpu")


def test_half_precision_draws_nearly_the_same(network, case, tmp_path):
    file = network(prediction="x0").save_pretrained(tmp_path)
    runs = [sample(InstanceRSR.from_pretrained(file, dtype), *case(), steps=2) for dtype in (None, torch.bfloat16)]
    assert runs[1].dtype == torch.float32 and (runs[0] - runs[1]).norm() < 0.1 * runs[0].norm()
