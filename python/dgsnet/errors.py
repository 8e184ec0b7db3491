"""The error for wrong input: one line that names the file or value and the remedy, and exit code 2."""


class UserError(Exception):
    """Raised for wrong input; str(error) is the one line shown to the user."""
