"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Something the caller can put right: what was wrong, where, and what to do.

    The command line prints its message alone and ends with status 2; a stack trace is
    kept for faults of ours.
    """
