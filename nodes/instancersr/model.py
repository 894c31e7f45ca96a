"""The InstanceRSR network: DiT over the joint latent of picture and instance map, led by the LR latent (section 2).

    model = InstanceRSR.from_base("DiT-XL-2-512")           # a new training
    model = InstanceRSR.from_pretrained("instancersr.safetensors")
    eps, variance, features = model(latent, lr_latent, timestep)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from ..common import checkpoints
from ..common.conv_head import ConvHead
from .base import BASE_PAGE, control_copies, find_base, widened
from .config import Ablations, InstanceRSRConfig
from .control import ControlBranch
from .diffusion import to_epsilon
from .dit import PatchEmbedding, dit_block, unpatchify, zero_adaptive_norms

METHOD = "instancersr"
WEIGHTS_NAME = "instancersr.safetensors"
ORIGIN = "No weights of InstanceRSR are published: give a file that trainers/train_instancersr.py exported."


class Prediction(NamedTuple):
    """What the network makes of a noisy joint latent.

    eps: the noise [eps_x, eps_m], (B, 2C, h, w), dtype of the latent; without mask modelling (B, C, h, w).
    variance: the base's learned variance, same shape, raw; None where the network has none.
    features: tokens after the aligned block, ControlNet addition included, (B, N, D).
    """

    eps: Tensor
    variance: Tensor | None
    features: Tensor


class InstanceRSR(nn.Module):
    """DiT with doubled input and output, ControlNet branch and alignment head."""

    def __init__(self, config: InstanceRSRConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.width
        self.pos_embed = PatchEmbedding(config, config.joint_channels)
        self.transformer_blocks = nn.ModuleList(dit_block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.control = ControlBranch(config)
        self.align = alignment_head(config) if config.ablations.representation_learning else None
        self.head = conv_head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out_2.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.proj_out_2.weight.device

    def forward(self, latent: Tensor, lr_latent: Tensor, timestep: Tensor) -> Prediction:
        """Noise in the joint latent (the epsilon-prediction of equation 3).

        Args:
            latent: z_t of [z_x, z_m], (B, 2C, h, w), scaled as in the config; h and w multiples of the patch size.
            lr_latent: z_y of the LR picture, enlarged to the target, (B, C, h, w).
            timestep: 0..999, whole numbers, (B,) or a scalar.
        Raises: ValueError if the latents do not fit each other or the patches.
        """
        grid, timestep = self._check(latent, lr_latent, timestep)
        features, tokens = self._tokens(latent, lr_latent, timestep)
        emb = self.transformer_blocks[0].norm1.emb(timestep, self._classes(timestep), hidden_dtype=tokens.dtype)
        shift, scale = self.proj_out_1(silu(emb)).chunk(2, dim=1)
        tokens = self.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None]
        output = unpatchify(self.proj_out_2(tokens), grid, self.config.patch_size)
        output, variance = output.split([self.config.joint_channels, output.shape[1] - self.config.joint_channels], 1)
        if self.head is not None:
            output = self.head(output, lr_latent.to(output.dtype))
        eps = self._epsilon(output.to(latent.dtype), latent, lr_latent.to(latent.dtype), timestep)
        return Prediction(eps, variance.to(latent.dtype) if self.config.learned_variance else None, features)

    def block_features(self, latent: Tensor, lr_latent: Tensor, timestep: Tensor) -> list[Tensor]:
        """Tokens after every block, ControlNet additions included, (B, N, D) each: what linear probing looks at."""
        _, timestep = self._check(latent, lr_latent, timestep)
        features: list[Tensor] = []
        self._tokens(latent, lr_latent, timestep, features.append)
        return features

    def _tokens(
        self, latent: Tensor, lr_latent: Tensor, timestep: Tensor, after_block: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The features that are aligned, and the last block's tokens."""
        classes = self._classes(timestep)

        def run(block: nn.Module, tokens: Tensor) -> Tensor:
            arguments = dict(timestep=timestep, class_labels=classes)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, tokens, use_reentrant=False, **arguments)
            return block(tokens, **arguments)

        added = self.control(lr_latent.to(self.dtype), run)
        tokens = self.pos_embed(latent.to(self.dtype))
        for i, block in enumerate(self.transformer_blocks):
            tokens = run(block, tokens)
            if i < len(added):
                tokens = tokens + added[i]
            if i + 1 == self.config.align_block:
                features = tokens
            if after_block is not None:
                after_block(tokens)
        return features, tokens

    def _classes(self, timestep: Tensor) -> Tensor:
        return torch.full_like(timestep, self.config.null_class, dtype=torch.long)

    def _epsilon(self, output: Tensor, latent: Tensor, lr_latent: Tensor, timestep: Tensor) -> Tensor:
        """The network's output as noise.

        not in the paper: with `anchor = "lr"` the output is the residual of the clean latent on [z_y, 0]: a small
        network then need not learn to copy its input.
        """
        if self.config.anchor == "lr":
            channels = self.config.in_channels
            output = torch.cat([output[:, :channels] + lr_latent, output[:, channels:]], dim=1)
        return to_epsilon(output, latent, timestep, self.config.prediction)

    def _check(self, latent: Tensor, lr_latent: Tensor, timestep: Tensor) -> tuple[tuple[int, int], Tensor]:
        """The token grid, and the timesteps as (B,)."""
        config = self.config
        batch, (height, width) = latent.shape[0], latent.shape[-2:]
        fits = (batch, config.joint_channels, height, width), (batch, config.in_channels, height, width)
        if (tuple(latent.shape), tuple(lr_latent.shape)) != fits:
            raise ValueError(
                f"the noisy latent is {tuple(latent.shape)} and the LR latent {tuple(lr_latent.shape)}; expected "
                f"(B, {config.joint_channels}, h, w) and (B, {config.in_channels}, h, w) of equal size: enlarge the LR "
                "picture to the target size before encoding it."
            )
        patch = config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"a latent of {height} x {width} does not fit: both sides must be multiples of {patch}.")
        return (height // patch, width // patch), timestep.to(latent.device).expand(batch)

    def added_parameters(self) -> list[nn.Parameter]:
        """What a training on a frozen base trains: branch, alignment head, and the two widened layers as a whole."""
        added = ("control.", "align.", "head.", "pos_embed.", "proj_out_2.")
        return [p for name, p in self.named_parameters() if name.startswith(added)]

    def init_from_scratch(self) -> None:
        """Starts a training without a base (tiny family): blocks begin as the identity, the output as zero (DiT's
        adaLN-Zero); the branch's projections keep their random weights, so that the LR latent is heard at once."""
        zero_adaptive_norms(self.transformer_blocks)
        zero_adaptive_norms(self.control.blocks)
        for layer in (self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.head is not None:
            self.head.init_zero()

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None) -> InstanceRSR:
        """Loads a file that `save_pretrained` wrote, or the folder it lies in.

        Args:
            dtype: of the weights; None = float32.
        Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError, MismatchedKeysError.
        """
        path = find_network(path)
        config = read_config(path)
        with torch.device("meta"):
            model = cls(config)
        state = checkpoints.load_state(path)
        for name, value in state.items():  # one by one: the whole network is never there in two precisions
            state[name] = value.to(dtype or torch.float32)
        checkpoints.load_strict(model, state, source=path)
        return model.eval().requires_grad_(False)

    @classmethod
    def from_base(
        cls,
        folder: str | Path,
        ablations: Ablations | None = None,
        dtype: torch.dtype | None = None,
        **own: Any,
    ) -> InstanceRSR:
        """A new network on a DiT (a diffusers folder), ready for training.

        Its noise for z_x is the base's on z_x, whatever z_m and z_y are: what the patch embedding and the output layer
        gained is zero, and so are the branch's projections; the branch's blocks are copies.

        Args:
            folder: the pipeline's folder or its `transformer`.
            ablations: parts of the method to leave out; None = none.
            dtype: of the weights; None = float32.
            own: fields of `InstanceRSRConfig` that the base does not say (align_dim, control_blocks, ...).
        Raises: as `from_pretrained`, with everything but the added layers matched strictly.
        """
        folder = find_base(folder)
        header = checkpoints.read_header(folder)
        checkpoints.require_family(header, "dit", folder, f"The training starts from the folder of {BASE_PAGE}.")
        if "pos_embed.proj.weight" not in header.tensors or not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not in diffusers' layout, with config.json: give the folder of {BASE_PAGE}.")
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = InstanceRSRConfig.from_base(content, ablations=ablations or Ablations(), **own)
        with torch.device("meta"):
            model = cls(config)
        dtype = dtype or torch.float32
        base = {name: value.to(dtype) for name, value in checkpoints.load_state(folder).items()}
        base.pop("pos_embed.pos_embed", None)  # computed, not learned
        state = widened(base, config) | control_copies(base, config) | _fresh(config, dtype)
        checkpoints.load_strict(model, state, source=folder)
        return model

    def save_pretrained(self, path: str | Path, state: dict[str, Tensor] | None = None, **summary: Any) -> Path:
        """Writes one file that describes itself.

        Args:
            path: the file, or a folder for `WEIGHTS_NAME`.
            state: other weights than the module's own (an EMA, say).
            summary: step, licence, training and dtype for `checkpoints.save_checkpoint`.
        Returns: the file.
        """
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
        config = self.config.to_json()
        checkpoints.save_checkpoint(path, state or self.state_dict(), method=METHOD, config=config, **summary)
        return path


def alignment_head(config: InstanceRSRConfig) -> nn.Sequential:
    """The learnable head h_phi of equation 5: a feature (.., D) -> DINOv2's width (.., align_dim)."""
    hidden = config.align_hidden
    return nn.Sequential(
        nn.Linear(config.width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, config.align_dim),
    )


def conv_head(config: InstanceRSRConfig) -> ConvHead | None:
    """The tiny network's head over picture and map, which sees the LR latent."""
    return ConvHead(config.joint_channels, config.in_channels, config.head_width) if config.head_width else None


def _fresh(config: InstanceRSRConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights of the parts that have no counterpart in a base."""
    parts = {"head": conv_head(config)}
    if config.ablations.representation_learning:
        parts["align"] = alignment_head(config)
    states = {part: module.state_dict() for part, module in parts.items() if module is not None}
    return {f"{part}.{name}": value.to(dtype) for part in states for name, value in states[part].items()}


def find_network(path: str | Path) -> Path:
    """The file of the network: of a folder its `instancersr.safetensors`.

    Raises: FileNotFoundError if nothing is there.
    """
    path = Path(path).expanduser()
    path = path / WEIGHTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"the InstanceRSR network is missing: there is no {path}. {ORIGIN}")
    return path


def read_config(path: str | Path) -> InstanceRSRConfig:
    """What a file that `save_pretrained` wrote says of its network; only its header is read.

    Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError; ValueError if the config is missing or unknown.
    """
    header = checkpoints.read_header(path)
    checkpoints.require_family(header, METHOD, path, ORIGIN)
    if not header.config:
        raise ValueError(f"{path} does not describe itself: its metadata lack the config. Export it once more.")
    return InstanceRSRConfig.from_json(header.config)
