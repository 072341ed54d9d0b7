"""PNG and JPEG files as what they are made of, so that only what decides the pixels reaches the decoder.

Texts, comments, previews and films that travel along can be large, damaged or look like picture data; whoever wants
the pixels need not care. Nothing here reads a file whole.
"""

from __future__ import annotations

import io
import re
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

MOST = 2**24  # bytes of what tells about a picture, such as its colour profile; more is left out
MOST_TEXT = 2**19  # bytes of a compressed text; Pillow refuses a file with more than twice as many
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
# Decoders may pass over these chunks, yet they decide pixels: transparency, frames, EXIF data.
PNG_USED = (b"tRNS", b"acTL", b"fcTL", b"eXIf")
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
PNG_TEXTS_USED = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # may say which way up the picture is
PNG_TOLD = (b"iCCP", b"sBIT", b"gAMA", b"cHRM", b"sRGB", b"cICP")  # colours and the range of values
# Of a JPEG file's comments and applications' segments, by marker, beginning and least length: what the channels are,
# which way up the picture is, and its colour profile.
JPEG_USED = {
    0xE0: {b"JFIF": 14},
    0xE1: {b"Exif\0\0": 8, b"http://ns.adobe.com/xap/1.0/\0": 29},
    0xE2: {b"ICC_PROFILE\0": 14},
    0xEE: {b"Adobe": 12},
}
JPEG_EXTRA = (*range(0xE0, 0xF0), 0xFE)
JPEG_ALONE = (0x01, 0xD8)  # markers without a segment
JPEG_SCAN, JPEG_END = 0xDA, 0xD9
JPEG_MARKER = re.compile(rb"\xff([^\xff\x00\xd0-\xd7])")  # the others stand in picture data
FIRST, LARGEST = 2**12, 2**20  # bytes read at a time


@dataclass
class Parts:
    """What a PNG or JPEG file is made of."""

    kept: list[tuple[int, int]] = field(default_factory=list)  # for the decoder: first byte, and the one after the last
    told: dict[bytes, bytes] = field(default_factory=dict)  # what chunks of `PNG_TOLD` hold; b"" if damaged
    scans: int = 0  # of a JPEG file

    def keep(self, start: int, stop: int) -> None:
        """Add bytes for the decoder."""
        if self.kept and self.kept[-1][1] == start:
            start = self.kept.pop()[0]
        if start < stop:
            self.kept.append((start, stop))


class Spans(io.RawIOBase):
    """Some spans of a file, read as if they were one file."""

    def __init__(self, file, spans: list[tuple[int, int]]):
        self.file, self.spans, self.place = file, spans, 0
        self.ends = list(accumulate(stop - start for start, stop in spans))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.ends[-1])[whence]
        return self.place

    def readinto(self, buffer) -> int:
        i = bisect_right(self.ends, self.place)
        if i == len(self.ends):
            return 0
        left = self.ends[i] - self.place
        self.file.seek(self.spans[i][1] - left)
        data = self.file.read(min(left, len(buffer)))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def parts(file, most_scans: int, start: int = 0) -> Parts:
    """What a file is made of; nothing if it is neither PNG nor JPEG. Where it was read last does not change.

    Of a JPEG file that is the picture at `start`, with no more than one scan beyond `most_scans`.
    """
    place = file.tell()
    file.seek(start)
    head = file.read(len(PNG))
    found = _png(file) if head == PNG else _jpeg(file, most_scans, start) if head.startswith(JPEG) else Parts()
    file.seek(place)
    return found


def for_decoder(file, found: Parts) -> io.BufferedReader:
    """The file without what decides no pixel."""
    return io.BufferedReader(Spans(file, found.kept), LARGEST)


def _png(file) -> Parts:
    found, place, name = Parts([(0, len(PNG))]), len(PNG), b""
    while name != b"IEND":
        file.seek(place)
        head = file.read(8)
        name = head[4:]
        if not re.fullmatch(rb"[A-Za-z]{4}", name):  # cut off or damaged, for the decoder to say
            found.keep(place, file.seek(0, io.SEEK_END))
            break
        start, length = place, int.from_bytes(head[:4], "big")
        place += 12 + length
        if name[:1].isupper() or name == b"fdAT":
            found.keep(start, place)
        elif name in PNG_TOLD:
            data = _chunk(file, name, length) or b""
            found.told[name] = _inflated(data.partition(b"\0")[2][1:], MOST) if name == b"iCCP" else data
        elif name in PNG_USED + PNG_TEXTS and _is_used(name, _chunk(file, name, length)):
            found.keep(start, place)
    return found


def _chunk(file, name: bytes, length: int) -> bytes | None:
    """What a chunk holds, from the place where that begins; None if it is too much or damaged."""
    data = file.read(length + 4) if length <= MOST else b""
    good = len(data) == length + 4 and zlib.crc32(name + data[:-4]) == int.from_bytes(data[-4:], "big")
    return data[:-4] if good else None


def _is_used(name: bytes, data: bytes | None) -> bool:
    if data is None or name in PNG_USED:
        return data is not None
    keyword, _, text = data.partition(b"\0")
    if name == b"iTXt":
        return keyword in PNG_TEXTS_USED and text.startswith(b"\0")  # not compressed
    return keyword in PNG_TEXTS_USED and (name == b"tEXt" or _inflated(text[1:], MOST_TEXT) != b"")


def _inflated(data: bytes, most: int) -> bytes:
    """Decompressed; nothing if that is too much or damaged."""
    try:
        inflate = zlib.decompressobj()
        whole = inflate.decompress(data, most)
    except zlib.error:
        return b""
    return whole if inflate.eof else b""


def _jpeg(file, most_scans: int, start: int) -> Parts:
    found, done, marker, place = Parts(), start, 0, start + 2
    while marker != JPEG_END and found.scans <= most_scans:
        marker, start, place = _marker(file, place)
        if marker == JPEG_END or marker in JPEG_ALONE:
            continue
        file.seek(place)
        head = file.read(40)
        length = int.from_bytes(head[:2], "big")
        place += max(2, length)
        found.scans += marker == JPEG_SCAN
        used = JPEG_USED.get(marker, {}).items()
        if marker in JPEG_EXTRA and not any(head.startswith(name, 2) and length >= 2 + least for name, least in used):
            found.keep(done, start)
            done = place
    found.keep(done, place)
    return found


def _marker(file, place: int) -> tuple[int, int, int]:
    """The next marker of a JPEG file, where it begins and ends; the end of the picture where the file ends."""
    size = FIRST
    while True:
        file.seek(place)
        block = file.read(size)
        if found := JPEG_MARKER.search(block):
            return found[1][0], place + found.start(), place + found.end()
        if len(block) < 2:
            return JPEG_END, place, place + len(block)
        place, size = place + len(block) - block.endswith(b"\xff"), min(2 * size, LARGEST)
