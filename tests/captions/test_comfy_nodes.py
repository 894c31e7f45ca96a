"""Caption Image: measured words or a captioner's, with or without those that describe damage."""

import torch


def test_each_picture_gets_its_caption(nodes):
    from fourfold.nodes.common.captions import EmbeddedCaptioner

    images = torch.rand(3, 16, 16, 4) * torch.tensor([0.1, 0.5, 1.0])[:, None, None, None]
    prompts = nodes["FourfoldCaptionImage"].execute(images, "embedded", True, " Sharp.\n").args[0]
    wished, measured = (EmbeddedCaptioner(as_good)(images[..., :3].movedim(-1, 1)) for as_good in (True, False))
    assert prompts == [f"{caption} Sharp." for caption in wished] and len(set(prompts)) > 1
    assert nodes["FourfoldCaptionImage"].execute(images, "embedded", False, "").args[0] == measured != wished


def test_a_captioner_of_transformers_speaks_without_the_words_of_damage(nodes, model_folder, monkeypatch):
    from fourfold.nodes.captions import comfy_nodes

    class Captioner:
        network = torch.nn.Linear(1, 1)

        def __call__(self, images):
            return ["A cat. The background is blurry."] * len(images)

    (model_folder / "blip").mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (model_folder / "blip" / file).touch()
    asked = []
    monkeypatch.setattr(comfy_nodes, "load_captioner", lambda folder, **options: asked.append(folder) or Captioner())
    node = nodes["FourfoldCaptionImage"]
    assert node.define_schema().inputs[1].options == ["embedded", "blip"]
    assert node.execute(torch.rand(2, 8, 8, 3), "blip", True, "Sharp.").args[0] == ["A cat. Sharp."] * 2
    assert node.execute(torch.rand(1, 8, 8, 3), "blip", False, "").args[0] == ["A cat. The background is blurry."]
    assert asked == [model_folder / "blip"] * 2
