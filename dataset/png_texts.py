"""PNG files whose texts or colour profile are so long that PIL refuses the whole picture for them."""

import struct
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # nothing of them is read but, of short ones, the orientation


def chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, first byte and the byte after the last of each chunk of a PNG file: length and kind take 8
    bytes, the checksum at its end 4; nothing of any other file.
    """
    at = len(SIGNATURE) if content.startswith(SIGNATURE) else len(content)
    while at + 12 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        yield kind, at, at + 12 + size
        at += 12 + size


def without_long_texts(content: bytes) -> bytes:
    """Return a PNG file without the texts and the profile that are too long for PIL; any other file as it is.

    They are not unpacked beyond PIL's limits, so that a decompression bomb in them does no harm either.
    """
    kept, begin, num_bytes = [], 0, 0
    for kind, at, end in chunks(content):
        if kind in TEXTS:
            length = _length(kind, content[at + 8 : end - 4])
            num_bytes += length
            if length > PngImagePlugin.MAX_TEXT_CHUNK or num_bytes > PngImagePlugin.MAX_TEXT_MEMORY:
                kept.append(content[begin:at])
                begin = end
    return b"".join([*kept, content[begin:]]) if kept else content


def _length(kind: bytes, data: bytes) -> int:
    """Return the bytes of a text or profile when unpacked; of a longer one, the limit and one more."""
    packed = data.partition(b"\0")[2]  # after keyword or name
    if kind == b"iTXt":
        is_packed, packed = packed[:1] == b"\1", b"\0".join(packed[1:].split(b"\0")[2:])
        if not is_packed:
            return len(data)
    elif kind == b"tEXt":
        return len(data)
    if packed[:1] != b"\0":  # a way of packing that there is none of, for which PIL refuses the picture
        return PngImagePlugin.MAX_TEXT_CHUNK + 1
    unpack = zlib.decompressobj()
    try:
        length = len(unpack.decompress(packed[1:], PngImagePlugin.MAX_TEXT_CHUNK))
    except zlib.error:  # PIL leaves it out, too
        return 0
    return PngImagePlugin.MAX_TEXT_CHUNK + 1 if unpack.unconsumed_tail else length
