"""Several utterances in one file: where each begins and ends, and whether the file is long enough."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.data.audio import AudioInfo
from common.data.importers.rows import TableRow
from common.data.importers.values import seconds
from common.errors import DataError

OVERHANG = 0.1  # seconds of a stretch past the end of its file that are rounding: they are cut off


def shared_files(rows: Sequence[TableRow]) -> dict[Path, list[TableRow]]:
    """Each file that several rows name → these rows."""
    rows_of: dict[Path, list[TableRow]] = defaultdict(list)
    for row in rows:
        rows_of[row.audio].append(row)
    return {audio: group for audio, group in rows_of.items() if len(group) > 1}


def unclear_stretches(shared: Mapping[Path, Sequence[TableRow]]) -> dict[str, str]:
    """Position of a row → its fault: the row shares its file with others without saying which part it uses."""
    faults: dict[str, str] = {}
    for audio, group in shared.items():
        whole = [row for row in group if "offset" not in row.values]
        starts = {row.where: seconds(row.values.get("offset", "0")) or 0.0 for row in group}
        for row in group:
            other = next((candidate for candidate in whole if candidate is not row), None) if row in whole else None
            if other is not None:
                faults[row.where] = (
                    f"{row.where}: {other.where} names {audio} too, and nothing says which part of it is whose: give "
                    "columns start and end (or offset and duration), or one file for each row"
                )
            elif not {"end", "duration"} & row.values.keys():
                start = starts[row.where]
                later = next(
                    (candidate for candidate in group if candidate is not row and starts[candidate.where] >= start),
                    None,
                )
                if later is not None:
                    faults[row.where] = (
                        f"{row.where}: begins at {start:g} s of {audio} and has no end, though {later.where} begins "
                        "after it in the same file: give its end or duration"
                    )
    return faults


def stretch_of(row: TableRow, info: AudioInfo, *, shared: bool, timed: bool) -> tuple[float, float]:
    """Offset and duration of a row's utterance, in seconds.

    Args:
        info: of its file.
        shared: other rows name the file too.
        timed: the table has offsets, so that a duration is that of a stretch, which begins at 0 if no offset is given.

    Raises:
        DataError: a value is not a time, or the stretch is not within the file.
    """
    start = _time(row, "offset")
    length = info.duration - start
    if "end" in row.values:
        length = _time(row, "end") - start
        if length <= 0:
            raise DataError(f"{row.where}: ends at {row.values['end']} s, before it begins ({start:g} s): correct it")
    elif "duration" in row.values and (shared or timed):
        length = _time(row, "duration")
    too_long = start + length > info.duration + OVERHANG
    if too_long and not shared and _is_whole_file(length, info):
        return 0.0, info.duration  # cut out already: the times are those in the longer recording
    if start >= info.duration:
        raise DataError(
            f"{row.where}: offset {start:g} s, but {row.audio} lasts {info.duration:.2f} s: correct it, or leave the "
            "columns of times out by --column offset="
        )
    if too_long:
        raise DataError(
            f"{row.where}: {start:g} s to {start + length:g} s, but {row.audio} lasts {info.duration:.2f} s: correct "
            "it, copy the file again if it is cut short, or leave the columns of times out by --column offset="
        )
    if length == 0:
        raise DataError(f"{row.where}: a duration of 0 s: correct it, or remove the row")
    return start, min(length, info.duration - start)


def _is_whole_file(length: float, info: AudioInfo) -> bool:
    """Whether a length equals that of the file, in seconds, milliseconds or samples."""
    return any(
        math.isclose(length / unit, info.duration, rel_tol=1e-3, abs_tol=OVERHANG) for unit in (1, 1000, info.rate)
    )


def _time(row: TableRow, field: str) -> float:
    value = row.values.get(field, "0")
    parsed = seconds(value)
    if parsed is None:
        raise DataError(f"{row.where}: {field} {value!r} is not a number of seconds of 0 or more: correct it")
    return parsed
