"""The axes of a device mesh, and their sizes as text. This module does not import jax."""

MESH_AXES = ("data", "fsdp", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Parses the sizes of the axes of a mesh.

    Args:
      text: For example "data:4,fsdp:8". Axes that are not named have size 1; one size may be -1,
        for all remaining devices.

    Returns:
      The size of each axis of MESH_AXES.

    Raises:
      ValueError: An axis is unknown or named twice, a size is neither positive nor -1, or two are
        -1.
    """
    sizes = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        is_new_axis = name in MESH_AXES and name not in sizes
        is_size = size == "-1" or size.isdecimal() and int(size) > 0
        if not (is_new_axis and is_size):
            axes = ",".join(f"{axis}:N" for axis in MESH_AXES)
            raise ValueError(
                f"mesh must be {axes} or some of them, N positive or -1 for the rest, got {text!r}"
            )
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh must have at most one -1, got {text!r}")
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}
