"""The program `kvq`: puts the commands together, and makes messages and exit codes of errors.

Heavy imports (Keras, Grain, a backend) happen inside the commands, so that `kvq --help` is quick and `--backend` has its say.
"""

import inspect
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvq import __version__
from kvq.errors import KvqError

from . import INTERRUPTED
from .benchmark import benchmark
from .codebook import codebook
from .configs import configs
from .data import data
from .decode import decode
from .doctor import doctor
from .encode import encode
from .evaluate import evaluate
from .export import export
from .quantizers import quantizers
from .reconstruct import reconstruct
from .report import report
from .tokens import tokens
from .train import train


class Commands(TyperGroup):
    """Runs a command. What the user can mend ends as its message alone; every other exception keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KvqError as error:
            print(f"error: {_harmless(str(error))}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


def _harmless(text: str) -> str:
    """A message without control characters: it may repeat what a file says, and a terminal obeys them."""
    return "".join(character if character.isprintable() or character == "\n" else ascii(character)[1:-1] for character in text)


def _paragraphs(command: Any) -> str:
    """The help of a command, a line for each paragraph: Typer breaks lines to the terminal's width, and keeps those that were."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n"))


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvq {__version__}")
        raise typer.Exit


def main(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print it and exit.")] = False,
) -> None:
    """Discrete image tokenizers (VQ-VAE) on JAX, TensorFlow and PyTorch."""


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
app.callback()(main)
for command in (train, evaluate, reconstruct, encode, decode, codebook, report, export, configs, quantizers, benchmark, doctor):
    app.command()(command)
app.add_typer(data, name="data")
app.add_typer(tokens, name="tokens")
for group in (app, data, tokens):
    for registered in group.registered_commands:
        registered.help = _paragraphs(registered.callback)
