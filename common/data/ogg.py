"""The pages of an Ogg file: whether it is one stream without a fault, which libsndfile decodes exactly.

Decoders pass over damaged pages, and over all streams after the first, without a word. Format: RFC 3533.
"""

import struct
import zlib
from typing import BinaryIO, Literal

Wholeness = Literal["whole", "unended", "damaged"]

MARK = b"OggS"
HEADER = struct.Struct("<4sBBqIIIB")  # mark, version, flags, position, stream, number, checksum, count of segments
FIRST, LAST = 2, 4  # flags of a stream's first and last page
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def inspect_ogg(file: BinaryIO) -> Wholeness:
    """`whole`: one stream, its pages complete, in order and with right checksums, up to one that is marked as the last.

    `unended`: the same without the last page. `damaged`: anything else, joined and multiplexed streams included.
    """
    file.seek(0)
    expected, stream, flags = 0, None, 0
    while header := file.read(HEADER.size):
        if len(header) < HEADER.size:
            return "unended"
        mark, _, flags, _, page_stream, number, checksum, segments = HEADER.unpack(header)
        lengths = file.read(segments)
        body = file.read(sum(lengths))
        if mark == MARK and len(body) < sum(lengths):
            return "unended"
        stream = page_stream if stream is None else stream
        if mark != MARK or (page_stream, number) != (stream, expected) or bool(flags & FIRST) != (number == 0):
            return "damaged"
        if _checksum(header[:22] + bytes(4) + header[26:] + lengths + body) != checksum:
            return "damaged"
        expected += 1
    return "whole" if flags & LAST else "unended"


def _checksum(page: bytes) -> int:
    """Ogg's CRC is zlib's with the bits of all bytes the other way round, and without inversions."""
    value = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)
