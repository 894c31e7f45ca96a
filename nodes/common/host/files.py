"""Where model files lie: ComfyUI's folders, so that extra_model_paths.yaml works, and the suite's own checkpoints.

A model is chosen by its name relative to one of the folders: a single file ("dit4sr.safetensors") or a diffusers
folder ("dit4sr_q/transformer"), recognised by its config.json. Nothing is ever downloaded, moved or deleted.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import folder_paths

from ..tiny import checkpoints_dir

OWN_FOLDER = "fourfold"
SAM_FOLDER = "sams"  # where other suites have their users put Segment Anything
_CONFIG = "config.json"


def register_folder() -> None:
    """Adds the folders `models/fourfold`, with the tiny family's checkpoints, and `models/sams` to ComfyUI's.

    An added folder has no extensions, which would list every file: it gets those of the stock folders. What another
    suite or extra_model_paths.yaml has said of `sams` stays.
    """
    models = Path(folder_paths.models_dir)
    for folder, place in (
        (OWN_FOLDER, models / OWN_FOLDER), (OWN_FOLDER, checkpoints_dir()), (SAM_FOLDER, models / SAM_FOLDER)
    ):
        folder_paths.add_model_folder_path(folder, str(place))
        paths, extensions = folder_paths.folder_names_and_paths[folder]
        extensions = {*extensions, *folder_paths.supported_pt_extensions}
        folder_paths.folder_names_and_paths[folder] = (paths, extensions)


def list_models(folders: Iterable[str]) -> list[str]:
    """Names of the single files and diffusers folders in `folders`, sorted; shards count as their folder."""
    names = set()
    for folder in folders:
        places = folder_paths.get_folder_paths(folder)
        for file in folder_paths.get_filename_list(folder):
            parent = os.path.dirname(file)
            whole = parent and any(os.path.isfile(os.path.join(place, parent, _CONFIG)) for place in places)
            names.add(parent if whole else file)
    return sorted(names)


def find_model(name: str, folders: Sequence[str], what: str, page: str) -> Path:
    """Path of a model that `list_models` named.

    Args:
        name: relative to one of `folders`, never outside them.
        folders: names of ComfyUI's model folders, in the order they are searched.
        what: what is looked for, for the error.
        page: where it can be had, for the error.
    Raises: FileNotFoundError that names the folder it belongs in, its page, and where else was looked.
    """
    places = _places(folders)
    inside = os.path.relpath(os.path.join(os.sep, name), os.sep)  # "../x" and "/x" become "x"
    for place in places:
        path = Path(place, inside)
        if name and (path.is_file() or (path / _CONFIG).is_file()):
            return path
    home = next((place for place in places if os.path.basename(place) in folders), places[0])
    raise FileNotFoundError(
        f"{what} '{name}' is not there. Download it from {page} into {home}, then refresh the nodes (key R). "
        f"Looked in {', '.join(places)}."
    )


def fingerprint(path: Path) -> str:
    """Changes when a file, or a file directly in a folder, changes under the same name: names, sizes and times."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def list_folders(folders: Iterable[str], holding: str) -> list[str]:
    """Names of the subfolders of `folders` with a file `holding` (and a config.json) in them, sorted."""
    return sorted(
        {
            entry.name
            for place in _places(folders)
            if os.path.isdir(place)
            for entry in os.scandir(place)
            if all(os.path.isfile(os.path.join(entry.path, file)) for file in (_CONFIG, holding))
        }
    )


def _places(folders: Iterable[str]) -> list[str]:
    places = []
    for folder in folders:
        if folder in folder_paths.folder_names_and_paths:
            places += folder_paths.get_folder_paths(folder)
        else:  # a folder that other suites use and ComfyUI itself does not know
            places.append(os.path.join(folder_paths.models_dir, folder))
    return places
