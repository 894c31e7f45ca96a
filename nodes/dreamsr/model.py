"""The DreamSR network: FLUX, the MM-ControlNet and the RA-LoRA (DreamSR section 3).

    model = DreamSR.from_pretrained("dreamsr.safetensors", base="flux1-dev.safetensors")
    z_dr = model.degradation_removal(z_lq, prompt, local)
    velocity = model(z_t, z_dr, t, prompt, local)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from ..common import checkpoints
from ..common.conv_head import ConvHead
from ..common.flux import PATCH, load_flux, unpack
from ..common.text import TextEmbedding
from .attention import JointAttention
from .config import PARTS, DreamSRConfig
from .control import MMControlNet
from .ra_lora import NAME as LORA_NAME
from .ra_lora import add_ra_lora, file_name
from .streams import Streams, embed, run_block
from .weights import gather, save

SHORTEST_TIME = 1e-3  # what an anchored output is divided by at least


class DreamSR(nn.Module):
    """Velocity of the rectified flow of one patch, or of a whole small picture.

    Attributes:
        base: FLUX (diffusers), with the layers of the RA-LoRA in it.
        control: the MM-ControlNet.
        head: of tiny networks, else None.
    """

    def __init__(self, config: DreamSRConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.base = FluxTransformer2DModel(**config.flux())
        self.control = MMControlNet(config)
        channels = config.latent_channels
        self.head = ConvHead(channels, channels, config.head_width) if config.head_width else None
        if config.lora_rank:
            add_ra_lora(self.base, config)
        blocks = (self.base.transformer_blocks, self.base.single_transformer_blocks, self.control.blocks)
        for block in chain(*blocks):
            block.attn.set_processor(JointAttention())

    @property
    def dtype(self) -> torch.dtype:
        return self.base.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.base.proj_out.weight.device

    def forward(
        self,
        latent: Tensor,
        condition: Tensor,
        t: Tensor | float,
        prompt: TextEmbedding,
        local: TextEmbedding,
        guidance: Tensor | float = 3.5,
        *,
        lora: bool = False,
        control_scale: float | tuple[float, float] = 1.0,
    ) -> Tensor:
        """Velocity `noise - z_0` at the noisy latent of a patch.

        Args:
            latent: z_t, (B, C, h, w), scaled as in the config; h and w even. FLUX sees it.
            condition: z_lq or z_dr of the same patch, same shape. The MM-ControlNet sees it.
            t: 0 = clean, 1 = noise; a number, a scalar or (B,).
            prompt: global prompts, B rows; FLUX sees them.
            local: the patches' prompts, B rows; the MM-ControlNet sees them.
            guidance: scale that a FLUX with guidance embedding is told; a number, a scalar or (B,).
            lora: with the RA-LoRA (degradation removal), or without (texture generation).
            control_scale: factor of the injections, or one each for picture and text; 1 as trained, 0 = plain FLUX.
        Returns: (B, C, h, w), dtype of `latent`.
        Raises: ValueError for shapes or prompts that do not fit, or `lora` where there is none.
        """
        self._check(latent, condition, prompt, local, lora)
        scales = (control_scale,) * 2 if isinstance(control_scale, int | float) else control_scale
        batch, times = len(latent), {}
        for name, value in (("t", t), ("guidance", guidance)):
            times[name] = torch.as_tensor(value, dtype=torch.float32, device=latent.device).expand(batch)
        t, told = times["t"], times["guidance"] if self.config.guidance_embeds else None

        main = embed(self.base, self.base.pos_embed, latent, prompt, t, told)
        patch = embed(self.control, self.base.pos_embed, condition, local, t, told) if any(scales) else None
        main = self._blocks(main, patch, lora, scales)
        tokens = self.base.proj_out(self.base.norm_out(main.image, main.emb))
        output = unpack(tokens, *latent.shape[-2:])
        if self.head is not None:
            output = self.head(output, condition.to(output.dtype))
        return self._velocity(output.to(latent.dtype), latent, condition.to(latent.dtype), t.to(latent.dtype))

    def _blocks(self, main: Streams, patch: Streams | None, lora: bool, scales: tuple[float, float]) -> Streams:
        """FLUX's streams after all its blocks; the MM-ControlNet's blocks run right after those they are copies of."""
        checkpointing = self.gradient_checkpointing
        copies = {layer: k for k, layer in enumerate(self.config.control_layers)} if patch is not None else {}
        for layer, block in enumerate(self.base.transformer_blocks):
            main = run_block(block, main, lora, checkpointing)
            if layer in copies:
                k = copies[layer]
                patch = run_block(self.control.blocks[k], patch, checkpointing=checkpointing)
                main = self.control.inject(k, main, patch, scales)
        for block in self.base.single_transformer_blocks:
            main = run_block(block, main, lora, checkpointing)
        return main

    def _velocity(self, output: Tensor, latent: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        """The network's output read as a velocity.

        not in the paper: with `anchor = "lr"` the output is the residual of the clean latent on the condition,
        z_0 = condition + output and v = (z_t - z_0) / t: a small network then need not learn to copy its input.
        """
        if self.config.anchor == "none":
            return output
        return (latent - condition - output) / t.clamp(min=SHORTEST_TIME)[:, None, None, None]

    def degradation_removal(
        self,
        z_lq: Tensor,
        prompt: TextEmbedding,
        local: TextEmbedding,
        guidance: Tensor | float = 3.5,
        **options: Any,
    ) -> Tensor:
        """z_dr = z_lq - t_dr v, with v of one evaluation with the RA-LoRA at t_dr, z_lq as both of its latents
        (section 3.2; not in the paper: t_dr, see the config).

        Args:
            z_lq: latent of the LR patch, (B, C, h, w), scaled.
            prompt, local, guidance, options: as `forward`'s.
        Returns: (B, C, h, w), dtype of `z_lq`.
        """
        t_dr = self.config.t_dr
        return z_lq - t_dr * self(z_lq, z_lq, t_dr, prompt, local, guidance, lora=True, **options)

    def _check(
        self, latent: Tensor, condition: Tensor, prompt: TextEmbedding, local: TextEmbedding, lora: bool
    ) -> None:
        if latent.shape != condition.shape:
            raise ValueError(
                f"the noisy latent is {tuple(latent.shape)} but the LR latent {tuple(condition.shape)}; they must be "
                "of one shape: enlarge the LR picture to the target size before encoding it."
            )
        channels, height, width = latent.shape[-3:]
        if channels != self.config.latent_channels or height % PATCH or width % PATCH:
            raise ValueError(
                f"a latent of {channels} channels, {height} x {width}, does not fit: {self.config.latent_channels} "
                "channels and even sides are expected. Pad the picture (LR Prepare does)."
            )
        for name, text in (("global", prompt), ("local", local)):
            if len(text) != len(latent):
                raise ValueError(f"{len(text)} {name} prompts for {len(latent)} patches; one for each is expected.")
        if lora and not self.config.lora_rank:
            raise ValueError(
                "this network has no RA-LoRA, which the degradation removal needs. Load one beside the MM-ControlNet, "
                "or leave the degradation removal out."
            )

    # what is trained --------------------------------------------------------------------------------------------------

    def lora_parameters(self) -> list[nn.Parameter]:
        """The RA-LoRA: trained in the one-step degradation removal."""
        return [p for name, p in self.base.named_parameters() if f".{LORA_NAME}." in name]

    def control_parameters(self) -> list[nn.Parameter]:
        """The MM-ControlNet: trained in the multi-step texture generation."""
        return list(self.control.parameters())

    def base_parameters(self) -> list[nn.Parameter]:
        """FLUX, and a tiny network's head: frozen in the paper, trained along at tiny size."""
        base = [p for name, p in self.base.named_parameters() if f".{LORA_NAME}." not in name]
        return base + ([] if self.head is None else list(self.head.parameters()))

    def init_from_scratch(self) -> None:
        """Starts a training without a base (tiny family): FLUX's blocks begin as the identity, its output as zero
        (DiT's adaLN-Zero), and the MM-ControlNet as their copy."""
        blocks = [*self.base.transformer_blocks, *self.base.single_transformer_blocks]
        modulations = [getattr(block, name).linear for block in blocks for name in ("norm1", "norm1_context", "norm")
                       if hasattr(block, name)]
        for layer in (*modulations, self.base.norm_out.linear, self.base.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.head is not None:
            self.head.init_zero()
        self.control.copy_from(self.base)

    def add_ra_lora(self, rank: int, alpha: int | None = None) -> None:
        """Adds a new RA-LoRA to a network that has none; it changes nothing before it is trained."""
        if self.config.lora_rank:
            raise ValueError(f"the network has a RA-LoRA already, of rank {self.config.lora_rank}.")
        self.config = replace(self.config, lora_rank=rank, lora_alpha=alpha)
        add_ra_lora(self.base, self.config)

    # files ------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_base(cls, base: str | Path, dtype: torch.dtype | None = None, **own: Any) -> DreamSR:
        """A new network on FLUX.1-dev, ready for training: it computes what FLUX computes.

        Args:
            base: diffusers folder or the makers' single file (`common.flux.load_flux`).
            dtype: of all weights; None = float32.
            own: fields of `DreamSRConfig` beyond FLUX's, e.g. lora_rank.
        Raises: what `load_flux` raises.
        """
        sizes, state = load_flux(base, dtype or torch.float32)
        config = DreamSRConfig.of_flux(sizes, **own)
        with torch.device("meta"):
            model = cls(replace(config, lora_rank=0))
        checkpoints.load_strict(model.base, state, source=base)
        model.control.start_on(model.base)
        if model.head is not None:
            model.head = ConvHead(config.latent_channels, config.latent_channels, config.head_width).to(model.dtype)
        if config.lora_rank:
            model.add_ra_lora(config.lora_rank, config.lora_alpha)
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        base: str | Path | None = None,
        ra_lora: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> DreamSR:
        """Loads what `save_pretrained` wrote.

        Args:
            path: the file, or the folder that it lies in: the whole network, or its adapters alone.
            base: FLUX (see `common.flux.load_flux`), for a file of adapters.
            ra_lora: file whose RA-LoRA is taken instead of (or where there is none in) `path`.
            dtype: of the weights; None = float32.
        Returns: the network in evaluation mode, without gradients. Without any RA-LoRA its `config.lora_rank` is 0.
        Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError, MismatchedKeysError.
        """
        config, stored = gather(path, base, ra_lora, dtype or torch.float32)
        with torch.device("meta"):
            model = cls(config)
        state = {}
        for name in model.state_dict():
            if file_name(name) in stored:
                state[name] = stored.pop(file_name(name))
        checkpoints.load_strict(model, state | stored, source=path)
        return model.eval().requires_grad_(False)

    def save_pretrained(
        self,
        path: str | Path,
        state: dict[str, Tensor] | None = None,
        parts: Sequence[str] = PARTS,
        **summary: Any,
    ) -> None:
        """Writes one file that describes itself.

        Args:
            path: the .safetensors file, or a folder that gets `weights.NETWORK_FILE`.
            state: other weights than the module's own (an EMA, say), under the module's names; may lack some.
            parts: of `config.PARTS`. At full size ("control", "ra_lora"): FLUX is not ours to pass on.
            summary: step, licence, training and dtype for `checkpoints.save_checkpoint`.
        """
        weights = {file_name(name): value for name, value in (self.state_dict() | (state or {})).items()}
        save(path, self.config, weights, parts, **summary)
