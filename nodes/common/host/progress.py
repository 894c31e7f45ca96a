"""What a user sees of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management as management
import comfy.utils
import latent_preview
from torch import Tensor, nn

from .models import HostedModel


class Report:
    """Callbacks for a sampling loop: a bar in steps x windows, and a preview of the whole picture after each step.

    Both raise ComfyUI's exception where the user has cancelled the run.
    """

    def __init__(self, steps: int, model: HostedModel):
        self.steps, self.step, self.windows = steps, 0, 1
        self.bar = comfy.utils.ProgressBar(steps)
        self.previewer = model.preview and latent_preview.get_previewer(model.patcher.load_device, model.preview)

    def on_window(self, done: int, total: int) -> None:
        """Within a step: `done` of `total` windows."""
        management.throw_exception_if_processing_interrupted()
        self.windows = total
        if done < total:  # the last window of a step is reported with its preview, by on_step
            self.bar.update_absolute(self.step * total + done, self.steps * total)

    def on_step(self, i: int, n: int, x: Tensor, x0: Tensor) -> None:
        """After step `i` of `n`: `x0` is the whole picture as the network now sees it, (B, C, h, w), scaled."""
        management.throw_exception_if_processing_interrupted()
        self.step, self.steps = i + 1, n
        preview = self.previewer.decode_latent_to_preview_image("JPEG", x0.float()) if self.previewer else None
        self.bar.update_absolute(self.step * self.windows, n * self.windows, preview)


@contextmanager
def bar_of_calls(part: nn.Module, calls: int) -> Iterator[None]:
    """For the length of the block a bar that goes on with each call of `part`, to its end with so many `calls`."""
    bar = comfy.utils.ProgressBar(calls)

    def count(*_) -> None:
        bar.update(1)

    watch = part.register_forward_hook(count)
    try:
        yield
    finally:
        watch.remove()
