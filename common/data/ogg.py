"""Inspects the pages of an Ogg file: libsndfile decodes a file exactly only if it is one stream without damage.

Decoders skip damaged pages, and all streams after the first, without a message. Format: RFC 3533.
"""

import struct
import zlib
from typing import BinaryIO, Literal

Wholeness = Literal["whole", "unended", "several", "damaged"]

MARK = b"OggS"
HEADER = struct.Struct("<4sBBqIIIB")  # mark, version, flags, position, stream, number, checksum, count of segments
FIRST, LAST = 2, 4  # flags of a stream's first and last page
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def inspect_ogg(file: BinaryIO) -> Wholeness:
    """The state of a file, from the headers and checksums of all its pages.

    Returns:
        `whole`: one stream, its pages complete, in order, with right checksums, up to one that is marked as the last.
        `unended`: the same without the last page. `several`: undamaged streams one after the other, or interleaved.
        `damaged`: anything else.
    """
    file.seek(0)
    expected: dict[int, int] = {}  # stream → number of its next page
    streams = flags = 0
    while header := file.read(HEADER.size):
        if len(header) < HEADER.size:
            return "unended"
        mark, _, flags, _, stream, number, checksum, segments = HEADER.unpack(header)
        lengths = file.read(segments)
        body = file.read(sum(lengths))
        if mark != MARK:
            return "damaged"
        if len(body) < sum(lengths):
            return "unended"
        if flags & FIRST:
            streams, expected[stream] = streams + 1, 0
        page = header[:22] + bytes(4) + header[26:] + lengths + body
        if number != expected.get(stream) or _checksum(page) != checksum:
            return "damaged"
        expected[stream] = number + 1
    if streams > 1:
        return "several"
    return "whole" if flags & LAST else "unended"


def _checksum(page: bytes) -> int:
    """Ogg's CRC, which is zlib's with the bits of all bytes reversed, and without inversions."""
    value = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)
