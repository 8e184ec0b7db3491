"""The error for wrong input: one line that names the file or value and the remedy, and an exit code."""


class UserError(Exception):
    """Raised for wrong input; str(error) is the one line shown to the user.

    Attributes:
        code: the command's exit code.
    """

    code = 2
