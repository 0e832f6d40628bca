"""The mesh, and the one table that maps logical axis names of parameters onto it.

The mesh has the axes ("data", "fsdp", "tensor"). Batches are split over data and fsdp, parameters
over fsdp and tensor. Every logical name used in the model must be in RULES: Flax silently
replicates an axis whose name has no rule (tests/sharding_test.py checks).
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moss_tok.mesh import MESH_AXES, parse_mesh

RULES = (
    ("batch", ("data", "fsdp")),
    # Before "embed": at width 1280 the parts of fsdp:16 would be padded, and summed as a whole.
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

# Parameters below this number of elements may be replicated.
LARGE = 2**20


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of `text`, see `mesh.parse_mesh`.

    Its axes are Auto: `jax.make_mesh` defaults to Explicit, where Linen's constraints turn into
    assertions.

    Args:
      text: Sizes of the axes; without a -1 it may be a part of the devices, in one process.
      devices: Default: all, of all processes.

    Raises:
      ValueError: The sizes do not fit the number of devices.
    """
    sizes = parse_mesh(text)
    devices = jax.devices() if devices is None else list(devices)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    count = math.prod(shape)
    partial = jax.process_count() == 1 and -1 not in sizes.values()
    if not 0 < count <= len(devices) or (count != len(devices) and not partial):
        rest = "a multiple of " if -1 in sizes.values() else ""
        raise ValueError(f"mesh {text!r} needs {rest}{fixed} devices, there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices[:count])
    except (NotImplementedError, AssertionError) as error:  # a TPU slice is a torus
        raise ValueError(f"mesh {text!r} does not fit the torus of the slice: {error}") from error


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The first axis split over data and fsdp."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch",), RULES))


def split_items(x: jax.Array) -> jax.Array:
    """[B, ...] as it is; on a mesh, its items go where the batch's are.

    Without being told, XLA also splits the width of activations, as that of parameters is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    told = any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    batch = None if mesh.empty or told else dividing_axes(mesh, "batch", x.shape[0])
    if batch is None:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch, *others))


def dividing_axes(
    mesh: jax.sharding.AbstractMesh, logical_name: str, size: int
) -> tuple[str, ...] | None:
    """The mesh axes of a logical axis by RULES, if they divide `size`; else None: not split."""
    axes = dict(RULES)[logical_name] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    present = tuple(axis for axis in axes if axis in mesh.shape)
    parts = math.prod(mesh.shape[axis] for axis in present)
    return present if present and size % parts == 0 else None


def check_batch_size(mesh: jax.sharding.Mesh, batch_size: int) -> None:
    """Raises ValueError unless the batch can be split over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} must be a multiple of {parts}, the mesh's data x fsdp"
        )


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, and so has to feed.

    In rising order, but with gaps: a mesh follows the torus of a TPU slice, not its hosts.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in slices for row in range(batch_size)[rows]})


def global_batch(mesh: jax.sharding.Mesh, batch_size: int, batch: Any) -> Any:
    """Arrays of all processes from the `local_rows` that each of them holds."""
    sharding = batch_sharding(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(put, batch)


def whole(tree: Any, shardings: Any) -> Any:
    """Puts arrays that every process has whole onto a mesh."""

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def on_one_device(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays on a mesh, whole on the first device of each process."""
    if mesh.size == 1:
        return tree
    tree = jax.jit(_same, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def _same(tree: Any) -> Any:
    return tree


def connect(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Makes this one of several processes that train together, before jax is used.

    On TPU slices (also those of GKE) and under Slurm the environment says which; elsewhere the
    arguments do. Slurm's processes get one GPU each, those of the arguments all of their host.

    Args:
      coordinator_address: HOST:PORT of process 0; empty: as the environment says, else a process
        on its own.
      num_processes: How many there are.
      process_id: Which one this is, 0..num_processes - 1.

    Raises:
      ValueError: A number out of range, a wrong address or none, or others that do not answer.
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
    """Whether jax finds out by itself who the others are: Slurm steps, GKE, Cloud TPU VMs."""
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return True
    if os.environ.get("JAX_PLATFORMS") == "cpu":  # not on the VM's chips, so not with its peers
        return False
    if "TPU_WORKER_HOSTNAMES" in os.environ:
        return True
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        return False
    # jax looks for TPUs on the PCI bus; in /dev/vfio may be a GPU that is passed through.
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and any(path.read_text().strip() == "0x1ae0" for path in vendors)  # Google


def is_main_process() -> bool:
    """Whether this process writes logs and listings."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes; `name` differs from barrier to barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(yes: bool) -> bool:
    """Whether `yes` holds in all processes."""
    if jax.process_count() == 1:
        return yes
    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


# Parameters are gathered while something else is computed, not before it; and in one piece: from
# a pure fsdp mesh XLA would else make products of narrow slices, with three times the traffic.
_TPU_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_enable_async_all_gather": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,  # else by sums of zeros over fsdp alone
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # Sums of gradients: by the SparseCores of v5p and v6e...
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
}
_WITHOUT_SPARSE_CORES = {  # ... and else beside what is computed; so are parameters gathered.
    "xla_enable_async_reduce_scatter_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,  # norms, too
}


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool | int]:
    """What `jax.jit` should tell the compiler about programs on this mesh."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return {}
    without = device.device_kind in ("TPU v4", "TPU v5 lite")
    return _TPU_OPTIONS | (_WITHOUT_SPARSE_CORES if without else {})


def fitting(
    mesh: jax.sharding.Mesh, names: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """Sharding of an array whose axes have logical names.

    What does not divide stays whole, and gives its part of the mesh to the next axis in RULES.
    """

    def divides(size: int, axes: str | tuple[str, ...] | None) -> bool:
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(mesh.shape[axis] for axis in axes) == 0

    while True:
        axes = nn.logical_to_mesh_axes(names, RULES)
        fit = [divides(size, a) for size, a in zip(shape, axes, strict=True)]
        if all(fit):
            return NamedSharding(mesh, axes)
        names = [name if f else None for name, f in zip(names, fit, strict=True)]


def param_shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
    """NamedShardings for a tree of parameters whose leaves carry logical names (boxed).

    They are `fitting`.

    Raises:
      ValueError: A large parameter would be whole on all devices along fsdp (on a mesh without
        fsdp: along tensor).
    """
    needed = next((axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1), None)

    def sharding(path: Any, box: nn.LogicallyPartitioned) -> NamedSharding:
        shape = box.value.shape
        placed = fitting(mesh, box.names, shape)
        if needed and needed not in placed.spec and math.prod(shape) >= LARGE:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"mesh {dict(mesh.shape)}: {name} {list(shape)} would be replicated along "
                f"{needed}, its axes are {box.names}; choose fsdp and tensor that divide them"
            )
        return placed

    def is_box(x: Any) -> bool:
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)
