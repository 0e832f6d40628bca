"""The axes of a mesh of devices, and their sizes as text; needs no jax."""

MESH_AXES = ("data", "fsdp", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the axes in `text`, "data:4,fsdp:8": 1 for those not named, -1 for the rest.

    Raises:
      ValueError: Another name or form, a size that is neither positive nor -1, or -1 twice.
    """
    sizes = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        known = name in MESH_AXES and name not in sizes
        if not known or not (size == "-1" or size.isdecimal() and int(size) > 0):
            raise ValueError(
                f"mesh must be {','.join(f'{axis}:N' for axis in MESH_AXES)} or some of them, "
                f"N positive or -1 for the rest, got {text!r}"
            )
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh must have one -1 at most, got {text!r}")
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}
