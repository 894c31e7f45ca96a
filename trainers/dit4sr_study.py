"""What the DiT4SR training computes: its inputs from photographs, its loss, its exports and its sample pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nodes.common.autoencoder import to_model, to_vae
from ..nodes.common.checkpoints import DEFAULT_LICENCE
from ..nodes.common.images import resize, write_image
from ..nodes.common.losses import edge_loss
from ..nodes.common.text import TextEmbedding
from ..nodes.common.tiny import FILES
from ..nodes.common.tiny_text import TinyTextEncoder
from ..nodes.dit4sr.config import PRESETS
from ..nodes.dit4sr.losses import add_noise, flow_matching_loss, logit_normal_sigma
from ..nodes.dit4sr.model import TIMESTEPS, DiT4SRTransformer
from ..nodes.dit4sr.prompts import positive_prompt
from ..nodes.dit4sr.restore import System, restore

if TYPE_CHECKING:
    from .train_dit4sr import DiT4SRTraining

LICENCES = {  # preset -> of the exported weights, which at full size hold those of the base
    "tiny": DEFAULT_LICENCE, "full": "Stability AI Community License (derived from Stable Diffusion 3.5 medium)"}
INFERENCE_T5_LENGTH = 256  # tokens of the prompts of sample pictures, as the published inference takes
_PLACES = ("output_dir", "cache", "resume")  # paths that say nothing about the weights


class DiT4SRStudy(nn.Module):
    """The network with what turns photographs into its inputs; only what is trained requires a gradient.

    Attributes:
        text: text encoder, or what stands in for it; None until a cache gives one.
        samples: photographs (items of `Photographs`) that sample pictures are drawn of.
    """

    def __init__(
        self, config: DiT4SRTraining, transformer: DiT4SRTransformer, autoencoder: nn.Module, text: nn.Module | None
    ):
        super().__init__()
        self.config = config
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.samples: list[dict[str, Any]] = []

    def enable_gradient_checkpointing(self) -> None:
        self.transformer.gradient_checkpointing = True

    def train(self, mode: bool = True) -> DiT4SRStudy:
        """As nn.Module's, but frozen parts stay as they are used: T5 has dropout."""
        super().train(mode)
        for part in (self.autoencoder, self.text):
            if isinstance(part, nn.Module) and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Flow-matching loss (section 3.1) of a batch of photographs, or of what `encode` made of them.

        Args:
            batch: `hr` (B, 3, H, W) and `lr` (B, 3, H/4, W/4) in 0..1 and `caption` (B texts); or what `encode` gives.
            generator: of the CPU; all draws come from it.
        """
        config = self.config
        z, z_lr = (batch["latent"], batch["lr_latent"]) if "latent" in batch else self.latents(batch["hr"], batch["lr"])
        sigma = logit_normal_sigma(len(z), generator, config.sigma_mean, config.sigma_std, config.sigma_shift)
        noise = torch.randn(z.shape, generator=generator).to(z)
        null = torch.rand(len(z), generator=generator) < config.null_prompt
        sigma = sigma.to(z.device)
        text = self.prompts(batch, null)
        x_t = add_noise(z, noise, sigma)
        velocity = self.transformer(
            x_t, z_lr, sigma * TIMESTEPS, text.prompt_embeds, text.pooled, injection_scale=1.0
        )
        loss = flow_matching_loss(velocity, z, noise, sigma, config.loss_weight, config.l1)
        if config.edge:
            restored = x_t - sigma[:, None, None, None] * velocity
            loss = loss + config.edge * edge_loss(self.pixels(restored), self.pixels(z))
        return loss

    def pixels(self, z: Tensor) -> Tensor:
        """The pictures that scaled latents stand for, in float32; the tiny codec lets gradients through."""
        network = self.transformer.config
        with torch.autocast(z.device.type, enabled=False):
            return self.autoencoder.decode(to_vae(z.float(), network.latent_shift, network.latent_scale))

    @torch.no_grad()
    def latents(self, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latents of the clean crops and of the LR crops enlarged to their size, float32."""
        network = self.transformer.config
        with torch.autocast(hr.device.type, enabled=False):
            encoded = [self.autoencoder.encode(x) for x in (hr, resize(lr, hr.shape[-2:]))]
        return tuple(to_model(z.float(), network.latent_shift, network.latent_scale) for z in encoded)

    def prompts(self, batch: dict[str, Any], null: Tensor) -> TextEmbedding:
        """The batch's prompts, empty where `null` (B,) says so."""
        if "caption" in batch:
            return self.encode_text(["" if n else c for c, n in zip(batch["caption"], null.tolist(), strict=True)])
        if "prompt_ids" in batch:
            ids, mask = (_replace(batch[f"prompt_{name}"], null, empty)
                         for name, empty in zip(("ids", "mask"), self.text.tokenize([""]), strict=True))
            return self.text(ids, mask)
        empty = self.encode_text([""])
        return TextEmbedding(
            _replace(batch["prompt_embeds"], null, empty.prompt_embeds), _replace(batch["pooled"], null, empty.pooled)
        )

    def encode_text(self, prompts: list[str]) -> TextEmbedding:
        if isinstance(self.text, TinyTextEncoder):
            return self.text.encode(prompts)
        with torch.no_grad():
            return self.text.encode(prompts, t5_length=self.config.t5_length)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the cache holds of a batch of photographs: latents and prompt embeddings; where the text encoder itself
        is trained, its input instead of its output."""
        z, z_lr = self.latents(batch["hr"], batch["lr"])
        latents = {"latent": z, "lr_latent": z_lr}
        if isinstance(self.text, TinyTextEncoder):
            ids, mask = self.text.tokenize(batch["caption"])
            return {**latents, "prompt_ids": ids, "prompt_mask": mask}
        text = self.encode_text(batch["caption"])
        return {**latents, "prompt_embeds": text.prompt_embeds, "pooled": text.pooled}

    def save(self, state: dict[str, Tensor], folder: Path, step: int) -> None:
        """Writes `transformer/` in the published format and, of a tiny network, its text encoder and codec."""
        summary = {"step": step, "training": self.summary(), "dtype": getattr(torch, self.config.export_dtype),
                   "licence": LICENCES[self.config.preset]}
        self.transformer.save_pretrained(folder / "transformer", _part(state, "transformer."), **summary)
        if isinstance(self.text, TinyTextEncoder):
            self.text.save(folder / FILES["text"], _part(state, "text."), **summary)
            self.autoencoder.save(folder / FILES["codec"])

    def summary(self) -> dict[str, Any]:
        """The settings as exported files carry them: of folders their names only."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _PLACES}
        return {name: Path(value).name if name in ("photographs", "sd3", "codec", "start") and value else value
                for name, value in settings.items()}

    def sample_prompts(self) -> list[tuple[str, int]]:
        """Prompts that `sample` asks for, with their length in T5's tokens."""
        preset = PRESETS[self.config.preset]
        prompts = [positive_prompt(item["caption"], preset.added_prompt) for item in self.samples]
        return [(prompt, INFERENCE_T5_LENGTH) for prompt in [*prompts, preset.negative_prompt] if self.samples]

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Restores the samples as users will, and writes sheets LR | restored | clean.

        Returns: `sample_psnr`, the mean over the samples in dB.
        """
        system = System.of(PRESETS[self.config.preset], self.transformer, self.autoencoder, self.text)
        mixed = self.transformer.dtype != torch.float32  # a base in half precision under float32 adapters
        psnr = []
        for index, item in enumerate(self.samples):
            hr, lr = item["hr"][None], item["lr"][None]
            with torch.autocast(system.device.type, dtype=torch.bfloat16, enabled=mixed):
                sr = restore(lr, system, size=tuple(hr.shape[-2:]), seed=index, prompt=item["caption"])
            sheet = torch.cat([resize(lr, hr.shape[-2:]), sr, hr], dim=-1)
            write_image(folder / f"step-{step:08d}-{index}.png", sheet, {"caption": item["caption"]})
            psnr.append(-10 * float((sr - hr).square().mean().clamp(min=1e-10).log10()))
        return {"sample_psnr": sum(psnr) / len(psnr)} if psnr else {}


def _replace(rows: Tensor, chosen: Tensor, row: Tensor) -> Tensor:
    """`rows` (B, ...) with `row` (1, ...) where `chosen` (B,) is true."""
    return torch.where(chosen.to(rows.device).view(-1, *[1] * (rows.ndim - 1)), row.to(rows), rows)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
