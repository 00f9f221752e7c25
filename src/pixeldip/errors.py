"""The one exception that stands for a user's mistake, and what those of others say."""

import textwrap


class UserError(ValueError):
    """Something the caller can put right: what was wrong, where, and what to do.

    The command line prints its message alone and ends with status 2; a stack trace is
    kept for faults of ours.
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine itself, lacks the memory for a tensor."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_one_line(error: Exception) -> str:
    """What a library says, up to a length that holds all but lists of tensors."""
    return textwrap.shorten(str(error), 1000, placeholder=" …")
