"""The exception for what a user can put right."""

from gn_det.text import printable

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that the caller can correct. The message is one line: the values, and what to do.

    Names and values in it may be foreign text: what is not printable becomes its escape.

    The programs in tools/ print it without a stack trace and exit with status 2. Any other
    exception is a defect, and keeps its trace.

    Example::

        try:
            gn_det.inject(model, "bakbone")
        except gn_det.InputError as error:
            print(error)  # no site 'bakbone'; did you mean backbone?; there are default, ALL, ...
    """

    def __init__(self, message: str) -> None:
        # PyTorch's DataLoader raises a worker's exception anew, with its trace as the message.
        name = type(self).__name__
        if message.startswith(f"Caught {name} in DataLoader worker"):
            message = message.strip().splitlines()[-1].partition(f"{name}: ")[2]
        super().__init__(printable(message))
