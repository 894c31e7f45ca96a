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
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..common import checkpoints
from .attention import ControlAttention
from .config import Ablations, DiT4SRConfig, Variant

TIMESTEPS = 1000  # the network is told sigma * 1000
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_UNUSED = re.compile(r"\.attn2\.(add_|to_add_out|norm_added)")  # text layers of an attention that sees no text


class ControlFeedForward(nn.Module):
    """MLP of [X, L] with the LR injection between its two linears (section 3.3).

    h_X <- h_X + scale * conv(h_L), where h = GELU(W_1 x) and conv is a 3x3 depth-wise convolution on the token grid.
    """

    def __init__(self, config: DiT4SRConfig):
        super().__init__()
        dim, hidden = config.inner_dim, 4 * config.inner_dim
        self.net = nn.ModuleList([_GELUProjection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])
        self.injection = config.ablations.lr_injection
        self.layer = config.ablations.injection_layer
        if self.layer == "conv":
            self.control_conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        else:
            self.control_linear = nn.Linear(hidden, hidden)

    @property
    def control(self) -> nn.Module:
        return self.control_conv if self.layer == "conv" else self.control_linear

    def init_control(self) -> None:
        nn.init.zeros_(self.control.weight)
        nn.init.zeros_(self.control.bias)

    def forward(self, streams: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
        hidden = self.net[0](streams)
        if self.injection:
            x, lr = hidden.chunk(2, dim=1)
            hidden = torch.cat([x + scale * self._inject(lr, grid), lr], dim=1)
        return self.net[2](hidden)

    def _inject(self, lr: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.layer == "linear":
            return self.control_linear(lr)
        picture = rearrange(lr, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        return rearrange(self.control_conv(picture), "b d h w -> b (h w) d")


class FeedForward(nn.Module):
    """MLP of the text stream."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([_GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net[2](self.net[0](tokens))


class _GELUProjection(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(tokens), approximate="tanh")


class MMDiTControlBlock(nn.Module):
    """One block over the streams [X, L] and the text; X and L share modulation, norms and MLP weights."""

    def __init__(self, config: DiT4SRConfig, dual_attention: bool, last: bool):
        super().__init__()
        dim = config.inner_dim
        self.last = last
        self.norm1 = SD35AdaLayerNormZeroX(dim) if dual_attention else AdaLayerNormZero(dim)
        self.norm1_context = (
            AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6) if last else AdaLayerNormZero(dim)
        )
        self.attn = ControlAttention(config, "keys_only" if last else "stream")
        self.attn2 = ControlAttention(config, "unused") if dual_attention else None
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = ControlFeedForward(config)
        if not last:
            self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.ff_context = FeedForward(dim)

    def init_control(self) -> None:
        for part in (self.attn, self.attn2, self.ff):
            if part is not None:
                part.init_control()

    def forward(
        self, streams: Tensor, text: Tensor, emb: Tensor, grid: tuple[int, int], injection_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Updates [X, L] (B, 2N, D) and the text (B, M, D); `emb` is the time and text modulation, (B, D)."""
        normed, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(streams, emb=emb)
        if self.last:
            normed_text = self.norm1_context(text, emb)
        else:
            normed_text, gate_text, *modulation_text = self.norm1_context(text, emb=emb)

        update, update_text = self.attn(normed, normed_text)
        streams = streams + gate[:, None] * update
        if self.attn2 is not None:
            normed, gate = dual
            streams = streams + gate[:, None] * self.attn2(normed)[0]
        hidden = _modulate(self.norm2(streams), shift_mlp, scale_mlp)
        streams = streams + gate_mlp[:, None] * self.ff(hidden, grid, injection_scale)

        if not self.last:
            shift_mlp, scale_mlp, gate_mlp = modulation_text
            text = text + gate_text[:, None] * update_text
            hidden = _modulate(self.norm2_context(text), shift_mlp, scale_mlp)
            text = text + gate_mlp[:, None] * self.ff_context(hidden)
        return streams, text


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

    def control_parameters(self) -> list[nn.Parameter]:
        """What the paper trains: everything with `control` in its name."""
        return [p for name, p in self.named_parameters() if "control" in name]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Weights that the published files carry but no output depends on."""
        return [p for name, p in self.named_parameters() if _UNUSED.search(name)]

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
        path = Path(path)
        config = read_config(path, variant)
        state = checkpoints.load_state(path)
        with torch.device("meta"):
            model = cls(config)
        dtype = dtype or torch.float32
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        checkpoints.load_strict(model, state, source=path)
        return model.eval().requires_grad_(False)

    @classmethod
    def from_base(
        cls, folder: str | Path, ablations: Ablations = Ablations(), dtype: torch.dtype | None = None
    ) -> DiT4SRTransformer:
        """A new network on the transformer of Stable Diffusion 3.5 (a diffusers folder), ready for training.

        The LR stream starts as the paper says (`init_control`); the unused layers of attn2 start at zero.
        Raises: as `from_pretrained`, with everything but the added layers matched strictly.
        """
        folder = Path(folder)
        model = cls(replace(read_config(folder, "r1"), ablations=ablations)).to(dtype or torch.float32)
        state = {k: v.to(model.dtype) for k, v in checkpoints.load_state(folder).items()}
        unused = {name for name, p in model.named_parameters() if _UNUSED.search(name)}
        added = {name: v for name, v in model.state_dict().items() if "control" in name}
        added |= {name: torch.zeros_like(v) for name, v in model.state_dict().items() if name in unused}
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


def read_config(path: Path, variant: Variant | None = None) -> DiT4SRConfig:
    """The network's config: from config.json, from a trainer's metadata, else that of the published full size."""
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{path} has no config.json. A DiT4SR folder holds config.json and {WEIGHTS_NAME} (or its shards): "
                "give the folder 'transformer' of a model from https://huggingface.co/acceptee/DiT4SR."
            )
        content = json.loads(file.read_text())
    else:
        content = checkpoints.read_header(path).config
    if variant is None and "variant" not in content.get("fourfold", {}):
        variant = guess_variant(path)
    return DiT4SRConfig.from_json(content, **({"variant": variant} if variant else {}))


def guess_variant(path: Path) -> Variant:
    """`dit4sr_f` and `dit4sr_q` are the first network (v1), anything else the revised one (r1)."""
    names = [part.lower() for part in path.resolve().parts[-3:]]
    return "v1" if any(n.startswith(("dit4sr_f", "dit4sr_q", "dit4sr_v1")) for n in names) else "r1"


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale[:, None]) + shift[:, None]
