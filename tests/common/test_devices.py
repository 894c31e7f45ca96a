"""Which device is taken, what is said where it is not there, and how networks take turns on one."""

import pytest
import torch
from fourfold.nodes.common.devices import best_device, find_device, must_offload, on_device
from torch import nn


@pytest.mark.parametrize(("cuda", "mps", "best"), [
    (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_a_gpu_of_either_kind_is_preferred(monkeypatch, cuda, mps, best):
    see(monkeypatch, cuda=2 * cuda, mps=mps)
    assert best_device() == find_device() == torch.device(best)


def see(monkeypatch, cuda: int = 0, mps: bool = False, built_for: str | None = "13.0") -> None:
    """Makes torch see so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "mps", torch.device("cuda:0")])
def test_devices_that_are_there(monkeypatch, name):
    see(monkeypatch, cuda=2, mps=True)
    assert find_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "CUDA", "cuda:x", "cuda:", "cuda:-1", "", "meta"])
def test_names_that_are_none_are_answered_with_those_that_are(monkeypatch, name):
    see(monkeypatch, mps=True)
    with pytest.raises(ValueError, match=rf"no device '{name}'. On this machine there is cpu, mps; cuda:0, cuda:1"):
        find_device(name)


@pytest.mark.parametrize("built_for, reason", [
    (None, "it was built without CUDA. For an NVIDIA GPU install a build with CUDA"),
    ("13.0", "it finds no GPU or no driver. `nvidia-smi` must list the GPU")])
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_driver(monkeypatch, name, built_for, reason):
    see(monkeypatch, built_for=built_for)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ValueError, match=rf"'{name}', but this torch \([^)]+\) sees no cuda device: {reason}"):
        find_device(name)


def test_a_gpu_beyond_the_last(monkeypatch):
    see(monkeypatch, cuda=2)
    with pytest.raises(ValueError, match="'cuda:2', but there are only cuda:0 to cuda:1"):
        find_device("cuda:2")
    see(monkeypatch, cuda=1)
    with pytest.raises(ValueError, match="'cuda:1', but there is only one: cuda"):
        find_device("cuda:1")


@pytest.fixture
def network():
    """Parameters, of which one is used twice, and a buffer."""
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval().requires_grad_(False)
    network[2].weight = network[0].weight
    return network


def places(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*network.parameters(), *network.buffers())}


def test_an_offloaded_network_is_there_for_the_block_and_back_with_its_own_weights_after_it(network):
    x = torch.rand(2, 3)
    before, memory = network(x), [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]
    with on_device(network, "meta", offload=True) as there:
        assert there is network and places(network) == {"meta"}
        assert network(x.to("meta")).device.type == "meta"
    assert places(network) == {"cpu"} and torch.equal(network(x), before)
    assert [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())] == memory  # nothing was copied
    assert network[2].weight is network[0].weight


def test_a_network_leaves_after_an_error_too(network):
    with pytest.raises(RuntimeError, match="interrupted"), on_device(network, "meta", offload=True):
        raise RuntimeError("interrupted")
    assert places(network) == {"cpu"}


def test_networks_take_turns(network):
    other = nn.Linear(2, 2)
    for one, rest in ((network, other), (other, network)) * 2:
        with on_device(one, "meta", offload=True):
            assert places(one) == {"meta"} and places(rest) == {"cpu"}


def test_without_offload_a_network_stays(network):
    with on_device(network, "meta", offload=False):
        pass
    assert places(network) == {"meta"}


@pytest.mark.parametrize("free, expected", [(2000, False), (1599, True)])
def test_networks_take_turns_where_their_weights_would_fill_the_device(monkeypatch, free, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    networks = [nn.Linear(100, 1, bias=False), nn.Linear(100, 2, bias=False)]  # 1200 bytes together
    assert must_offload([*networks, networks[0]], "cuda") is expected
    assert not must_offload(networks, "cpu") and not must_offload(networks, "mps")
