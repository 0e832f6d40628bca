"""Every logical axis has a rule, and parameters land on the mesh as the rules say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import moss_tok
from moss_tok import sharding
from moss_tok.codec import pretrained
from moss_tok.config import DiscriminatorConfig
from moss_tok.training.discriminators import Discriminators


def boxed_discriminators():
    model = Discriminators(DiscriminatorConfig())
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, 4096)))["params"]


@pytest.mark.parametrize("name", ["v1", "nano", "tiny", "discriminators"])
def test_every_logical_name_has_a_rule(name):
    if name == "discriminators":
        boxed = boxed_discriminators()
    else:
        boxed = pretrained._boxed_shapes(moss_tok.preset(name))
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
    names = {axis for box in boxes for axis in box.names if axis is not None}
    assert names <= {rule[0] for rule in sharding.RULES}
    for box in boxes:
        assert len(box.names) == box.value.ndim


def test_a_mesh_gives_the_same_codes(micro, rng):
    mesh = sharding.make_mesh((2, 2, 2))
    boxed = pretrained._boxed_shapes(micro.config)
    shardings = sharding.param_shardings(boxed, mesh)
    params = jax.tree.map(jax.device_put, micro.params, shardings)
    kernel = params["encoder"]["stage_1"]["layers"]["mlp"]["up"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    wav = 0.1 * rng.standard_normal((4, 1, 999), np.float32)
    codec = micro.replace(params=params)
    with jax.set_mesh(mesh):
        codes = moss_tok.encode(codec, jax.device_put(wav, batch)).codes
    np.testing.assert_array_equal(codes, moss_tok.encode(micro, wav).codes)
