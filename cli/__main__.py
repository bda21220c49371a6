"""`python -m kvq_cli` is `kvq`."""

from .main import app

# The loader's worker processes import this file again.
if __name__ == "__main__":
    app(prog_name="kvq")
