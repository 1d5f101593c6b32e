"""The exception for what a user can put right."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input, told in one line that names the values and what to do.

    The tools print it without a stack trace and exit with status 2; any other exception is a
    defect and keeps its trace.
    """

    def __init__(self, message: str) -> None:
        # PyTorch's DataLoader raises a worker's exception anew, with its trace as the message.
        if message.startswith("Caught InputError in DataLoader worker"):
            message = message.strip().splitlines()[-1].partition("InputError: ")[2]
        super().__init__(message)
