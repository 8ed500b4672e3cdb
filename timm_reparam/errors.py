"""The one error class of the package."""

__all__ = ['ReparamError']


class ReparamError(ValueError):
    """Something that was asked for cannot be done.

    The message names the place (module path, file or option), what was expected, what came, and what to do about it.
    """
