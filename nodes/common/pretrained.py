"""Loading models of transformers from local folders: never a download, every weight accounted for."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from .errors import MismatchedKeysError

# the argument was renamed; the old name still works but warns at every load
_DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def require_model_folder(folder: str | Path, what: str, page: str) -> Path:
    """`folder` if it holds a model as transformers writes it (config.json and weights).

    Args:
        folder: local folder; the name of a repository on the web is not one.
        what: what the model is, for the error, e.g. "the captioner".
        page: where it is downloaded from.
    Raises: FileNotFoundError that says which file is missing, where it belongs and where it comes from.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        missing = f"the folder {folder} does not exist"
    elif not (folder / "config.json").is_file():
        missing = f"there is no config.json in {folder}"
    elif not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        missing = f"there are no weights (model.safetensors) in {folder}"
    else:
        return folder
    raise FileNotFoundError(f"{what} is missing: {missing}. Download all files of {page} into {folder}. "
                            "Nothing is downloaded by itself.")


def load_pretrained(model_class: type, folder: str | Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A model of transformers from a local folder, in evaluation mode, without gradients.

    Args:
        model_class: class with `from_pretrained`; weights the class does not have (e.g. a decoder beside the wanted
            encoder) are left in the file.
        folder: folder with config.json and weights; if it holds only half-precision files (model.fp16.safetensors),
            these are loaded.
        dtype: None loads the weights in the precision they are stored in.
    Raises: MismatchedKeysError if weights of the model are missing in the file or have another shape; OSError (of
        transformers) if a file cannot be read.
    """
    folder = Path(folder)
    variant = None
    if not any(next(folder.glob(name), None) for name in ("model.safetensors*", "model-*", "pytorch_model*")):
        variant = "fp16" if next(folder.glob("model*fp16*.safetensors"), None) else None
    model, report = model_class.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, variant=variant, **{_DTYPE: dtype or "auto"})
    return _complete(model, report, folder, "Download the folder's files again, config.json and weights from the same "
                                            "page.")


def fill_pretrained(model_class: type, config: transformers.PretrainedConfig, state: dict[str, Tensor],
                    source: str | Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """As `load_pretrained`, for weights without a folder around them.

    Args:
        config: sizes of the model.
        state: its weights, under the names that transformers writes.
        source: named in the error.
        dtype: None keeps the precision of the weights.
    Raises: MismatchedKeysError.
    """
    dtype = dtype or next(value.dtype for value in state.values() if value.is_floating_point())
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **{_DTYPE: dtype})
    return _complete(model, report, Path(source), "Download it again.")


def _complete(model: torch.nn.Module, report: dict, source: Path, hint: str) -> torch.nn.Module:
    wrong = {"missing": report["missing_keys"], "of another shape": report["mismatched_keys"]}
    found = "; ".join(f"{len(keys)} {kind}: {', '.join(sorted(map(str, keys))[:8])}"
                      for kind, keys in wrong.items() if keys)
    if found:
        raise MismatchedKeysError(f"{source} does not hold a complete {type(model).__name__}: {found}. {hint}")
    return model.eval().requires_grad_(False)
