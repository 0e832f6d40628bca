"""Logical axis names of parameters and the one table that maps them onto the mesh.

The mesh has the axes ("data", "fsdp", "tensor"). Batches are split over data and fsdp, parameters
over fsdp and tensor. Every logical name used in the model must be in RULES: Flax silently
replicates an axis whose name has no rule (tests/sharding_test.py checks).
"""

import jax
from flax import linen as nn

MESH_AXES = ("data", "fsdp", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("head_dim", None),
    ("qkv", None),
    ("layers", None),
    ("width", None),
    ("norm", None),
    ("quantizers", None),
    ("rvq", None),
    ("codebook", None),
    ("code", None),
    ("conv_in", None),
    ("conv_out", "fsdp"),
)


def make_mesh(shape: tuple[int, int, int], devices: list[jax.Device] | None = None):
    """A mesh of `shape` (data, fsdp, tensor).

    Its axes are Auto: `jax.make_mesh` defaults to Explicit, where Linen's constraints turn into
    assertions.
    """
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices)


def param_shardings(variables, mesh):
    """NamedShardings for `variables`, a tree whose leaves carry logical names (boxed)."""
    specs = nn.get_partition_spec(variables)
    return nn.logical_to_mesh_sharding(specs, mesh, RULES)
