"""Exceptions that more than one module raises. Each text says what was wrong, what was expected and what to do."""


class NonFiniteLatentError(RuntimeError):
    """A latent became NaN or infinite while sampling; the text names the step, so that no black picture comes out."""


class CorruptCheckpointError(ValueError):
    """A weight file is truncated, damaged or no weight file at all; the text names the file and what is broken."""


class MismatchedKeysError(ValueError):
    """The weights do not fit the network; the text lists missing, unexpected and wrongly shaped keys."""


class WrongFileError(ValueError):
    """A sound file of another kind than the one asked for, found from its header before anything is loaded."""
