"""Quantizers: Keras layers that turn continuous latents into codes and integer indices. One class a file.

The contract that every member keeps (tests/test_quantizers.py): `quantizer(latents, training)` returns
`{"codes", "indices", "losses"}`; `latents_to_indices` and `indices_to_codes` are its two halves; `codebook_size` says how
many values an index can take, `depth` how many indices a position has (None: one, without an axis of its own). `loss_names`
lists the keys of `losses`.
"""

from kvq.quantizers.binary_spherical import BinarySphericalQuantizer
from kvq.quantizers.codebook_quantizer import CodebookQuantizer
from kvq.quantizers.cosine_vector import CosineVectorQuantizer, EMACosineVectorQuantizer
from kvq.quantizers.ema_vector import EMAVectorQuantizer
from kvq.quantizers.finite_scalar import FiniteScalarQuantizer, SymmetricFiniteScalarQuantizer
from kvq.quantizers.gumbel import GumbelQuantizer
from kvq.quantizers.index_backprop import IndexBackpropQuantizer
from kvq.quantizers.lookup_free import LookupFreeQuantizer
from kvq.quantizers.product import ProductQuantizer
from kvq.quantizers.projected import ProjectedQuantizer
from kvq.quantizers.quantizer import Quantizer
from kvq.quantizers.residual import ResidualQuantizer, SharedResidualQuantizer
from kvq.quantizers.sim_vector import SimVectorQuantizer
from kvq.quantizers.vector import VectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vector": VectorQuantizer,
    "ema_vector": EMAVectorQuantizer,
    "cosine_vector": CosineVectorQuantizer,
    "ema_cosine_vector": EMACosineVectorQuantizer,
    "sim_vector": SimVectorQuantizer,
    "index_backprop": IndexBackpropQuantizer,
    "gumbel": GumbelQuantizer,
    "finite_scalar": FiniteScalarQuantizer,
    "symmetric_finite_scalar": SymmetricFiniteScalarQuantizer,
    "lookup_free": LookupFreeQuantizer,
    "binary_spherical": BinarySphericalQuantizer,
    "residual": ResidualQuantizer,
    "shared_residual": SharedResidualQuantizer,
    "product": ProductQuantizer,
    "projected": ProjectedQuantizer,
}

__all__ = ["QUANTIZERS", "CodebookQuantizer", "Quantizer", *(member.__name__ for member in QUANTIZERS.values())]
