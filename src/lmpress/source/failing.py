"""What a method could not do, told with the name of what it worked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lmpress.errors import LmpressError
from lmpress.methods.damping import LinAlgError


@contextmanager
def failing_at(place: str) -> Iterator[None]:
    """What mathematics raises inside becomes one line about `place`: a module, a site, a survey.

    Raises:
        LmpressError: instead of a ValueError or a LinAlgError.
    """
    try:
        yield
    except (ValueError, LinAlgError) as error:
        raise LmpressError(f"{place}: {error}") from error
