"""Which version of the suite runs."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed version, or "unknown" where the folder is used without having been installed."""
    try:
        return version("comfyui-fourfold")
    except PackageNotFoundError:
        return "unknown"
