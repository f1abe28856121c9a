"""FP8 checkpoints: float8_e4m3fn weights under their plain names, with a scale beside them.

    <module>.weight            F8_E4M3 [F, K]
    <module>.weight_scale_inv  one a block (DeepSeek, Qwen; what a code is multiplied by, whatever
                               its name says), or
    <module>.weight_scale      one for the weight, or one a row

Modules left out of it have a plain weight and no scale. Knows nothing of compressed-tensors,
which keeps its FP8 the same way under another config.
"""

from __future__ import annotations

from functools import partial

from shoal.core.errors import UnsupportedModelError, WeightsError
from shoal.model.fields import Fields
from shoal.model.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from shoal.model.scale_layouts import scale_layout
from shoal.model.stored_weights import Float8Weight, StoredWeight


def read_fp8(files: SafetensorsFiles, settings: Fields) -> dict[str, StoredWeight]:
    """Every FP8 weight; see `quantized_checkpoints.find_stored_weights` for errors."""
    layout = settings.text("fmt", "e4m3").lower()
    if layout not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedModelError(
            f"{settings.source}: fp8 of the kind {layout!r} is not supported; shoal reads e4m3: "
            "use such a checkpoint, or the plain one"
        )
    block = _block(settings)
    weights = [name for name in files.names if name.endswith(".weight")]
    return {
        name: float8_weight(files, name, blocks=() if block is None else (block,))
        for name in weights
        if files.dtype(name) == "F8_E4M3"
    }


def float8_weight(
    files: SafetensorsFiles,
    name: str,
    *,
    group_sizes: tuple[int, ...] = (),
    blocks: tuple[tuple[int, int], ...] = (),
) -> Float8Weight:
    """The FP8 weight `name` with the scale that lies beside it.

    Raises:
        WeightsError: no scale, or one that does not fit.
    """
    rows, columns = files.expect(name, ("F8_E4M3",), (None, None))
    scale = next((f"{name}_{kind}" for kind in _SCALES if f"{name}_{kind}" in files.names), None)
    if scale is None:
        raise WeightsError(
            f"{files.folder}: {name} is F8_E4M3 and has no {name}_scale or {name}_scale_inv; "
            "fetch the model again"
        )
    files.expect(scale, FLOAT_TYPES, (None,) * len(files.shape(scale)))
    shape = (rows, columns)
    layout = scale_layout(files, scale, shape, group_sizes=group_sizes, blocks=blocks)
    return Float8Weight(
        shape=shape,
        num_bytes=files.num_bytes(name) + files.num_bytes(scale),
        group_size=layout.columns,
        codes=partial(files.rows, name),
        scales=layout.reader(files, scale),
    )


_SCALES = ("scale_inv", "scale")


def _block(settings: Fields) -> tuple[int, int] | None:
    if "weight_block_size" not in settings:
        return None
    size = settings.values["weight_block_size"]
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(isinstance(length, int) and length > 0 for length in size)
    ):
        raise UnsupportedModelError(
            f"{settings.source}: weight_block_size is {size!r}; needed two numbers such as "
            "[128, 128]"
        )
    return size[0], size[1]
