"""`shoal quantize`: a model with its large weights in few bits, as a folder others can read too.

    shoal quantize smollm2-135m -o smollm2-int4 --format int4

The folder is in the compressed-tensors format: shoal, vLLM and transformers load it. Rounds each
value to the nearest; calibrates nothing. Knows nothing of how files are laid out.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shoal.cli import options
from shoal.core.errors import ConfigError

if TYPE_CHECKING:
    from shoal.cli.quantized_folder import Source
    from shoal.model.export_targets import Target


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it; sizes are of the weights, `tables` the embedding and the head."""

    output: str
    format: str
    group_size: int | None
    size_before_bytes: int
    size_after_bytes: int
    num_weights: int
    num_quantized: int
    num_left_plain: int
    quantized_bytes: int
    tables_bytes: int
    tables_int8_bytes: int
    include_head: bool
    seconds: float


def quantize(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="New folder for the result.")
    ],
    weight_format: Annotated[
        Literal["int8", "int4", "fp8"], typer.Option("--format", help="Of the projections.")
    ] = "int8",
    group_size: Annotated[
        int, typer.Option("--group-size", help="Columns that share a scale (not fp8).", min=2)
    ] = 32,
    include_head: Annotated[
        bool,
        typer.Option("--include-head", help="Embedding and head too, in 8 bits; only shoal reads."),
    ] = False,
    revision: options.Revision = None,
    hf_token: options.HfToken = None,
    as_json: options.Json = False,
) -> None:
    """Write a model with its weights in few bits."""
    from shoal.cli.quantized_folder import Source, check_output, write_folder
    from shoal.cli.terminal import byte_bar, find_model

    output = output.expanduser().absolute()
    check_output(output)
    path = find_model(model, revision, hf_token).path
    started_s = time.perf_counter()
    from shoal.model.spec import read_spec

    source = Source(path, read_spec(path))
    targets = _targets(source, weight_format, group_size, include_head)
    with byte_bar(f"writing {output.name}") as progress:
        size = write_folder(source, targets, output, progress)
    seconds = time.perf_counter() - started_s
    report = _report(source, targets, output, weight_format, group_size, size, seconds)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
        return
    print("\n".join(_lines(report)))


def _targets(
    source: Source, weight_format: Literal["int8", "int4", "fp8"], group_size: int, head: bool
) -> list[Target]:
    from shoal.model.export_targets import choose_targets
    from shoal.model.exports import folder_exports, gguf_exports
    from shoal.model.gguf_source import GGUFSource
    from shoal.model.safetensors_source import SafetensorsSource

    if source.path.is_dir():
        exports = folder_exports(source.spec, SafetensorsSource(source.path))
    else:
        exports = gguf_exports(source.spec, GGUFSource(source.path))
    targets = choose_targets(exports, weight_format, group_size, include_head=head)
    if not any(target.format for target in targets if target.export.role == "projection"):
        widths = {export.shape[1] for export in exports if export.role == "projection"}
        raise ConfigError(
            f"no weight has whole groups of {group_size} columns (they have "
            f"{', '.join(map(str, sorted(widths)))}; needed are whole groups of it and of 8, of an "
            "even size for int4); choose another --group-size, or --format fp8"
        )
    return targets


def _report(
    source: Source,
    targets: list[Target],
    output: Path,
    weight_format: str,
    group_size: int,
    size: int,
    seconds: float,
) -> Report:
    quantized = [each for each in targets if each.format and each.export.role == "projection"]
    plain = [each for each in targets if not each.format and each.export.role == "projection"]
    tables = [each for each in targets if each.export.role == "table"]
    in_tables = sum(each.num_values for each in tables)
    return Report(
        output=str(output),
        format=weight_format,
        group_size=None if weight_format == "fp8" else group_size,
        size_before_bytes=source.size_bytes,
        size_after_bytes=size,
        num_weights=sum(each.num_values for each in targets),
        num_quantized=sum(each.num_values for each in quantized),
        num_left_plain=len(plain),
        quantized_bytes=_size(quantized),
        tables_bytes=_size(tables),
        tables_int8_bytes=round(in_tables * (1 + 2 / group_size)),
        include_head=any(each.format for each in tables),
        seconds=seconds,
    )


def _size(targets: list[Target]) -> int:
    return sum(plan.num_bytes for target in targets for plan in target.plans())


def _lines(report: Report) -> list[str]:
    from shoal.model.cache import human_bytes

    def bits(num_bytes: int, num_weights: int) -> str:
        return f"{8 * num_bytes / max(1, num_weights):.2f}"

    before, after, count = report.size_before_bytes, report.size_after_bytes, report.num_weights
    rows = [
        ("", "before", "after"),
        ("size", human_bytes(before), human_bytes(after)),
        ("bits per weight", bits(before, count), bits(after, count)),
        ("  of projections", "", bits(report.quantized_bytes, report.num_quantized)),
    ]
    lines = [f"{name:<18}{old:>10}{new:>10}".rstrip() for name, old, new in rows]
    tables = human_bytes(report.tables_bytes)
    if report.include_head:
        lines.append(f"embedding and head {tables}, in 8 bits: only shoal reads this")
    else:
        share = 100 * report.tables_bytes / after
        lines.append(
            f"embedding and head stay in 16 bits: {tables}, {share:.0f} % of it; --include-head "
            f"makes that {human_bytes(report.tables_int8_bytes)}"
        )
    if report.num_left_plain:
        lines.append(
            f"{report.num_left_plain} weights have no whole groups of {report.group_size} columns "
            "and stay as they were"
        )
    return [*lines, f"{report.output} in {report.seconds:.1f} s"]
