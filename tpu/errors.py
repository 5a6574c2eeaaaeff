"""The one exception that is meant for people: entry points print it as a single line and exit with status 2."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message names it, its value and what would be valid."""
