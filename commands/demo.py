"""`fourfold demo`: enlarge the bundled low-quality photographs four times with the tiny models, and measure."""

import argparse
import contextlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_text
from .options import METHODS, at_least, seed

if TYPE_CHECKING:
    from ..nodes.common.evaluation import Pair, Restorer

log = logging.getLogger(__name__)

EXAMPLES = Path(__file__).resolve().parents[1] / "photographs"
BEFORE = "low quality"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("demo", help="enlarge the bundled photographs with tiny models", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR",
                        help="pictures, before/after sheet and numbers go there (default: demo)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--in-process", action="store_true", help="do without ComfyUI")
    where.add_argument("--comfyui", type=Path, metavar="PATH", help="the ComfyUI to run (default: COMFYUI_PATH, else "
                       "~/comfy/ComfyUI, else the one that the suite is installed in)")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeat for several (default: all)")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N photographs")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    parser.add_argument("--device", metavar="NAME",
                        help="cpu, cuda, cuda:1, mps or xpu, when in process (default: the best there is)")
    parser.set_defaults(run=run, model="tiny", base=None)


def run(options: argparse.Namespace) -> int:
    """Makes the pictures, then measures, prints and writes."""
    from ..nodes.common.evaluation import BICUBIC, bicubic, evaluate, summarise
    from ..nodes.common.image_files import write_image
    from .checks import check_options
    from .evaluate import as_csv, format_table
    from .sheet import write_sheet

    methods = options.method or METHODS
    check_options(options, methods)
    pairs = examples(options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, dict] = {pair.name: {BEFORE: bicubic(pair.lr)} for pair in pairs}
    made: dict[str, Restorer] = {}
    spent = {}
    for method in methods:
        with contextlib.ExitStack() as stack:
            started = time.perf_counter()
            engine = open_engine(method, options, stack)
            spent[method] = {"start_s": time.perf_counter() - started, "picture_s": {}}
            for pair in pairs:
                began = time.perf_counter()
                picture = pictures[pair.name][method] = engine(pair.lr, options.seed)
                seconds = spent[method]["picture_s"][pair.name] = time.perf_counter() - began
                height, width = picture.shape[-2:]
                target = options.out / f"{pair.name}-{method}.png"
                write_image(target, picture)
                print(f"{method}: {pair.name}, {pair.lr.shape[-1]} x {pair.lr.shape[-2]} -> {width} x {height} px, "
                      f"{seconds:.1f} s, {target}", flush=True)
            spent[method]["peak_memory_bytes"] = engine.peak_memory()
        made[method] = _looked_up(method, pictures, pairs)
    for pair in pairs:
        pictures[pair.name]["clean"] = pair.hr
    write_sheet(options.out / "sheet.jpg", list(pictures.values()), cell=400)

    numbers = {"seed": options.seed, "spent": spent}
    metrics, why_not = _metrics()
    if metrics:
        rows = evaluate(pairs, {BICUBIC: bicubic, **made}, metrics, clean=False)
        numbers["means"] = means = summarise(rows)
        for method in means:  # here these are the times of a look-up; the real ones are in `spent`
            del means[method]["seconds"]
        write_text(options.out / "scores.csv", as_csv(rows, metrics))
        print(f"means over {len(pairs)} photographs, compared with the clean originals (↑ more is better, ↓ less is)")
        print(format_table(means, metrics))
    else:
        print(f"no quality measured: {why_not}")
    for method, cost in spent.items():
        seconds = list(cost["picture_s"].values())
        print(f"{method}: start {cost['start_s']:.1f} s, {sum(seconds) / len(seconds):.1f} s a picture, "
              f"{cost['peak_memory_bytes'] / 2**30:.2f} GiB of memory at most")
    write_text(options.out / "numbers.json", json.dumps(numbers, indent=2) + "\n")
    print(f"before and after: {options.out / 'sheet.jpg'}")
    return 0


def examples(limit: int | None = None) -> "list[Pair]":
    """The bundled photographs, low quality and clean. Raises FileNotFoundError if they are not there."""
    from ..nodes.common.evaluation import Pair, list_photographs
    from ..nodes.common.image_files import read_image

    return [Pair(file.stem, index, read_image(file), read_image(EXAMPLES / "clean" / f"{file.stem}.jpg"))
            for index, file in enumerate(list_photographs(EXAMPLES / "low_quality")[:limit])]


def open_engine(method: str, options: argparse.Namespace, stack: contextlib.ExitStack):
    """ComfyUI where one is found and starts and the method has a workflow, else this process; says which and why.

    Raises: FileNotFoundError or ServerError if ComfyUI is demanded with --comfyui, but cannot be used.
    """
    from ..headless.server import ComfyServer, ServerError, find_comfyui
    from .engines import InComfyUI, InProcess, tiny_workflow

    if options.in_process:
        print(f"{method}: in this process, as asked", flush=True)
        return InProcess(method, options)
    try:
        tiny_workflow(method)  # before a server is started for nothing
        server = ComfyServer(options.comfyui or find_comfyui())
        print(f"{method}: in ComfyUI, starting the one at {server.comfyui}", flush=True)
        stack.enter_context(server)
    except (FileNotFoundError, ServerError) as error:
        if options.comfyui:
            raise
        log.info("%s", error)
        print(f"{method}: in this process, because: {str(error).splitlines()[0]}", flush=True)
        return InProcess(method, options)
    return InComfyUI(method, server)


def _looked_up(method: str, pictures: dict[str, dict], pairs: "list[Pair]") -> "Restorer":
    """The finished pictures as a restorer, for `evaluate`."""
    by_index = {pair.index: pair.name for pair in pairs}
    return lambda lr, seed: pictures[by_index[seed]][method]


def _metrics():
    """The measures, or why there are none."""
    from ..nodes.common.metrics import MetricsNotInstalledError, load_metrics

    try:
        return load_metrics(("psnr", "psnr_rgb", "ssim", "fsim", "gmsd", "nlpd")), ""
    except MetricsNotInstalledError as error:
        return {}, str(error)
