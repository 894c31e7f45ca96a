"""Options that several commands share: which method with which weights, and how it samples."""

import argparse
from collections.abc import Callable
from typing import Any

METHODS = ("dit4sr", "instantir")
COLOR_FIXES = ("adain", "wavelet", "none")
ADAPTIVE = ("off", "paper", "release")

# Option names that are handed to the method as they are; None = left to the method (the paper's value).
SAMPLING = ("steps", "prompt", "negative", "guidance", "start_sigma", "tile", "overlap", "tile_batch", "color_fix",
            "scheduler", "preview_start", "creative_start", "adaptive", "conditioning_scale")


def at_least(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number of `minimum` or more, up to `maximum`."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            limit = "" if maximum is None else f" and at most {maximum}"
            raise argparse.ArgumentTypeError(f"a whole number of at least {minimum}{limit} is expected, not {text!r}")
        return value
    return parse


seed = at_least(0, 2**64 - 1)


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and at most 1 is expected, not {text!r}")
    return value


def part(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is expected, not {text!r}")
    return value


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0 is expected, not {text!r}")
    return value


def dimensions(text: str) -> tuple[int, int]:
    """An argparse type: WIDTHxHEIGHT in pixels, as (height, width)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"WIDTHxHEIGHT in pixels is expected, like 1024x768, not {text!r}")
    return int(height), int(width)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --base, --captioner and --device."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="tiny", metavar="tiny|PATH",
                       help="the embedded tiny weights, or a folder with the method's own (default: tiny)")
    group.add_argument("--base", metavar="PATH", help="folder of the base model (VAE, text encoders); not for tiny")
    group.add_argument("--captioner", default="embedded", metavar="embedded|FOLDER",
                       help="what describes the picture where no --prompt is given: measurements, or the image-to-text "
                            "model of transformers in a folder (default: embedded)")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps or xpu (default: the best there is)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How the method samples; what is not given is left to the method's defaults."""
    group = parser.add_argument_group("sampling (default: what suits the weights; for full size the paper's values)")
    group.add_argument("--steps", type=at_least(1), help="denoising steps")
    group.add_argument("--prompt", help="what the picture shows (default: a caption made from it)")
    group.add_argument("--negative", help="what the picture should not look like")
    group.add_argument("--guidance", type=positive, help="classifier-free guidance; 1 = none")
    group.add_argument("--start-sigma", type=fraction,
                       help="dit4sr: noise level to start from: 1 = pure noise, less = nearer to the input")
    group.add_argument("--tile", type=at_least(1), help="side of the windows, in latent pixels")
    group.add_argument("--overlap", type=at_least(0), help="overlap of the windows, in latent pixels")
    group.add_argument("--tile-batch", type=at_least(1), help="windows per call of the network")
    group.add_argument("--color-fix", choices=COLOR_FIXES, help="how the input's colours are put back")
    group = parser.add_argument_group("sampling of instantir")
    group.add_argument("--scheduler", help='"ddim", "ddpm", "euler", "dpm++ 2m", ...: how steps are taken')
    group.add_argument("--preview-start", type=part, metavar="0..1",
                       help="the input is its own reference before this part of the steps: closer to it")
    group.add_argument("--creative-start", type=part, metavar="0..1",
                       help="the input is let go after this part of the steps: lower = freer, for prompts that edit")
    group.add_argument("--adaptive", choices=ADAPTIVE, help="how far previews are trusted: adaptive restoration")
    group.add_argument("--conditioning-scale", type=positive, help="weight of the input and the previews")


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that the command has and that were given, as keyword arguments of `fourfold.restore`."""
    return {name: value for name in SAMPLING if (value := getattr(options, name, None)) is not None}
