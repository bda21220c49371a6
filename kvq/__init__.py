"""kvq: discrete image tokenizers (VQ-VAE and its family), written once with `keras.ops` for JAX, TensorFlow and PyTorch.

Public names load when first used: `import kvq` imports neither Keras nor a backend, so `KERAS_BACKEND` can still be set. Where
nobody has chosen by then, the backend is the one that the command line would take: Keras itself would want TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq.codebook_use import codebook as codebook
    from kvq.config import RunConfig as RunConfig
    from kvq.config import list_configs as list_configs
    from kvq.config import load_config as load_config
    from kvq.diagnosis import doctor as doctor
    from kvq.errors import KvqError as KvqError
    from kvq.evaluation import evaluate as evaluate
    from kvq.exporters import export as export
    from kvq.health import diagnose as diagnose
    from kvq.model import VQVAE as VQVAE
    from kvq.pruning import prune as prune
    from kvq.reconstruction import reconstruct as reconstruct
    from kvq.run_report import report as report
    from kvq.timing import benchmark as benchmark
    from kvq.tokenizer import Tokenizer as Tokenizer
    from kvq.tokens.decoding import decode as decode
    from kvq.tokens.encoding import encode as encode
    from kvq.tokens.migration import migrate as migrate
    from kvq.training import describe as describe
    from kvq.training import train as train

__version__ = "0.1.0"

# A function named `train` cannot live in a module `kvq.train`: both would be the attribute `train` of this package.
_HOME = {
    "codebook": "codebook_use",
    "RunConfig": "config",
    "list_configs": "config",
    "load_config": "config",
    "doctor": "diagnosis",
    "KvqError": "errors",
    "evaluate": "evaluation",
    "export": "exporters",
    "diagnose": "health",
    "VQVAE": "model",
    "prune": "pruning",
    "reconstruct": "reconstruction",
    "report": "run_report",
    "Tokenizer": "tokenizer",
    "benchmark": "timing",
    "decode": "tokens.decoding",
    "encode": "tokens.encoding",
    "migrate": "tokens.migration",
    "describe": "training",
    "train": "training",
}
__all__ = [*sorted(_HOME), "__version__"]
# What imports no Keras, and works where no backend is installed.
_WITHOUT_KERAS = {"config", "errors", "diagnosis", "run_report", "timing", "tokens.migration"}


def __getattr__(name: str) -> Any:
    if (name in _HOME and _HOME[name] not in _WITHOUT_KERAS) or name == "quantizers":
        importlib.import_module("kvq.backends").choose()
    if name in _HOME:
        return getattr(importlib.import_module(f"kvq.{_HOME[name]}"), name)
    if name in {"data", "quantizers"}:
        return importlib.import_module(f"kvq.{name}")
    raise AttributeError(f"module 'kvq' has no attribute {name!r}. It has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "data", "quantizers"})
