"""A page on this machine to play with models and to follow training: `pixeldip app`."""
