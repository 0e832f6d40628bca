"""The device mesh, the table that maps logical axes to mesh axes, and the processes of a run.

The mesh has the axes ("data", "fsdp", "tensor"). Batches are split over data and fsdp, parameters
over fsdp and tensor. Every logical name used in the model must be in RULES, because Flax silently
replicates an axis whose name has no rule (tests/sharding_test.py checks this).
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moss_tok.mesh import MESH_AXES, parse_mesh

RULES = (
    ("batch", ("data", "fsdp")),
    # Before "embed", so that fsdp splits head_dim if it can: at width 1280, the shards of fsdp:16
    # would be padded, and gradients summed unsharded. See `rules_of` for the exception.
    ("head_dim", "fsdp"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("qkv", None),
    ("layers", None),
    ("width", None),
    ("norm", None),
    ("quantizers", None),
    ("channels", None),
    ("rvq", None),
    ("codebook", None),
    ("code", None),
    ("conv_in", None),
    ("conv_out", "fsdp"),
)

# Parameters with fewer elements may be replicated.
LARGE = 2**20

# TPUs whose SparseCores do not sum gradients: v5e has none, and XLA does not use those of v4.
_WITHOUT_SPARSE_CORES = ("TPU v4", "TPU v5 lite")


def rules_of(device_kind: str) -> tuple[tuple[str, Any], ...]:
    """The rules of a mesh of these devices: on v4 and v5e, "embed" comes before "head_dim".

    At width 768, XLA then sums gradients of attention over fsdp by reduce-scatters, which move half
    the bytes of all-reduces. With SparseCores, which hide all-reduces, this would be slower.
    """
    if device_kind not in _WITHOUT_SPARSE_CORES:
        return RULES
    others = [rule for rule in RULES if rule[0] != "head_dim"]
    return (*others, ("head_dim", "fsdp"))


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Creates the mesh of `text`.

    Its axes have type Auto. `jax.make_mesh` defaults to Explicit, with which Linen's constraints
    become assertions.

    Args:
      text: Sizes of the axes, see `mesh.parse_mesh`. Without a -1, a single process may use only
        some of its devices.
      devices: Default: all devices of all processes.

    Raises:
      ValueError: The sizes do not fit the number of devices.
    """
    sizes = parse_mesh(text)
    devices = jax.devices() if devices is None else list(devices)
    num_fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = []
    for size in sizes.values():
        if size == -1:
            size = len(devices) // num_fixed
        shape.append(size)
    num_used = math.prod(shape)
    is_open = -1 in sizes.values()
    may_be_partial = jax.process_count() == 1 and not is_open
    if not 0 < num_used <= len(devices) or (num_used != len(devices) and not may_be_partial):
        needed = f"a multiple of {num_fixed}" if is_open else num_fixed
        raise ValueError(f"mesh {text!r} needs {needed} devices, there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices[:num_used])
    except (NotImplementedError, AssertionError) as error:  # a TPU slice is a torus
        raise ValueError(f"mesh {text!r} does not fit the torus of the slice: {error}") from error


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding with the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of a batch: the first axis is split over data and fsdp."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch",), RULES))


def split_items(x: jax.Array) -> jax.Array:
    """Constrains activations [B, ...] on a mesh to be split over items, like the batch.

    Without this constraint, XLA also splits the width of activations, like that of parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_auto = all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    if mesh.empty or not is_auto:
        return x
    batch_axes = dividing_axes(mesh, "batch", x.shape[0])
    if batch_axes is None:
        return x
    other_axes = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    spec = PartitionSpec(batch_axes, *other_axes)
    return jax.lax.with_sharding_constraint(x, spec)


def dividing_axes(
    mesh: jax.sharding.AbstractMesh,
    logical_name: str,
    size: int,
) -> tuple[str, ...] | None:
    """The mesh axes over which RULES splits a logical axis; None if they do not divide `size`."""
    axes = _as_tuple(dict(RULES)[logical_name])
    present = tuple(axis for axis in axes if axis in mesh.shape)
    if not present or size % _num_parts(mesh, present):
        return None
    return present


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of a rule."""
    return (axes,) if isinstance(axes, str) else axes or ()


def _num_parts(mesh: Any, axes: tuple[str, ...]) -> int:
    """Number of parts into which mesh axes split an array."""
    return math.prod(mesh.shape[axis] for axis in axes)


