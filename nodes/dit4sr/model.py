"""The DiT4SR network: SD3.5's MM-DiT with a third stream of tokens, the LR latent (DiT4SR section 3).

    model = DiT4SRTransformer.from_pretrained("dit4sr_q/transformer", variant="v1")
    velocity = model(latent, lr_latent, timestep, prompt_embeds, pooled)
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from diffusers.models.normalization import AdaLayerNormContinuous
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..common import checkpoints
from ..common.conv_head import ConvHead
from .blocks import MMDiTControlBlock
from .config import PUBLISHED_CLASS, Ablations, DiT4SRConfig, Variant

TIMESTEPS = 1000  # the network is told sigma * 1000
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PAGE = "https://huggingface.co/acceptee/DiT4SR"
_UNUSED = re.compile(r"\.attn2\.(add_|to_add_out|norm_added)")  # text layers of an attention that sees no text
BASES = ("sd35_medium", "sd35_large", "sd3")
BASE_PAGE = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
_VARIANT_NAME = re.compile(r"dit4sr[-_](f|q|v1|r1)(?![a-z0-9])")
_INJECTION, _KEYS = re.compile(r"\.ff\.control_"), re.compile(r"\.to_k_control\.")


class DiT4SRTransformer(nn.Module):
    """Velocity of the rectified flow from the LR latent, the text and the noisy latent (section 3.1)."""

    def __init__(self, config: DiT4SRConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim = config.inner_dim
        self.pos_embed = PatchEmbed(
            height=config.sample_size,
            width=config.sample_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            embed_dim=dim,
            pos_embed_max_size=config.pos_embed_max_size,
        )
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.caption_projection_dim)
        last = config.num_layers - 1
        self.transformer_blocks = nn.ModuleList(
            MMDiTControlBlock(config, dual_attention=i in config.dual_attention_layers, last=i == last)
            for i in range(config.num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.head = ConvHead(config.out_channels, config.in_channels, config.head_width) if config.head_width else None

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.proj_out.weight.device

    def forward(
        self,
        latent: Tensor,
        lr_latent: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        injection_scale: float | None = None,
    ) -> Tensor:
        """Velocity `noise - x0` at the noisy latent.

        Args:
            latent: x_t, (B, C, h, w), scaled as in the config; h and w multiples of the patch size.
            lr_latent: latent of the LR picture, enlarged to the target, same shape.
            timestep: sigma * 1000, (B,) or a scalar.
            prompt_embeds: text tokens, (B, M, joint_attention_dim).
            pooled: pooled text, (B, pooled_projection_dim).
            injection_scale: factor of the LR injection; None = the config's.
        Returns: (B, C, h, w), dtype of `latent`.
        Raises: ValueError if the latents differ in shape or do not fit the patches or the position embedding.
        """
        self._check(latent, lr_latent)
        scale = self.config.injection_scale if injection_scale is None else injection_scale
        patch, (height, width) = self.config.patch_size, latent.shape[-2:]
        grid = (height // patch, width // patch)
        timestep = timestep.to(latent.device).expand(latent.shape[0])

        streams = torch.cat([self.pos_embed(z.to(self.dtype)) for z in (latent, lr_latent)], dim=1).to(self.dtype)
        emb = self.time_text_embed(timestep, pooled.to(self.dtype))
        text = self.context_embedder(prompt_embeds.to(self.dtype))
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                streams, text = checkpoint(block, streams, text, emb, grid, scale, use_reentrant=False)
            else:
                streams, text = block(streams, text, emb, grid, scale)

        tokens = self.proj_out(self.norm_out(streams.chunk(2, dim=1)[0], emb))
        output = rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)
        if self.head is not None:
            output = self.head(output, lr_latent.to(output.dtype))
        return self._velocity(output.to(latent.dtype), latent, lr_latent.to(latent.dtype), timestep)

    def _velocity(self, output: Tensor, latent: Tensor, lr_latent: Tensor, timestep: Tensor) -> Tensor:
        """The network's output read as a velocity.

        not in the paper: with `anchor = "lr"` the output is the residual of the clean latent on the LR latent,
        x0 = z_lr + output and v = (x_t - x0) / sigma: a small network then need not learn to copy its input.
        """
        if self.config.anchor == "none":
            return output
        sigma = (timestep / TIMESTEPS).clamp(min=1 / TIMESTEPS).to(latent.dtype)
        return (latent - lr_latent - output) / sigma[:, None, None, None]

    def _check(self, latent: Tensor, lr_latent: Tensor) -> None:
        if latent.shape != lr_latent.shape:
            raise ValueError(
                f"the noisy latent is {tuple(latent.shape)} but the LR latent {tuple(lr_latent.shape)}; they must be "
                "of one shape: enlarge the LR picture to the target size before encoding it."
            )
        patch, largest = self.config.patch_size, self.config.pos_embed_max_size * self.config.patch_size
        height, width = latent.shape[-2:]
        if height % patch or width % patch or max(height, width) > largest:
            raise ValueError(
                f"a latent of {height} x {width} does not fit: both sides must be multiples of {patch} and at most "
                f"{largest}. Pad the picture (LR Prepare does) and use tiles for large ones."
            )

    def init_control(self) -> None:
        """Starts a new training on a loaded base: see ControlAttention.init_control."""
        for block in self.transformer_blocks:
            block.init_control()

    def init_from_scratch(self) -> None:
        """Starts a training without a base (tiny family): blocks begin as the identity, the output as zero (DiT's
        adaLN-Zero); the projections of the LR stream keep their random weights, so that it is heard from the start."""
        for block in self.transformer_blocks:
            for layer in (block.norm1.linear, block.norm1_context.linear, block.ff.control):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.norm_out.linear, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.head is not None:
            self.head.init_zero()

    def control_parameters(self) -> list[nn.Parameter]:
        """What the paper trains: everything with `control` in its name."""
        return [p for name, p in self.named_parameters() if "control" in name]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Weights that the files carry but no output depends on: they get no gradient and must not be trained."""
        unused = [_UNUSED]
        if not self.config.ablations.lr_injection:
            unused.append(_INJECTION)
        if self.config.variant == "v1":
            unused.append(_KEYS)
        return [p for name, p in self.named_parameters() if any(pattern.search(name) for pattern in unused)]

    @classmethod
    def from_pretrained(
        cls, path: str | Path, variant: Variant | None = None, dtype: torch.dtype | None = None
    ) -> DiT4SRTransformer:
        """Loads a published folder (config.json and safetensors, sharded or not) or a file that a trainer wrote.

        Args:
            path: the folder, or a single .safetensors file with our metadata or with the published full-size keys.
            variant: "v1" | "r1"; None = what the config says, else what the folder's name says, else "r1".
            dtype: of the weights; None = float32.
        Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError, MismatchedKeysError.
        """
        path = find_network(path)
        header = checkpoints.read_header(path)
        checkpoints.require_family(header, "dit4sr", path, f"Choose a model from {PAGE} or one trained here.")
        config = read_config(path, variant, header)
        state = checkpoints.load_state(path)
        with torch.device("meta"):
            model = cls(config)
        dtype = dtype or torch.float32
        for name, value in state.items():  # one by one: the whole network is never there in two precisions
            state[name] = value.to(dtype) if value.is_floating_point() else value
        checkpoints.load_strict(model, state, source=path)
        return model.eval().requires_grad_(False)

    @classmethod
    def from_base(
        cls, folder: str | Path, ablations: Ablations | None = None, dtype: torch.dtype | None = None
    ) -> DiT4SRTransformer:
        """A new network on the transformer of Stable Diffusion 3.5 (a diffusers folder), ready for training.

        The LR stream starts as the paper says (`init_control`); the unused layers of attn2 start at zero.

        Args:
            folder: the pipeline's folder or its `transformer`.
            ablations: parts of the method to leave out; None = none.
            dtype: of the weights; None = float32.
        Raises: as `from_pretrained`, with everything but the added layers matched strictly.
        """
        folder = find_network(folder, "the transformer of Stable Diffusion 3.5 medium", BASE_PAGE)
        dtype = dtype or torch.float32
        header = checkpoints.read_header(folder)
        checkpoints.require_family(header, BASES, folder, f"The training starts from the folder of {BASE_PAGE}.")
        with torch.device("meta"):
            model = cls(replace(read_config(folder, "r1", header), ablations=ablations or Ablations()))
        state = {name: value.to(dtype) for name, value in checkpoints.load_state(folder).items()}
        added = {
            name: torch.zeros(value.shape, dtype=dtype)
            for name, value in model.state_dict().items()
            if "control" in name or _UNUSED.search(name)
        }
        checkpoints.load_strict(model, added | state, source=folder)
        model.init_control()
        return model

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None, **summary) -> None:
        """Writes the published folder format.

        Args:
            state: other weights than the module's own (an EMA, say).
            summary: step, licence, training and dtype for `checkpoints.save_checkpoint`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save_checkpoint(
            folder / WEIGHTS_NAME,
            state or self.state_dict(),
            method="dit4sr",
            config=self.config.to_json(),
            **summary,
        )
        with checkpoints.atomic_path(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(self.config.to_json(), indent=2) + "\n")


def find_network(path: str | Path, what: str = "the DiT4SR transformer", page: str = PAGE) -> Path:
    """The file or folder of the network itself: of a pipeline's folder its `transformer`.

    Raises: FileNotFoundError if nothing is there.
    """
    path = Path(path).expanduser()
    inner = path / "transformer"
    return inner if inner.is_dir() else checkpoints.require_file(path, what, str(path.parent), page)


def read_config(path: Path, variant: Variant | None = None, header: checkpoints.Header | None = None) -> DiT4SRConfig:
    """The network's config: from the file's own metadata, else from config.json beside the weights, else, for a single
    published file, from the shapes of its tensors.

    Args:
        path: folder or file.
        variant: None = what the config says, else what the name says (`guess_variant`).
        header: of `path`, if it was read already.
    """
    header = header or checkpoints.read_header(path)
    folder = path if path.is_dir() else path.parent
    content = header.config
    if not content and (folder / "config.json").is_file():
        beside = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content = beside if path.is_dir() or beside.get("_class_name") == PUBLISHED_CLASS else {}
    elif not content and path.is_dir():
        raise FileNotFoundError(
            f"{path} has no config.json. A DiT4SR folder holds config.json and {WEIGHTS_NAME} (or its shards): "
            f"give the folder 'transformer' of a model from {PAGE}."
        )
    if variant is None and "variant" not in content.get("fourfold", {}):
        variant = guess_variant(path)
    overrides = {"variant": variant} if variant else {}
    if content:
        return DiT4SRConfig.from_json(content, **overrides)
    return DiT4SRConfig.from_shapes({name: shape for name, (_, shape) in header.tensors.items()}, **overrides)


def guess_variant(path: Path) -> Variant:
    """`dit4sr_f` and `dit4sr_q` are the first network (v1), anything else the revised one (r1); of the file's and its
    folders' names the innermost that says so counts."""
    for name in reversed(path.absolute().parts[-3:]):
        if found := _VARIANT_NAME.search(name.lower()):
            return "v1" if found[1] in ("f", "q", "v1") else "r1"
    return "r1"
