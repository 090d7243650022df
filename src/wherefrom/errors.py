"""The errors of wherefrom. Every message says what was expected, what was got and what to do."""

from __future__ import annotations

MESSAGE = 1500  # characters of a message: less than a screen of 80 x 24
GOT = 300  # characters of what was got, within a message


class AttributionError(Exception):
    """Base class of every error that wherefrom raises on purpose; no message is longer than a screen."""

    def __init__(self, *args: object):
        super().__init__(*(shorten(arg, MESSAGE) if isinstance(arg, str) else arg for arg in args))


class InputError(AttributionError, ValueError):
    """Bad input: data, a task, a model or an argument is not what the method needs."""


class UnsupportedError(AttributionError, NotImplementedError):
    """A model, curvature or solver cannot do exactly what was asked of it."""


class MissingExtraError(AttributionError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class DivergenceError(AttributionError, ArithmeticError):
    """A solve produced NaN or infinity, or grew without bound."""


class ArtefactError(AttributionError, ValueError):
    """A file is damaged, of another version, made for another model, data or configuration, or cannot be written."""


class ConvergenceWarning(UserWarning):
    """Some queries did not reach the tolerance of the solver."""


class AttributionWarning(UserWarning):
    """Something was adapted: said once, never done in silence."""


def expected(what: str, wanted: str, got: object, do: str = "") -> InputError:
    """The one template of input errors: ``expected(...)`` builds it, the caller raises it."""
    return InputError(f"{what} must be {wanted}, got {shorten(str(got), GOT)}." + (f" {do}" if do else ""))


def missing_extra(what: str, package: str, extra: str) -> MissingExtraError:
    """Build the error of an optional dependency that is not installed; the caller raises it.

    Args:
        what: needs it, as the beginning of a sentence.
        package: as it is called on the registry.
        extra: of ours that installs it.
    """
    return MissingExtraError(f'{what} needs {package}, which is not installed. Run: pip install "wherefrom[{extra}]"')


def shorten(text: str, length: int) -> str:
    """The text itself, or where it is longer its beginning and its end, which says what to do, and how long it was."""
    if len(text) <= length:
        return text
    gap = f" [... {len(text):,} characters ...] "
    end = (length - len(gap)) // 3
    return text[: length - len(gap) - end] + gap + text[len(text) - end :]
