"""The tiny network's convolutional head, which the published networks do not have."""

import torch


def test_a_new_head_leaves_the_network_as_it_was(network, inputs):
    plain, headed = network(), network(head_width=8)
    headed.load_state_dict(plain.state_dict(), strict=False)
    headed.head.init_zero()
    assert torch.equal(headed(*inputs()), plain(*inputs()))


def test_the_head_joins_neighbouring_tokens(network, inputs):
    model = network(head_width=8)
    without, (latent, lr_latent, *rest) = network(), inputs()
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    assert not torch.allclose(model(latent, lr_latent, *rest), without(latent, lr_latent, *rest))


def test_it_is_saved_and_loaded(network, inputs, tmp_path):
    model = network(head_width=8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.head_width == 8
    assert torch.equal(again(*inputs()), model(*inputs()))


def test_published_networks_have_none(network):
    assert not [name for name in network().state_dict() if name.startswith("head.")]
