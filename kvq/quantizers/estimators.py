"""How the gradient gets past the choice of a code: functions of latents and their codes (both (..., latent_dim)), by name.

The value of each is `codes`, bit for bit; they differ in what reaches the latents in the backward pass.
"""

from collections.abc import Callable

from keras import ops

from kvq.ops import Tensor, straight_through


def rotate(latents: Tensor, codes: Tensor) -> Tensor:
    """The gradient turned as the latent is turned into its code: angle(gradient, code) becomes angle(gradient, latent).

    With unit vectors p of the latent and q of the code, r = (p + q) / |p + q| and R = I - 2 r r^T + 2 q p^T, the code is
    s R latent for s = |code| / |latent|; s and R are held constant. Where latent or code is zero, straight through.

    Source: Fifty et al. 2024, arXiv:2410.06424, section 4. Differs: opposite vectors take r = 0.
    """
    fixed, target = ops.stop_gradient(latents), ops.stop_gradient(codes)
    length, target_length = _norm(fixed), _norm(target)
    usable = ops.logical_and(length > 0.0, target_length > 0.0)
    p = fixed / ops.where(usable, length, 1.0)
    q = target / ops.where(usable, target_length, 1.0)
    total = p + q
    size = _norm(total)
    r = total / ops.where(size > 1e-6, size, 1.0)
    scale = ops.where(usable, target_length / ops.where(usable, length, 1.0), 1.0)
    along_r = ops.sum(r * latents, axis=-1, keepdims=True)
    along_p = ops.sum(p * latents, axis=-1, keepdims=True)
    turned = ops.where(usable, scale * (latents - 2.0 * r * along_r + 2.0 * q * along_p), latents)
    return straight_through(turned, codes)


def _norm(vectors: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(vectors), axis=-1, keepdims=True))


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straight_through": straight_through, "rotation": rotate}
