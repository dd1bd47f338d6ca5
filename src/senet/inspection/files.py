"""Excitations on disk: ``.npz`` for Python programs, ``.parquet`` for everything that reads tables."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from senet._version import __version__
from senet.errors import InputError
from senet.inspection.site_excitations import Extremes, SiteExcitations
from senet.system.atomic import write_atomically
from senet.text import first_line
from senet.weights.metadata import check_fields

if TYPE_CHECKING:
    import pyarrow as pa

_FORMAT = "senet excitations 1"
_GATE = ("name", "kind", "function", "low", "neutral", "high")
_ARRAYS = ("count", "mean", "m2", "lowest", "highest")
_ENDS = ("opening", "closing")
_MAX_BYTES = 2**33  # for all numbers; enough for 21,000 classes and 24,000 gated channels
_MAX_RATIO = 1032  # the maximum compression ratio of deflate
_ROW_BYTES = 64  # for the numbers in one table row
# Errors from a damaged header or damaged numbers, in either format.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError)


class Content(NamedTuple):
    """The content of a file: the attributes of ``Excitations``."""

    sites: dict[str, SiteExcitations]
    classes: tuple[str, ...]
    names: dict[int, str]
    about: dict[str, str]


class _Gate(TypedDict):
    name: str
    kind: str
    function: str
    low: Any  # a number, possibly infinite
    neutral: Any
    high: Any


class _Header(TypedDict):
    classes: list[str]
    names: dict[str, str]
    about: dict[str, Any]
    gates: list[_Gate]


def save(path: str | os.PathLike[str], content: Content) -> None:
    """Write a file atomically, in the format of its extension; see ``Excitations.save``."""
    path = Path(path)
    if path.suffix == ".npz":
        text = io.BytesIO()
        arrays: dict[str, Any] = _to_arrays(content)
        np.savez_compressed(text, **arrays)
        write_atomically(path, text.getvalue())
    elif path.suffix == ".parquet":
        _, parquet = _pyarrow()
        sink = io.BytesIO()
        parquet.write_table(_to_table(content), sink, compression="zstd")
        write_atomically(path, sink.getvalue())
    else:
        raise InputError(f"{path}: excitations are saved as .npz or .parquet; use one of these extensions")


def load(path: str | os.PathLike[str]) -> Content:
    """Read a file in the format of its extension; see ``Excitations.load``."""
    path = Path(path)
    if path.suffix not in (".npz", ".parquet"):
        raise InputError(f"{path}: excitations are saved as .npz or .parquet; use one of these extensions")
    if not path.is_file():
        raise InputError(f"{path}: no such file of excitations; check the path")
    if path.suffix == ".parquet":
        return _load_parquet(path)
    try:
        _check_archive(path)
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return _from_arrays({name: file[name] for name in file.files})
    except (*_DAMAGE, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error


def _check_archive(path: Path) -> None:
    """Refuse arrays that claim more data than the archive holds, before reading any."""
    with zipfile.ZipFile(path) as archive:
        total = 0
        for part in archive.infolist():
            with archive.open(part) as file:
                claimed = _claimed_bytes(file)
            if claimed > part.file_size or part.file_size > _MAX_RATIO * part.compress_size:
                raise ValueError(f"{part.filename} claims {max(claimed, part.file_size):,} bytes, more than it holds")
            total += part.file_size
    _check_total(total)


def _claimed_bytes(file: IO[bytes]) -> int:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    return math.prod(shape) * kind.itemsize


def _check_total(claimed: int) -> None:
    if claimed > _MAX_BYTES:
        raise ValueError(f"it claims {claimed:,} bytes of numbers, the maximum is {_MAX_BYTES:,}")


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable file of excitations ({first_line(error)}); record them again")


def _header(content: Content) -> str:
    values = {
        "format": _FORMAT,
        "senet_version": __version__,
        "classes": content.classes,
        "names": content.names,
        "about": content.about,
        "gates": [{name: getattr(site, name) for name in _GATE} for site in content.sites.values()],
    }
    return json.dumps(values)


def _from_header(text: str) -> dict[str, Any]:
    header = json.loads(text)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError("its header has another format")
    check_fields(header, _Header, "its header is damaged:")
    return header


def _assembled(header: dict[str, Any], sites: list[SiteExcitations]) -> Content:
    names = {int(number): name for number, name in header["names"].items()}
    return Content({site.name: site for site in sites}, tuple(header["classes"]), names, header["about"])


def _to_arrays(content: Content) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"header": np.array(_header(content))}
    for number, site in enumerate(content.sites.values()):
        arrays |= {f"{number}.{name}": getattr(site, name) for name in _ARRAYS}
        for end in _ENDS:
            extremes = getattr(site, end)
            arrays |= {f"{number}.{end}.values": extremes.values, f"{number}.{end}.images": extremes.images}
    return arrays


def _from_arrays(arrays: dict[str, NDArray[Any]]) -> Content:
    header = _from_header(str(arrays["header"]))
    sites = []
    for number, gate in enumerate(header["gates"]):
        values: dict[str, Any] = {name: arrays[f"{number}.{name}"] for name in _ARRAYS}
        for end in _ENDS:
            extremes, images = (arrays[f"{number}.{end}.{part}"] for part in ("values", "images"))
            values[end] = Extremes(extremes, images, largest=end == "opening")
        sites.append(SiteExcitations(**gate, **values))
        _check_shapes(sites[-1], len(header["classes"]) + 1)
    return _assembled(header, sites)


def _check_shapes(site: SiteExcitations, rows: int) -> None:
    """Refuse arrays whose shapes or dtypes do not fit together and to the classes of the header."""
    channels = site.mean.shape[-1]
    wanted = {"count": (rows,), "mean": (rows, channels), "m2": (rows, channels)}
    wanted |= {"lowest": (channels,), "highest": (channels,)}
    for name, shape in wanted.items():
        array = getattr(site, name)
        if array.shape != shape or array.dtype.kind != ("i" if name == "count" else "f"):
            raise ValueError(f"{name} of {site.name} is {array.dtype} {array.shape}, which does not fit the others")
    if not all(isinstance(value, int | float) for value in (site.low, site.neutral, site.high)):
        raise ValueError(f"the range of {site.name} is not numeric")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise InputError(".parquet needs pyarrow: pip install 'senet[report]', or use .npz") from None
    return pyarrow, parquet


def _to_table(content: Content) -> pa.Table:
    """One row per gate, channel, and class, and one for all images, whose class is null."""
    pa, _ = _pyarrow()
    tables = [_site_table(pa, site, content.classes) for site in content.sites.values()]
    table = pa.concat_tables(tables) if tables else pa.table({})
    return table.replace_schema_metadata({"senet": _header(content)})


def _site_table(pa: Any, site: SiteExcitations, classes: tuple[str, ...]) -> Any:
    rows, channels = site.mean.shape
    overall_mean, overall_std = site.overall()
    std = np.sqrt(site.m2 / np.maximum(site.count, 1)[:, None])
    nothing = np.full(rows * channels, np.nan)

    def with_overall(per_row: NDArray[Any], overall: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([per_row.reshape(-1), overall])

    def ends(extremes: Extremes) -> dict[str, Any]:
        none: list[Any] = [None] * (rows * channels)
        return {
            "values": pa.array(none + extremes.values.tolist(), pa.list_(pa.float64())),
            "images": pa.array(none + extremes.images.tolist(), pa.list_(pa.int64())),
        }

    labels = [*classes, "(no class)"]
    columns = {
        "gate": pa.array([site.name] * (channels * (rows + 1))).dictionary_encode(),
        "channel": np.tile(np.arange(channels, dtype=np.int32), rows + 1),
        "class": pa.array([label for label in labels for _ in range(channels)] + [None] * channels, pa.string()),
        "images": np.repeat(np.append(site.count, site.images), channels),
        "mean": with_overall(site.mean, overall_mean),
        "std": with_overall(std, overall_std),
        "m2": with_overall(site.m2, overall_std**2 * site.images),
        "lowest": with_overall(nothing, site.lowest),
        "highest": with_overall(nothing, site.highest),
    }
    for end in _ENDS:
        columns |= {f"{end}_{part}": array for part, array in ends(getattr(site, end)).items()}
    return pa.table(columns)


def _load_parquet(path: Path) -> Content:
    pa, parquet = _pyarrow()
    try:
        about = parquet.read_metadata(path)
        _check_total(about.num_rows * _ROW_BYTES)
        _check_total(sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups)))
        table = parquet.read_table(path)
        header = _from_header((table.schema.metadata or {})[b"senet"].decode())
        rows = len(header["classes"]) + 1
        start, sites = 0, []
        gates = table["gate"].to_numpy(zero_copy_only=False) if header["gates"] else np.array([])
        for gate in header["gates"]:
            size = int((gates == gate["name"]).sum())
            sites.append(_site_from(table.slice(start, size), gate, rows))
            start += size
        return _assembled(header, sites)
    except (*_DAMAGE, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _site_from(table: Any, gate: dict[str, Any], rows: int) -> SiteExcitations:
    channels = table.num_rows // (rows + 1)
    per_row = rows * channels
    by_row = {name: table[name].to_numpy()[:per_row].reshape(rows, channels) for name in ("images", "mean", "m2")}
    overall = {name: table[name].to_numpy()[per_row:] for name in ("lowest", "highest")}
    values: dict[str, Any] = {
        "count": by_row["images"][:, 0].copy(),
        **{name: by_row[name].copy() for name in ("mean", "m2")},
        **{name: overall[name].copy() for name in overall},
    }
    for end in _ENDS:
        numbers = np.array(table[f"{end}_images"].slice(per_row).to_pylist(), np.int64).reshape(channels, -1)
        sizes = np.array(table[f"{end}_values"].slice(per_row).to_pylist(), np.float64).reshape(channels, -1)
        values[end] = Extremes(sizes, numbers, largest=end == "opening")
    return SiteExcitations(**gate, **values)
