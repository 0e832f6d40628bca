"""How a model is computed: types, precision, attention and rematerialization."""

import dataclasses

from moss_tok.errors import check_choice

ATTENTION = ("auto", "dense", "blocked", "splash", "cudnn")
REMAT = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")
BF16_PRODUCTS = "BF16_BF16_F32"  # bfloat16 operands, float32 sums: a dot algorithm of jax.lax
MATMUL_PRECISIONS = ("default", "high", "highest", BF16_PRODUCTS)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed. These settings affect speed, memory and rounding only.

    Attributes:
      dtype: Type of the activations and weights of the Transformers, "float32" or "bfloat16".
        Parameters, norms, softmax, RoPE and the quantizer are always float32.
      precision: Matmul precision of jax.lax: "default", "high", "highest" or "BF16_BF16_F32":
        bfloat16 operands and float32 sums. This is the default on TPUs, and fast on CPUs with AMX.
      attention: "auto", "dense", "blocked", "splash" or "cudnn", see `attention.attend`.
      remat: What the backward pass recomputes in each block: "none", "dots" (everything except
        matmuls) or "full".
      unroll_layers: Number of layers per iteration of the loop over the layers of a stage.

    Raises:
      ValueError: A value is not one of these.
    """

    dtype: str = "float32"
    precision: str = "highest"
    attention: str = "auto"
    remat: str = "none"
    unroll_layers: int = 1

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("precision", self.precision, MATMUL_PRECISIONS)
        check_choice("attention", self.attention, ATTENTION)
        check_choice("remat", self.remat, REMAT)


# Choices for bulk work, where a faster computation may be worth a few different codes.
PRECISIONS = {
    "highest": ComputeConfig(),
    "high": ComputeConfig(precision="high"),
    "bfloat16": ComputeConfig(dtype="bfloat16", precision="default"),
}
