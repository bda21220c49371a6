"""Quantizers: Keras layers that turn continuous latents into codes and integer indices. One class a file.

The contract that every member keeps (tests/test_quantizers.py): `quantizer(latents, training)` returns
`{"codes", "indices", "losses"}`; `latents_to_indices` and `indices_to_codes` are its two halves; `codebook_size` says how
many values an index can take. `loss_names` lists the keys of `losses`.
"""

from kvq.quantizers.codebook_quantizer import CodebookQuantizer
from kvq.quantizers.ema_vector import EMAVectorQuantizer
from kvq.quantizers.vector import VectorQuantizer

QUANTIZERS = {
    "vector": VectorQuantizer,
    "ema_vector": EMAVectorQuantizer,
}

__all__ = ["QUANTIZERS", "CodebookQuantizer", "EMAVectorQuantizer", "VectorQuantizer"]
