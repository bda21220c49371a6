"""The command line of kvq. A thin layer: each command calls the function of the same name that `kvq` offers to Python."""

# The exit status of what Ctrl-C ended, as shells have it.
INTERRUPTED = 130


class OutputError(Exception):
    """stdout cannot be written, as on a full disk. Its text is the reason."""
