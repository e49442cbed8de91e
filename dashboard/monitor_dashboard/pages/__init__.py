"""One file per page, each with its ``page`` function and ``PAGE``."""
