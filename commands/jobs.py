"""Which photographs `fourfold restore` takes, and which file each result goes to; decided before anything is loaded."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

NEVER, ALWAYS, RENAME = "never", "always", "rename"  # what happens where a result exists


@dataclass(frozen=True)
class Job:
    """One photograph and the file that its restoration goes to."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Failure:
    """An input that was not restored, and why."""

    source: Path
    reason: str


def plan(inputs: Sequence[Path], out: Path, suffix: str, *,
         recursive: bool = False) -> tuple[list[Job], list[Failure]]:
    """Which file goes where, and which inputs do not exist or are folders without pictures. Opens no picture.

    A folder's pictures keep their place below it (with `recursive`). Photographs that would share a result keep their
    own ending in its name: a.jpg and a.png become a-jpg.png and a-png.png; what still clashes is numbered. The names
    depend on the inputs alone, so the same command finds its earlier results again; an `out` that lies inside one of
    the folders is not taken for photographs.
    """
    found, missing = _find(inputs, out, recursive)
    sharing = Counter(found.values())
    taken: set[Path] = set()
    jobs = []
    for source, stem in found.items():
        if sharing[stem] > 1:
            stem = stem.with_name(f"{stem.name}-{source.suffix.lstrip('.').lower()}")
        target = free(stem.with_name(f"{stem.name}.{suffix}"), lambda path: path in taken)
        taken.add(target)
        jobs.append(Job(source, target))
    return jobs, missing


def sort_out(jobs: Sequence[Job], overwrite: str) -> tuple[list[Job], list[Job], list[Failure]]:
    """Jobs to do, jobs to skip because their result exists, and jobs whose result would replace the photograph."""
    waiting, skipped, refused = [], [], []
    for job in jobs:
        if overwrite == RENAME or not job.target.exists():
            waiting.append(job)
        elif overwrite == NEVER:
            skipped.append(job)
        elif job.target.samefile(job.source):
            refused.append(Failure(job.source, f"the result {job.target} would replace the photograph itself; choose "
                                   "another --out."))
        else:
            waiting.append(job)
    return waiting, skipped, refused


def free(path: Path, is_taken: Callable[[Path], bool]) -> Path:
    """The path, or the first of name-2, name-3, ... that is not taken."""
    candidate, number = path, 1
    while is_taken(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _find(inputs: Sequence[Path], out: Path, recursive: bool) -> tuple[dict[Path, Path], list[Failure]]:
    """Photograph -> result without its ending; and the inputs that give none."""
    from ..nodes.common.evaluation import list_photographs

    found: dict[Path, Path] = {}
    missing: list[Failure] = []
    for given in inputs:
        if given.is_dir():
            own_results = out.resolve() if given.resolve() in out.resolve().parents else None
            try:
                files = list_photographs(given, recursive)
            except FileNotFoundError as error:
                missing.append(Failure(given, str(error)))
                continue
            for file in files:
                if own_results is None or own_results not in file.resolve().parents:
                    found.setdefault(file, out / file.relative_to(given).with_suffix(""))
        elif given.is_file():
            found.setdefault(given, out / given.stem)
        else:
            missing.append(Failure(given, f"there is no file or folder {given}."))
    return found, missing
