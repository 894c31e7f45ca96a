"""`fourfold restore`: restore and enlarge photographs; one that fails does not stop the others."""

import argparse
import json
import sys
import time
from pathlib import Path

from .jobs import ALWAYS, NEVER, RENAME, Failure, Job, free, plan, sort_out
from .options import METHODS, add_model_options, add_sampling_options, dimensions, positive, seed
from .version import package_version

FORMATS = ("png", "jpg", "webp", "tif")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("restore", help="restore and enlarge photographs", description=__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE|FOLDER", help="photographs, or folders of them")
    parser.add_argument("--recursive", action="store_true", help="take subfolders too, and keep their layout")
    parser.add_argument("--out", type=Path, default=Path("restored"), metavar="DIR",
                        help="where the results go (default: restored)")
    parser.add_argument("--format", choices=FORMATS, default="png", help="file format of the results (default: png)")
    parser.add_argument("--overwrite", choices=(NEVER, ALWAYS, RENAME), default=NEVER,
                        help="where a result exists: skip the photograph, replace the result, or number the new one "
                             "(default: never)")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help=f"default: {METHODS[0]}")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--scale", type=positive, default=4.0, help="factor of the sides (default: 4)")
    target.add_argument("--size", type=dimensions, metavar="WxH", help="exact size in px, instead of --scale")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise; one for all (default: 0)")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Restores all inputs, a line each. Returns 0, or 1 if any of them failed; those are listed at the end."""
    from .checks import check_options

    check_options(options, [options.method])
    jobs, failures = plan(options.inputs, options.out, options.format, recursive=options.recursive)
    waiting, skipped, refused = sort_out(jobs, options.overwrite)
    failures += refused
    for failure in failures:
        _report(failure)
    for job in skipped:
        print(f"{job.source}: skipped, {job.target} exists (see --overwrite)")
    restored = _restore_all(waiting, options, failures) if waiting else 0
    print(f"{restored} restored, {len(skipped)} skipped, {len(failures)} failed", flush=True)
    if failures and restored + len(skipped) + len(failures) > 1:  # the lines above may be long gone
        print("failed:", *(f"  {failure.source}: {failure.reason}" for failure in failures), sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _restore_all(jobs: list[Job], options: argparse.Namespace, failures: list[Failure]) -> int:
    """Loads the weights and restores; what fails is added to `failures`. Returns how many were restored."""
    from .methods import Method

    restored = 0
    method = Method(options.method, options)
    for number, job in enumerate(jobs, 1):
        place = f"[{number}/{len(jobs)}] "
        try:
            done = _restore(job, method, options, place + job.source.name)
            restored += 1
            print(f"{place}{job.source} -> {done}", flush=True)  # now, also where the output is a file or a pipe
        except (ValueError, OSError, RuntimeError) as error:
            failures.append(Failure(job.source, str(error)))
            _report(failures[-1], place)
    return restored


def _report(failure: Failure, place: str = "") -> None:
    print(f"{place}{failure.source}: FAILED: {failure.reason}", file=sys.stderr, flush=True)


def _restore(job: Job, method, options: argparse.Namespace, label: str) -> str:
    """Restores one photograph, on a terminal with a bar. Returns where it went, its sizes and how long it took."""
    from tqdm import tqdm

    from ..nodes.common.image_files import read_image, write_image

    started = time.perf_counter()
    target = free(job.target, Path.exists) if options.overwrite == RENAME else job.target
    lr = read_image(job.source)
    if options.format == "jpg" and lr.shape[1] in (2, 4):  # before the work, not after it
        raise ValueError(f"{job.source} has transparency, which JPEG cannot hold; choose --format png, webp or tif.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(desc=label, unit="step", file=sys.stderr, leave=False, disable=not sys.stderr.isatty()) as bar:
        def on_step(step: int, steps: int, *latents: object) -> None:
            bar.total = steps
            bar.update(step + 1 - bar.n)

        sr = method(lr, options.seed, scale=options.scale, size=options.size, on_step=on_step)
    write_image(target, sr, metadata(method, options, job.source))
    before, after = (f"{picture.shape[-1]} x {picture.shape[-2]}" for picture in (lr, sr))
    return f"{target} ({before} -> {after} px, {time.perf_counter() - started:.1f} s)"


def metadata(method, options: argparse.Namespace, source: Path) -> dict[str, str]:
    """What is written into the result, so that it can be made again; of folders only their names."""
    target = {"scale": options.scale} if options.size is None else {"size": options.size}
    settings = {**method.used, "prompt": method.used["prompt"][0]}  # one picture at a time
    made = {"method": method.name, "model": _name(options.model), "base": _name(options.base),
            "captioner": _name(options.captioner), **target, "seed": options.seed, "settings": settings,
            "source": source.name, "version": package_version()}
    return {"Software": f"fourfold {package_version()}", "fourfold": json.dumps(made)}


def _name(folder: str | None) -> str | None:
    """The last part of a path, without what it says about the machine."""
    return folder and Path(folder).resolve().name
