"""Damaged and odd picture files without end; run as a program, it reads some and tells how long and how large.

`python tests/predictions/fuzz_pictures.py 600 SEED` prints JSON: cases, read, refused, slowest (seconds), memory_mb
(above rest).
"""

from __future__ import annotations

import io
import json
import random
import sys
import time
from collections.abc import Iterator

from PIL import Image, features

SAVED = {"PNG": {}, "JPEG": {}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {}}
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
MODES = {"JPEG": ("RGB", "L", "CMYK"), "PPM": ("RGB", "L"), "BMP": ("RGB", "L", "P"), "JPEG2000": ("RGB", "L", "RGBA")}
MAGIC = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"RIFF\0\0\0\0WEBP",
    b"P6\n",
    b"",
)


def whole_files(rng: random.Random) -> Iterator[bytes]:
    """Good pictures of every kind and mode that can be written here, some animated, some 1 pixel wide."""
    kinds = {**SAVED, **{name: {} for name, feature in OPTIONAL.items() if features.check(feature)}}
    while True:
        kind = rng.choice(list(kinds))
        mode = rng.choice(MODES.get(kind, ("RGB", "L", "P", "RGBA", "LA", "1")))
        mode = "RGBA" if kind in ("WEBP", "AVIF") else mode
        size = rng.choice([(32, 32), (1, 1), (1, 200), (300, 7), (64, 48), (257, 255)])
        picture = Image.frombytes("RGBA", size, rng.randbytes(4 * size[0] * size[1])).convert("RGB").convert(mode)
        options = dict(kinds[kind])
        if kind in ("GIF", "WEBP", "PNG", "TIFF") and rng.random() < 0.3:
            options |= {"save_all": True, "append_images": [picture.copy() for _ in range(3)]}
        file = io.BytesIO()
        try:
            picture.save(file, kind, **options)
        except (OSError, ValueError, KeyError):  # not every mode fits every kind
            continue
        yield file.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The same bytes cut, flipped, repeated, moved about, or with large numbers where sizes stand."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if len(data) < 8:
            break
        at, span = rng.randrange(len(data)), rng.randint(1, 64)
        how = rng.randrange(7)
        if how == 0:
            del data[at:]
        elif how == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[at : at + span] = rng.randbytes(span)
        elif how == 3:
            data[at:at] = data[: rng.randint(1, 2000)]
        elif how == 4:
            del data[at : at + span]
        elif how == 5:  # sizes stand near the beginning
            at = rng.randrange(min(64, len(data)))
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\x40\0", b"\0\0\0\0"])
        else:
            data[: len(data) // 2], data[len(data) // 2 :] = data[len(data) // 2 :], data[: len(data) // 2]
    return bytes(data)


def cases(n: int, seed: int) -> Iterator[bytes]:
    """`n` files: most damaged, some whole, some noise after a kind's first bytes."""
    rng = random.Random(seed)
    files = whole_files(rng)
    for i in range(n):
        if i % 10 == 0:
            yield next(files)
        elif i % 10 == 1:
            yield rng.choice(MAGIC) + rng.randbytes(rng.randint(0, 3000))
        else:
            yield damaged(next(files), rng)


def refusal(data: bytes) -> str | None:
    """Read a file as a prediction would; the error's text where it is refused."""
    from cifar_ft.predictions.images import ImageError, squared

    try:
        assert squared(data).image.shape == (3, 32, 32)
    except ImageError as error:
        return str(error)
    return None


def main(n: int, seed: int) -> dict:
    """Read all cases and measure."""
    import resource

    refusal(b"")  # imports what reading needs
    files = list(cases(n, seed))
    rest, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {"cases": n, "read": 0, "refused": 0}
    slowest = 0.0
    for data in files:
        start = time.perf_counter()
        message = refusal(data)
        found["read" if message is None else "refused"] += 1
        assert message is None or len(message.splitlines()) == 1, message
        slowest = max(slowest, time.perf_counter() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rest) / (1024 if sys.platform == "linux" else 2**20)
    return {**found, "slowest": slowest, "memory_mb": memory}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
