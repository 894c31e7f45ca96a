"""The nodes that tell InstantIR what it sees: DINO features, DCP tokens, Previewer and Aggregator."""

from comfy_api.latest import io

from ..common.autoencoder import to_vae
from ..common.host.models import on_device, require_method
from ..common.images import from_comfy
from ..common.sampling import cpu_noise
from ..common.vision import FITS
from .adaptive import MODES
from .comfy_sockets import (
    CATEGORY,
    Aggregator,
    AggregatorHandle,
    DINOFeatures,
    DINOModel,
    Features,
    ImageTokens,
    InstantIRModel,
    Previewer,
    PreviewerHandle,
    Tokens,
    on_cpu,
    read_prompts,
    scaled_latent,
    working_memory,
)
from .preview import preview_at


class DINOEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldDINOEncoder",
            display_name="DINO Encoder",
            category=CATEGORY,
            description="Looks at the low-resolution picture with DINOv2. What it recognises in spite of the damage "
            "guides the restoration.",
            inputs=[
                DINOModel.Input("dino", tooltip="From DINO Loader."),
                io.Image.Input("image", tooltip="The picture from LR Prepare, or any other that shows the same."),
                io.Combo.Input("fit", options=list(FITS), default="crop",
                               tooltip="crop: the centre square, as trained. squeeze: the whole picture, distorted "
                               "to a square. tile: squares side by side, so that the ends of a long picture are seen."),
            ],
            outputs=[DINOFeatures.Output("features", display_name="features", tooltip="For DCP Resampler.")])

    @classmethod
    def execute(cls, dino, image, fit) -> io.NodeOutput:
        with on_device(require_method(dino, "dino", "DINO Encoder")) as network:
            features = network.encode(from_comfy(image), fit).cpu()
            return io.NodeOutput(Features(features, network.null_features(1).cpu()))


class DCPResampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldDCPResampler",
            display_name="DCP Resampler",
            category=CATEGORY,
            description="The Degradation Content Perceptor: condenses DINO features into tokens that the UNet and the "
            "Previewer attend to.",
            inputs=[
                InstantIRModel.Input("model", tooltip="From InstantIR Loader or Tiny Models."),
                DINOFeatures.Input("features", tooltip="From DINO Encoder."),
                io.Float.Input("weight", default=1.0, min=0.0, max=2.0, step=0.05,
                               tooltip="How much the picture's content guides, beside the prompt; 1 as trained, 0 = "
                               "not at all."),
            ],
            outputs=[Tokens.Output("tokens", display_name="tokens", tooltip="For Previewer and InstantIR Sampler.")])

    @classmethod
    def execute(cls, model, features, weight) -> io.NodeOutput:
        config = require_method(model, "instantir", "DCP Resampler").network.config
        width, found = config.resampler.embedding_dim, features.image.shape[-1]
        if found != width:
            raise ValueError(
                f"the features are {found} wide, this model's resampler takes {width}. Load the DINOv2 that it was "
                "trained with: DINOv2 large (1024 wide) at full size, vision.safetensors for the tiny network.")
        with on_device(model) as network:
            image, null = (on_cpu(network.perceive(x)) for x in (features.image, features.null))
        return io.NodeOutput(ImageTokens(image, null, weight))


class PreviewerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldPreviewer",
            display_name="Previewer",
            category=CATEGORY,
            description="Shows at every step, in one evaluation, what the picture will become; the Aggregator takes "
            "that as its reference. For InstantIR Sampler, or alone with One-Step Preview.",
            inputs=[
                InstantIRModel.Input("model", tooltip="From InstantIR Loader (with a previewer) or Tiny Models."),
                Tokens.Input("tokens", tooltip="From DCP Resampler; the Previewer has its own among them."),
                io.Boolean.Input("text_guided", default=False,
                                 tooltip="On: the Previewer reads the prompts, too, for editing by text. Off: it reads "
                                 "the empty prompt, as trained."),
                io.Conditioning.Input("empty_prompt", optional=True,
                                      tooltip="CLIP Text Encode of an empty text; needed while text_guided is off."),
            ],
            outputs=[Previewer.Output("previewer", display_name="previewer",
                                      tooltip="For InstantIR Sampler and One-Step Preview.")])

    @classmethod
    def execute(cls, model, tokens, text_guided, empty_prompt=None) -> io.NodeOutput:
        network = require_method(model, "instantir", "Previewer").network
        if network.config.previewer is None or tokens.image.previewer is None:
            raise ValueError("this model has no Previewer: choose previewer_lora_weights.bin as previewer in InstantIR "
                             "Loader, or remove this node.")
        if text_guided:
            return io.NodeOutput(PreviewerHandle(model, tokens, None))
        if empty_prompt is None:
            raise ValueError("text_guided is off, so the Previewer reads the empty prompt: connect a CLIP Text Encode "
                             "with an empty text to empty_prompt, or switch text_guided on.")
        return io.NodeOutput(PreviewerHandle(model, tokens, read_prompts(empty_prompt, network.config)[0][0]))


class OneStepPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldOneStepPreview",
            display_name="One-Step Preview",
            category=CATEGORY,
            description="The Previewer alone: adds noise to a latent and restores it in one evaluation. Shows what the "
            "Previewer knows at a noise level.",
            inputs=[
                Previewer.Input("previewer", tooltip="From Previewer."),
                io.Conditioning.Input("prompt", tooltip="What is in the picture; read where text_guided is on."),
                io.Latent.Input("latent", tooltip="VAE Encode of a picture, for example the one from LR Prepare."),
                io.Float.Input("noise_level", default=0.5, min=0.0, max=1.0, step=0.01,
                               tooltip="How far towards pure noise, in timesteps: 0 = timestep 0, 1 = timestep 999."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Of the noise; picture b of a batch takes seed + b."),
            ],
            outputs=[io.Latent.Output("preview", display_name="preview", tooltip="The preview, for VAE Decode.")])

    @classmethod
    def execute(cls, previewer, prompt, latent, noise_level, seed) -> io.NodeOutput:
        model, config = previewer.model, previewer.model.network.config
        z = scaled_latent(latent, config, "latent")
        text = previewer.text or read_prompts(prompt, config)[0][0]
        with on_device(model, working_memory(model, z[:, 0].numel())) as network:
            preview = preview_at(network, z.to(network.device), cpu_noise(seed, z.shape), noise_level,
                                 previewer.tokens.image, text, previewer.tokens.weight).cpu()
        return io.NodeOutput({"samples": to_vae(preview, config.latent_shift, config.latent_scale)})


class AggregatorNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldAggregator",
            display_name="Aggregator",
            category=CATEGORY,
            description="Reads the low-resolution picture beside a reference (the previews) and steers the UNet with "
            "both: how faithful the result is, and how free.",
            inputs=[
                InstantIRModel.Input("model", tooltip="From InstantIR Loader (with an aggregator) or Tiny Models."),
                io.Latent.Input("lq_latent", tooltip="VAE Encode of the picture from LR Prepare."),
                io.Float.Input("conditioning_scale", default=1.0, min=0.0, max=2.0, step=0.05,
                               tooltip="How strongly it steers; 1 as trained, lower = freer, 0 = not at all."),
                io.Float.Input("preview_start", default=0.0, min=0.0, max=1.0, step=0.05,
                               tooltip="Before this part of the steps the input itself is the reference; 0.1 to 0.4 "
                               "where the result strays from the input."),
                io.Float.Input("creative_start", default=1.0, min=0.0, max=1.0, step=0.05,
                               tooltip="After this part of the steps the Aggregator is off; 1 = never, 0.6 to 0.8 "
                               "against local distortions, lower to edit by text."),
                io.Combo.Input("adaptive", options=list(MODES), default="off",
                               tooltip="Adaptive restoration by delta. paper: a larger delta moves the reference from "
                               "the preview to the input. release: delta weighs the Aggregator's influence."),
                io.Latent.Input("reference", optional=True,
                                tooltip="Read in place of the previews: VAE Encode of a good picture of the same "
                                "size. No Previewer is needed then."),
            ],
            outputs=[Aggregator.Output("aggregator", display_name="aggregator", tooltip="For InstantIR Sampler.")])

    @classmethod
    def execute(cls, model, lq_latent, conditioning_scale, preview_start, creative_start, adaptive,
                reference=None) -> io.NodeOutput:
        config = require_method(model, "instantir", "Aggregator").network.config
        if not config.aggregator:
            raise ValueError("this model has no Aggregator: choose aggregator.pt as aggregator in InstantIR Loader, or "
                             "remove this node.")
        z_lq = scaled_latent(lq_latent, config, "lq_latent")
        z_ref = None if reference is None else scaled_latent(reference, config, "reference")
        if z_ref is not None and z_ref.shape != z_lq.shape:
            raise ValueError(f"the reference is {tuple(z_ref.shape)}, lq_latent {tuple(z_lq.shape)}; expected equal. "
                             "Bring the reference to the size that LR Prepare gives before encoding it.")
        return io.NodeOutput(AggregatorHandle(model, z_lq, z_ref, conditioning_scale, preview_start, creative_start,
                                              adaptive))


NODES = [DINOEncoder, DCPResampler, PreviewerNode, OneStepPreview, AggregatorNode]
