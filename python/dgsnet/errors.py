"""Errors a user can make: one line that names the file or value and the remedy; the command line exits with 2."""


class UserError(Exception):
    """Raised for wrong input; str(error) is the one line shown to the user."""
