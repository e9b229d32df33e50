"""The two ways in which lmpress says no."""


class LmpressError(Exception):
    """The work failed. The message is one clear line: what, where, and what to do. Exit code 1."""

    exit_code = 1


class RequestError(LmpressError):
    """The request was wrong (a bad recipe, a missing file, a full directory). Exit code 2."""

    exit_code = 2
