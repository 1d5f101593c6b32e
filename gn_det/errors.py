"""The exception for what a user can put right."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input, told in one line that names the values and what to do.

    The tools print it without a stack trace and exit with status 2; any other exception is a
    defect and keeps its trace.
    """
