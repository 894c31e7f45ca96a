"""Caption Image: measured words or a captioner's, with or without those that describe damage, in step with pictures."""

import torch


def caption(nodes, images, captioner="embedded", drop_focus_words=True, suffix=("",)):
    """(prompts, pictures) of a list of batches (B, H, W, C)."""
    return nodes["FourfoldCaptionImage"].execute(images, [captioner], [drop_focus_words], list(suffix)).args


def test_each_picture_gets_its_caption(nodes):
    from fourfold.nodes.common.captions import EmbeddedCaptioner

    images = torch.rand(3, 16, 16, 4) * torch.tensor([0.1, 0.5, 1.0])[:, None, None, None]
    prompts, _ = caption(nodes, [images], suffix=[" Sharp.\n"])
    wished, measured = (EmbeddedCaptioner(as_good)(images[..., :3].movedim(-1, 1)) for as_good in (True, False))
    assert prompts == [f"{words} Sharp." for words in wished] and len(set(prompts)) > 1
    assert caption(nodes, [images], drop_focus_words=False)[0] == measured != wished


def test_pictures_of_any_size_come_out_one_by_one_beside_their_prompts(nodes):
    """Were they left in their batch, ComfyUI would run the sampler on the whole batch for each of the prompts."""
    images = [torch.rand(2, 16, 16, 3) * 0.2, torch.rand(1, 8, 24, 3) * 0.2 + 0.8]
    prompts, pictures = caption(nodes, images, suffix=["One.", "Two."])
    assert [prompt[-4:] for prompt in prompts] == ["One.", "One.", "Two."]
    assert [picture.shape for picture in pictures] == [(1, 16, 16, 3), (1, 16, 16, 3), (1, 8, 24, 3)]
    assert torch.equal(torch.cat(pictures[:2]), images[0]) and torch.equal(pictures[2], images[1])
    for prompt, picture, words in zip(prompts, pictures, ("One.", "One.", "Two."), strict=True):
        assert caption(nodes, [picture], suffix=[words])[0] == [prompt]


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
    assert nodes["FourfoldCaptionImage"].define_schema().inputs[1].options == ["embedded", "blip"]
    images = [torch.rand(1, 8, 8, 3), torch.rand(1, 9, 8, 3)]
    assert caption(nodes, images, "blip", True, ["Sharp."])[0] == ["A cat. Sharp."] * 2
    assert asked == [model_folder / "blip"]  # the weights are loaded once for all pictures
    assert caption(nodes, images[:1], "blip", False)[0] == ["A cat. The background is blurry."]
