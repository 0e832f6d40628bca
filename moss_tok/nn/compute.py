"""How a model is computed: types, precision, attention and rematerialization."""

import dataclasses

from moss_tok.errors import check_choice

ATTENTION = ("auto", "dense", "blocked", "splash", "cudnn")
REMAT = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a codec is computed; it changes speed and rounding, never the model.

    Attributes:
      dtype: "float32" or "bfloat16" for the Transformers; parameters, norms, softmax, RoPE and
        the quantizer stay in float32.
      precision: Matmul precision of jax.lax: "default", "high" or "highest".
      attention: "auto", "dense", "blocked", "splash" or "cudnn", see `attention.attend`.
      remat: What the backward pass recomputes per block: "none", "dots" (all but matmuls), "full".
    """

    dtype: str = "float32"
    precision: str = "highest"
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("precision", self.precision, ("default", "high", "highest"))
        check_choice("attention", self.attention, ATTENTION)
        check_choice("remat", self.remat, REMAT)


# Of bulk work, where speed may be worth some codes.
PRECISIONS = {
    "highest": ComputeConfig(),
    "high": ComputeConfig(precision="high"),
    "bfloat16": ComputeConfig(dtype="bfloat16", precision="default"),
}
