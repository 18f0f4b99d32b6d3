"""Random damage to the bytes of a file, for tests of what readers make of it."""

import numpy as np


def damaged(content: bytes, rng: np.random.Generator, most: int = 200) -> bytes:
    """Bits flipped, the end cut off, a range of zeros, or bytes that do not belong there; ranges are below `most`."""
    place, size = int(rng.integers(len(content))), int(rng.integers(1, most))
    match rng.integers(4):
        case 0:
            spoiled = bytearray(content)
            for at in rng.integers(len(content), size=rng.integers(1, 4)):
                spoiled[at] ^= 1 << int(rng.integers(8))
            return bytes(spoiled)
        case 1:
            return content[:place]
        case 2:
            return content[:place] + bytes(len(content[place : place + size])) + content[place + size :]
        case _:
            return content[:place] + rng.bytes(size) + content[place:]
