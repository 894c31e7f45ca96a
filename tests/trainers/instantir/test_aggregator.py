"""Training of InstantIR's Aggregator."""

import os
import subprocess
import sys

import pytest
import torch
from fourfold.nodes.common.checkpoints import load_state
from fourfold.nodes.instantir.restore import load_system, restore
from fourfold.trainers import train_instantir_aggregator as aggregator
from fourfold.trainers.order import generator_of


def test_frozen_parts_stay_bit_by_bit_and_the_export_restores(config, starts, trained_names, batch_of):
    settings = config("aggregator", export_dtype="float32", sample_every=3, samples=1)
    study = aggregator.build(settings)
    names = trained_names(study.train(), batch_of(settings), generator_of(0))
    assert names == {f"aggregator.{name}" for name, _ in study.model.aggregator.named_parameters()}
    result = aggregator.train(settings)
    exported, given = load_state(result.folder / "instantir_tiny.safetensors"), load_state(starts["aggregator"])
    assert all(torch.equal(exported[name], value) for name, value in given.items())
    assert exported["aggregator.controlnet_mid_block.1.weight"].any(), "the connectors begin at zero and move"

    sr = restore(torch.rand(1, 3, 8, 10), load_system(result.folder, device="cpu"), steps=2)
    assert sr.shape == (1, 3, 32, 40) and sr.isfinite().all()


def test_with_the_base_its_unet_trains_and_dcp_and_previewer_do_not(config, batch_of, trained_names):
    settings = config("aggregator", train_base=True, alone=0.5, l1=0.3, edge=2.0, loss_weight="x0")
    study = aggregator.build(settings)
    names = trained_names(study.train(), batch_of(settings), generator_of(0))
    assert names == {*study.model.part_parameters("aggregator"), *study.model.part_parameters("unet")}


def hear(study, batch):
    """What reaches the networks in one step: prompts as token counts, previews, residuals, anchors, tokens."""
    heard = {"text": []}
    text = study.text.register_forward_pre_hook(lambda _, given: heard["text"].append(given[1].sum(dim=1)))
    forward, aggregate = study.model.forward, study.model.aggregate

    def seen_forward(x, t, prompt_embeds, pooled, time_ids, tokens, residuals, anchor=None):
        heard.update(x=x, t=t, tokens=tokens, residuals=residuals, anchor=anchor, prompt_embeds=prompt_embeds)
        return forward(x, t, prompt_embeds, pooled, time_ids, tokens, residuals, anchor=anchor)

    def seen_aggregate(lq_latent, reference, t, pooled, time_ids):
        heard.update(lq=lq_latent, reference=reference)
        return aggregate(lq_latent, reference, t, pooled, time_ids)

    study.model.forward, study.model.aggregate = seen_forward, seen_aggregate
    study(batch, generator_of("draws"))
    text.remove()
    return heard


def test_aggregator_reads_the_lq_latent_and_a_preview_under_an_empty_prompt(config, batch_of):
    study = aggregator.build(config("aggregator", drop_image=0.0))
    batch = batch_of(study.config)
    heard = hear(study, batch)
    model, empty = study.model, study.text.encode([""] * 4)
    assert all((count == 1).all() for count in heard["text"]), "no caption is ever read"
    torch.testing.assert_close(heard["lq"], study.latents(batch["lr"]))
    features = study.features(batch["lr"])
    preview = model.preview(heard["x"], heard["t"], empty.prompt_embeds, empty.pooled, study.time_ids(4),
                            model.resample(features, previewer=True))
    plain = model.to_clean(model.output(heard["x"], heard["t"], model.condition(
        empty.prompt_embeds, empty.pooled, study.time_ids(4), model.resample(features))), heard["x"], heard["t"])
    torch.testing.assert_close(heard["reference"], preview)
    assert (heard["reference"] - plain).norm() > 0.1 * plain.norm(), "with the LoRA on"
    torch.testing.assert_close(heard["tokens"], model.resample(features))
    assert not heard["reference"].requires_grad


def test_shares_without_picture_prompt_or_aggregator(config, batch_of):
    settings = config("aggregator", drop_image=0.999999, train_base=True, alone=0.999999, prompted=0.5)
    study, batch = aggregator.build(settings), batch_of(settings)
    heard = hear(study, batch)
    null = study.model.resample(study.vision.null_features(4))
    torch.testing.assert_close(heard["tokens"], null)
    assert not any(skip.any() for skip in heard["residuals"][0]) and not heard["residuals"][1].any()
    assert heard["anchor"] is None or not heard["anchor"].any()
    assert (heard["lq"] - study.latents(batch["lr"])).norm() == 0, "the LQ latent is never dropped"
    study = aggregator.build(config("aggregator", drop_image=0.0, prompted=0.999999))
    heard = hear(study, batch)
    assert (heard["text"][0] > 1).all() and all((count == 1).all() for count in heard["text"][1:])
    torch.testing.assert_close(heard["anchor"], heard["lq"])


def test_edges_count_where_the_aggregator_is_heard(config, batch_of):
    """A preset draw of samples; the loss with edges minus the one without is the edge term of the heard samples."""
    losses = []
    for alone in (0.0, 0.999999):
        terms = [aggregator.build(config("aggregator", train_base=True, alone=alone, edge=edge)) for edge in (0.0, 1.0)]
        plain, edged = (study(batch_of(study.config), generator_of("draws"))[0] for study in terms)
        losses.append((edged - plain).item())
    assert losses[0] > 1e-3 and losses[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_two_processes_train(config, family, starts, photographs, program, curve, tmp_path):
    """Without GPUs `--multi_gpu` makes processes meet over gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               program.__file__, "aggregator", "--cpu", "True", "--photographs", str(photographs),
               "--start", starts["aggregator"], "--output_dir", str(tmp_path / "two"), "--batch_size", "2",
               *(word for part, file in family.items() for word in (f"--{part}", file))]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one = config("aggregator")  # twice the samples a step
    program.TRAININGS["aggregator"][1](one)
    shared, alone = curve(tmp_path / "two"), curve(one.output_dir)
    assert shared.keys() == alone.keys() and all(row["loss"] > 0 for row in shared.values())