def check_batch_size(mesh: jax.sharding.Mesh, batch_size: int) -> None:
    """Raises ValueError unless the batch can be split over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} must be a multiple of {parts}, data x fsdp of the mesh"
        )


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that are on devices of this process, which must provide them.

    They are sorted, but may have gaps: a mesh follows the torus of a TPU slice, not its hosts.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = set()
    for (device_rows,) in indices.values():
        rows.update(range(batch_size)[device_rows])
    return sorted(rows)


def global_batch(mesh: jax.sharding.Mesh, batch_size: int, batch: Any) -> Any:
    """Global arrays of `batch_size` rows, from the `local_rows` of each process in `batch`."""
    sharding = batch_sharding(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(put, batch)


def whole(tree: Any, shardings: Any) -> Any:
    """Puts a tree of arrays, of which every process has a full copy, onto a mesh."""

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def on_one_device(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Gathers a tree of arrays from a mesh; the first device of each process gets full copies."""
    if mesh.size == 1:
        return tree
    tree = jax.jit(_identity, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def _identity(tree: Any) -> Any:
    return tree


def connect(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Connects the processes that train together; call it before jax is used.

    On TPU slices (also in GKE) and under Slurm, jax reads the settings from the environment;
    elsewhere the arguments give them. A Slurm process gets one GPU; a process configured by the
    arguments gets all devices of its host.

    Args:
      coordinator_address: HOST:PORT of process 0. If empty, the environment decides; without a
        cluster there, this process trains alone.
      num_processes: Number of processes.
      process_id: Index of this process, 0..num_processes - 1.

    Raises:
      ValueError: An index is out of range, the address is missing or malformed, or the other
        processes do not answer.
    """
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must be 0..{num_processes - 1}, got {process_id}")
    settings = {}
    if coordinator_address:
        host, _, port = coordinator_address.rpartition(":")
        if not host or not port.isdecimal() or not 1 <= int(port) < 2**16:
            raise ValueError(f"coordinator_address must be HOST:PORT, got {coordinator_address!r}")
        settings = {
            "coordinator_address": coordinator_address,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    elif num_processes > 1:
        raise ValueError(f"num_processes {num_processes} needs coordinator_address")
    if settings or _in_cluster():
        try:
            jax.distributed.initialize(**settings)
        except RuntimeError as error:
            raise ValueError(f"the processes did not find each other: {error}") from error


def _in_cluster() -> bool:
    """Whether jax detects the other processes itself: in Slurm steps, GKE and Cloud TPU VMs."""
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return True
    if os.environ.get("JAX_PLATFORMS") == "cpu":  # a process that does not use the VM's TPUs
        return False
    if "TPU_WORKER_HOSTNAMES" in os.environ:
        return True
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        return False
    return has_tpu_chips()


def has_tpu_chips() -> bool:
    """Whether this machine has TPU chips, whether jax can use them or not."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    if not chips:
        return False
    # /dev/vfio may also have a passed-through GPU, so look on the PCI bus for TPUs, as jax does.
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == "0x1ae0" for path in vendors)  # Google's id


def is_main_process() -> bool:
    """Whether this is process 0, which writes logs and file lists."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes; each barrier needs a different `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(value: bool) -> bool:
    """Whether `value` is true in all processes."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


# Gather parameters during other computation instead of before it, and gather them in one piece: on
# a pure fsdp mesh, XLA would otherwise multiply narrow slices, with three times the traffic.
_TPU_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_enable_async_all_gather": True,
    # On a pure fsdp mesh, XLA would otherwise gather by an all-reduce with zeros.
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # Let the SparseCores of v5p and v6e sum gradients.
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
}
# Without SparseCores, sum gradients during other computation, as parameters are gathered.
_TENSOR_CORE_OPTIONS = {
    "xla_enable_async_reduce_scatter_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,  # also during norms
}

# An FFT on a thread of XLA's CPU pool waits for other threads of the same pool; when each of them
# runs an FFT, all wait forever. 0.11.0 and 0.12.0 do not split FFTs on these threads.
_JAXLIB_FFT_HANGS = ("0.11.1", "0.11.2")


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool | int]:
    """Compiler options of `jax.jit` for programs on this mesh.

    On CPUs, jaxlib 0.11.1 and 0.11.2 need them for every program with several FFTs.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu" and jaxlib.__version__.startswith(_JAXLIB_FFT_HANGS):
        return {"xla_cpu_multi_thread_eigen": False}
    if device.platform != "tpu":
        return {}
    if device.device_kind in _WITHOUT_SPARSE_CORES:
        return _TPU_OPTIONS | _TENSOR_CORE_OPTIONS
    return _TPU_OPTIONS


def fitting(
    mesh: jax.sharding.Mesh,
    names: Sequence[str | None],
    shape: Sequence[int],
) -> NamedSharding:
    """Sharding of an array whose axes have logical names, by the rules of the mesh's devices.

    An axis that its mesh axes do not divide stays whole; the next axis in the rules may then use
    them.
    """
    rules = rules_of(mesh.devices.flat[0].device_kind)
    while True:
        spec = nn.logical_to_mesh_axes(names, rules)
        divided_names = []
        for name, size, axes in zip(names, shape, spec, strict=True):
            is_divided = size % _num_parts(mesh, _as_tuple(axes)) == 0
            divided_names.append(name if is_divided else None)
        if divided_names == list(names):
            return NamedSharding(mesh, spec)
        names = divided_names


def param_shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings, by `fitting`, of a tree of parameters in boxes that carry logical axis names.

    Raises:
      ValueError: A large parameter would be replicated along fsdp, or on a mesh without fsdp along
        tensor.
    """
    required_axis = None
    if mesh.shape["fsdp"] > 1:
        required_axis = "fsdp"
    elif mesh.shape["tensor"] > 1:
        required_axis = "tensor"

    def sharding(path: Any, box: nn.LogicallyPartitioned) -> NamedSharding:
        shape = box.value.shape
        placed = fitting(mesh, box.names, shape)
        is_large = math.prod(shape) >= LARGE
        if is_large and required_axis and required_axis not in placed.spec:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"mesh {dict(mesh.shape)}: {name} {list(shape)} would be replicated along "
                f"{required_axis}; choose sizes of fsdp and tensor that divide its axes "
                f"{box.names}"
            )
        return placed

    def is_box(x: Any) -> bool:
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)
