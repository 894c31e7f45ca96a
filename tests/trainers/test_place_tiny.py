"""Putting trained parts of the tiny family in their place, and the script that rebuilds all of it."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common import tiny
from fourfold.nodes.common.checkpoints import detect_family, read_header
from fourfold.nodes.common.codec import CodecConfig, LinearCodec
from fourfold.nodes.common.errors import WrongFileError
from fourfold.nodes.common.images import read_image, resize, write_image
from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder
from fourfold.nodes.common.vision import Preprocessing, VisionEncoder
from fourfold.nodes.dit4sr.config import PRESETS
from fourfold.nodes.dit4sr.model import WEIGHTS_NAME, DiT4SRTransformer
from fourfold.nodes.dit4sr.restore import load_system
from fourfold.nodes.instancersr.label_files import write_labels
from fourfold.nodes.instantir.config import PRESETS as INSTANTIR
from fourfold.nodes.instantir.model import InstantIR
from fourfold.trainers import place_tiny
from fourfold.trainers.place_tiny import main, place
from fourfold.trainers.resume import write_checkpoint

SUITE = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """The folder of a finished training: two checkpoints with exports."""
    small = replace(PRESETS["tiny"].network, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                    caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=32)

    def export(step):
        def write(folder):
            DiT4SRTransformer(small).save_pretrained(folder / "transformer", step=step, training={"crop": 32})
            TinyTextEncoder(TinyTextConfig(width=16)).save(folder / "text.safetensors", step=step)

        return write

    for step in (5, 10):
        write_checkpoint(tmp_path / "run", step, {}, export(step))
    return tmp_path / "run"


def test_newest_export_is_put_in_place(run, tmp_path):
    LinearCodec(CodecConfig()).save(tmp_path / "codec.safetensors")
    family, codec = tmp_path / "family", tmp_path / "codec.safetensors"
    main(["--dit4sr", str(run), "--codec", str(codec), "--checkpoints", str(family)])
    assert {p.name for p in family.iterdir()} == {tiny.FILES[part] for part in ("codec", "text", "dit4sr")}
    header = read_header(family / "dit4sr_tiny.safetensors")
    assert header.step == 10 and header.training == {"crop": 32}
    newest = run / "checkpoints" / "step-00000010" / "export" / "transformer" / WEIGHTS_NAME
    assert (family / "dit4sr_tiny.safetensors").read_bytes() == newest.read_bytes()


def test_placed_family_loads(run, tmp_path, monkeypatch):
    shutil.copy(tiny.tiny_checkpoint("codec"), tmp_path / "codec.safetensors")
    family, codec = tmp_path / "family", tmp_path / "codec.safetensors"
    main(["--dit4sr", str(run), "--codec", str(codec), "--checkpoints", str(family)])
    monkeypatch.setattr(tiny, "CHECKPOINTS", tmp_path / "family")
    assert load_system("tiny", device="cpu").transformer.config.num_layers == 1


def test_networks_are_placed_with_the_encoders_they_were_trained_with(run, tmp_path):
    """An export may hold the codec and the encoders of its training: they must be those that are shipped."""
    family, instantir = tmp_path / "family", tmp_path / "instantir"
    main(["--dit4sr", str(run), "--checkpoints", str(family)])
    sizes = dict(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = [VisionEncoder.new(sizes, Preprocessing(32, 32)) for _ in range(2)]
    network = InstantIR.new(INSTANTIR["tiny"].network.unet, prediction="v")
    for name, encoder in zip(("vision", "instantir"), vision, strict=True):
        def export(folder, name=name, encoder=encoder):
            encoder.save(folder / "vision.safetensors")
            if name == "instantir":
                shutil.copy(family / "text.safetensors", folder)
                network.save_pretrained(folder / "instantir_tiny.safetensors", dtype=torch.float16)

        write_checkpoint(tmp_path / name, 1, {}, export)
    both = ["--vision", str(tmp_path / "vision"), "--instantir", str(instantir), "--checkpoints", str(family)]
    with pytest.raises(ValueError, match=r"instantir was trained with another vision \(.*\) than .*Place the vision"):
        main(both)
    assert {p.name for p in family.iterdir()} == {tiny.FILES["text"], tiny.FILES["dit4sr"]}
    encoder, other = vision
    other.load_state_dict(encoder.state_dict())
    other.save(instantir / "checkpoints" / "step-00000001" / "export" / "vision.safetensors", step=3)
    main(both)
    assert {p.name for p in family.iterdir()} == {tiny.FILES[p] for p in ("text", "vision", "dit4sr", "instantir")}
    assert detect_family(family / "instantir_tiny.safetensors") == "instantir"


def test_what_does_not_belong_is_refused_before_anything_is_copied(run, tmp_path, monkeypatch):
    export = run / "checkpoints" / "step-00000010" / "export"
    text, network = export / "text.safetensors", export / "transformer" / WEIGHTS_NAME
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        main(["--dit4sr", str(tmp_path / "nothing"), "--checkpoints", str(tmp_path / "family")])
    with pytest.raises(WrongFileError, match="text encoder, but the tiny family's image codec is needed"):
        place({"codec": text}, tmp_path / "family")
    told = {"training": {"photographs": "/home/me/p"}}
    TinyTextEncoder(TinyTextConfig(width=16)).save(tmp_path / "told.safetensors", **told)
    with pytest.raises(ValueError, match=r"names folders of this machine .*: photographs = /home/me/p"):
        place({"dit4sr": network, "text": tmp_path / "told.safetensors"}, tmp_path / "family")
    monkeypatch.setattr(place_tiny, "LARGEST", 2**16)
    with pytest.raises(ValueError, match=r"would have \d\.\d MB; at most 0\.0625 are"):
        place({"dit4sr": network, "text": text}, tmp_path / "family")
    assert not (tmp_path / "family").exists()


@pytest.mark.slow
def test_script_rebuilds_the_family_and_goes_on_after_an_interruption(tmp_path):
    (tmp_path / "photographs").mkdir()
    for name in ("cat", "coffee"):
        picture = resize(read_image(SUITE / "photographs" / "clean" / f"{name}.jpg")[:, :3], (96, 128))
        write_image(tmp_path / "photographs" / f"{name}.png", picture)
        write_labels(tmp_path / "instances" / f"{name}.png", (picture[0, 0] > 0.5).long())
    command = [SUITE / "trainers" / "train_tiny.sh", tmp_path / "photographs", tmp_path / "out", "--crop", "32",
               "--batch_size", "2", "--num_workers", "0", "--sample_every", "0", "--max_steps"]
    family = tmp_path / "family"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CHECKPOINTS": str(family),
                   "INSTANCES": str(tmp_path / "instances")}
    for steps in ("1", "3"):
        done = subprocess.run([*command, steps], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "fourfold evaluate --data" in done.stdout
    parts = "codec", "text", "vision", "dit4sr", "instantir", "instancersr"
    assert {p.name for p in family.iterdir()} == {tiny.FILES[part] for part in parts}
    assert {read_header(family / tiny.FILES[part]).step for part in parts[1:]} == {3}
    network = InstantIR.from_pretrained(family / tiny.FILES["instantir"])
    assert network.switch is not None and network.aggregator is not None
    assert LinearCodec.load(family / "codec.safetensors").encode(torch.rand(1, 3, 8, 8)).isfinite().all()


def test_script_explains_itself():
    done = subprocess.run([SUITE / "trainers" / "train_tiny.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "trainers/train_tiny.sh PHOTOGRAPHS OUT" in done.stderr
