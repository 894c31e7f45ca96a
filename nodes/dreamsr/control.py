"""The Patch Context aware MM-ControlNet: half of FLUX's double blocks, on the LR patch and its prompt (section 3.1)."""

from __future__ import annotations

from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
)
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from einops import rearrange
from torch import Tensor, nn

from ..common.attention import attend
from .attention import normed
from .config import DreamSRConfig
from .streams import Streams


class ZeroMLP(nn.Module):
    """Two linears with a GELU between them; the last one starts at zero, so that nothing is injected at first."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.init_zero()

    def init_zero(self) -> None:
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


class ContextCrossAttention(nn.Module):
    """What the global text takes from the patch's text: M(CrossAttn(P_Q(f_txt), P_K(f_c,txt), P_V(f_c,txt))), eq. 2.

    not in the paper: queries and keys are RMS-normalised a head, as in all of FLUX's attentions; the streams have
    tokens of such size that the softmax would begin with a single one of them.
    """

    def __init__(self, config: DreamSRConfig):
        super().__init__()
        dim, self.heads = config.inner_dim, config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(config.attention_head_dim, eps=1e-6) for _ in range(2))
        self.mlp = ZeroMLP(dim)

    def forward(self, text: Tensor, local_text: Tensor) -> Tensor:
        """Global text tokens (B, M, D) and the patch's (B, M', D) -> what is added to the former, (B, M, D)."""
        q = normed(self._split(self.to_q(text)), self.norm_q)
        k, v = normed(self._split(self.to_k(local_text)), self.norm_k), self._split(self.to_v(local_text))
        return self.mlp(rearrange(attend(q, k.to(q), v.to(q)), "b h m d -> b m (h d)"))

    def _split(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b m (h d) -> b h m d", h=self.heads)


class MMControlNet(nn.Module):
    """Copies of the blocks `config.control_layers` and of the embedders, with an injection into FLUX after each.

    Attributes:
        blocks: the copies; blocks[k] is that of FLUX's double block control_layers[k].
        image_injections, text_injections: `ZeroMLP` and `ContextCrossAttention`, one each a block.
    """

    def __init__(self, config: DreamSRConfig):
        super().__init__()
        dim, pooled = config.inner_dim, config.pooled_projection_dim
        times = CombinedTimestepTextProjEmbeddings
        if config.guidance_embeds:
            times = CombinedTimestepGuidanceTextProjEmbeddings
        self.time_text_embed = times(embedding_dim=dim, pooled_projection_dim=pooled)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.x_embedder = nn.Linear(config.in_channels, dim)
        sizes = dict(num_attention_heads=config.num_attention_heads, attention_head_dim=config.attention_head_dim)
        self.layers = config.control_layers
        self.blocks = nn.ModuleList(FluxTransformerBlock(dim=dim, **sizes) for _ in self.layers)
        self.image_injections = nn.ModuleList(ZeroMLP(dim) for _ in self.layers)
        self.text_injections = nn.ModuleList(ContextCrossAttention(config) for _ in self.layers)

    def copy_from(self, transformer: FluxTransformer2DModel) -> None:
        """Embedders and blocks become copies of FLUX's; the injections stay as they are."""
        for mine, theirs in self._copies(transformer):
            mine.load_state_dict(_plain_state(theirs))

    def start_on(self, transformer: FluxTransformer2DModel) -> None:
        """Starts a training: as `copy_from`, with new injections, which inject nothing yet, in FLUX's precision.

        The module may be on the meta device before.
        """
        weight = transformer.proj_out.weight
        for mine, theirs in self._copies(transformer):
            mine.load_state_dict({name: value.clone() for name, value in _plain_state(theirs).items()}, assign=True)
        for injection in (self.image_injections, self.text_injections):
            injection.to_empty(device=weight.device).to(weight.dtype)
            for module in injection.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            for module in injection.modules():
                if isinstance(module, ZeroMLP):
                    module.init_zero()

    def _copies(self, transformer: FluxTransformer2DModel) -> list[tuple[nn.Module, nn.Module]]:
        names = ("time_text_embed", "context_embedder", "x_embedder")
        blocks = [transformer.transformer_blocks[layer] for layer in self.layers]
        embedders = [(getattr(self, name), getattr(transformer, name)) for name in names]
        return embedders + list(zip(self.blocks, blocks, strict=True))

    def inject(
        self, k: int, streams: Streams, local: Streams, scales: tuple[float, float] = (1.0, 1.0)
    ) -> Streams:
        """FLUX's streams after the block that blocks[k] is a copy of.

        f_img <- f_img + M_img(f_c,img) (equation 1) and f_txt <- f_txt + M_txt(CrossAttn(...)) (equation 2;
        not in the paper: the residual, without which a new injection would erase the text).

        Args:
            streams: FLUX's, after its block.
            local: the MM-ControlNet's, after blocks[k].
            scales: factors of the two injections, picture and text; 1 as trained.
        """
        image, text = streams.image, streams.text
        dtype = self.x_embedder.weight.dtype
        if scales[0]:
            image = image + scales[0] * self.image_injections[k](local.image).to(image.dtype)
        if scales[1]:
            text = text + scales[1] * self.text_injections[k](text.to(dtype), local.text).to(text.dtype)
        return streams.with_tokens(image, text)


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a part of FLUX without a LoRA that may lie in it."""
    state = {name: value for name, value in module.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}
