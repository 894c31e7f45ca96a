"""`fourfold restore`: restore and enlarge photographs; one that fails does not stop the others."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .options import METHODS, add_model_options, add_sampling_options, at_least, dimensions, positive
from .version import package_version

FORMATS = ("png", "jpg", "webp", "tif")
NEVER, ALWAYS, RENAME = "never", "always", "rename"


@dataclass(frozen=True)
class Job:
    """One photograph and the file that its restoration goes to."""

    source: Path
    target: Path


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
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise; one for all (default: 0)")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Restores all inputs. Returns 0, or 1 if any of them failed."""
    jobs = plan(options.inputs, options.out, options.format, recursive=options.recursive)
    waiting = [job for job in jobs if options.overwrite != NEVER or not job.target.exists()]
    for job in jobs:
        if job not in waiting:
            print(f"{job.source}: skipped, {job.target} exists (see --overwrite)")
    failed: list[Job] = []
    if waiting:
        from .methods import Method

        method = Method(options.method, options)
        for number, job in enumerate(waiting, 1):
            try:
                target = _restore(job, method, options, label=f"[{number}/{len(waiting)}] {job.source.name}")
                print(f"{job.source} -> {target}")
            except (ValueError, OSError, RuntimeError) as error:
                failed.append(job)
                print(f"{job.source}: FAILED: {error}", file=sys.stderr)
    print(f"{len(waiting) - len(failed)} restored, {len(jobs) - len(waiting)} skipped, {len(failed)} failed")
    return 1 if failed else 0


def plan(inputs: Sequence[Path], out: Path, suffix: str, *, recursive: bool = False) -> list[Job]:
    """Which file goes where. Does not touch any picture.

    A folder's pictures keep their place below it (with `recursive`). Photographs that would share a result keep their
    own ending in its name: a.jpg and a.png become a-jpg.png and a-png.png; what still clashes is numbered. The names
    depend on the inputs alone, so the same command finds its earlier results again; an `out` that lies inside one of
    the folders is not taken for photographs.

    Raises: FileNotFoundError for an input that does not exist or a folder without pictures.
    """
    from ..nodes.common.evaluation import list_photographs

    found: dict[Path, Path] = {}  # source -> target without its ending
    for given in inputs:
        if given.is_dir():
            own_results = out.resolve() if given.resolve() in out.resolve().parents else None
            for file in list_photographs(given, recursive):
                if own_results is None or own_results not in file.resolve().parents:
                    found.setdefault(file, out / file.relative_to(given).with_suffix(""))
        elif given.is_file():
            found.setdefault(given, out / given.stem)
        else:
            raise FileNotFoundError(f"there is no file or folder {given}.")
    sharing = Counter(found.values())
    taken: set[Path] = set()
    jobs = []
    for source, stem in found.items():
        if sharing[stem] > 1:
            stem = stem.with_name(f"{stem.name}-{source.suffix.lstrip('.').lower()}")
        target = _free(stem.with_name(f"{stem.name}.{suffix}"), lambda path: path in taken)
        taken.add(target)
        jobs.append(Job(source, target))
    return jobs


def _free(path: Path, is_taken) -> Path:
    """The path, or the first of name-2, name-3, ... that is not taken."""
    candidate, number = path, 1
    while is_taken(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _restore(job: Job, method, options: argparse.Namespace, label: str) -> Path:
    from tqdm import tqdm

    from ..nodes.common.image_files import read_image, write_image

    target = _free(job.target, Path.exists) if options.overwrite == RENAME else job.target
    if target.exists() and target.samefile(job.source):
        raise ValueError(f"the result {target} would replace the photograph itself; choose another --out.")
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
    return target


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
