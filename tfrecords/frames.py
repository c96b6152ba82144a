"""The frames of a TFRecord file: 8 bytes length, 4 bytes checksum of it, the record, 4 bytes checksum of that.

TensorFlow reads these files. It can neither hash one while it writes or reads it, nor go on behind a damaged record,
nor say how much of a file is sound.
"""

import os
import struct

import google_crc32c

HEADER, FOOTER = 12, 4
_CHUNK = 2**20


def frame(record):
    """What stands before and after a record: two bytes objects."""
    length = struct.pack("<Q", len(record))
    return length + _checksum(length), _checksum(record)


def read_frames(path, digest=None):
    """Reads a file record by record, and goes on behind a damaged one where its length can be trusted.

    Args:
        path: the file.
        digest: an object of hashlib, which is given every byte of the file, also those that are in no frame.

    Yields:
        (record, None), or (None, what is wrong).
    """
    note = digest.update if digest is not None else len
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size
        while left:
            header = file.read(HEADER)
            note(header)
            left -= len(header)
            if len(header) < HEADER:
                yield None, "the frame is damaged (the file ends inside its header)"
                return
            length = struct.unpack_from("<Q", header)[0]
            trusted = header[8:] == _checksum(header[:8])
            if length + FOOTER > left:
                reason = "the file ends before it does" if trusted else "its length is wrong"
                yield None, f"the frame is damaged ({reason})"
                _read_on(file, note)
                return
            if trusted:
                record, footer = file.read(length), file.read(FOOTER)
                note(record)
                note(footer)
                whole = footer == _checksum(record)
                yield (record, None) if whole else (None, "the frame is damaged (the checksum of the record is wrong)")
                left -= length + FOOTER
                continue
            # Unless the record fits its checksum, the length itself is damaged, and nothing behind it can be found.
            crc = _read_on(file, note, length)
            footer = file.read(FOOTER)
            note(footer)
            left -= length + FOOTER
            if footer != _mask(crc):
                yield None, "the frame is damaged (its length is wrong, and where the next one begins is unknown)"
                _read_on(file, note)
                return
            yield None, "the frame is damaged (the checksum of the length is wrong)"


def _read_on(file, note, count=None):
    crc = 0
    while count is None or count:
        chunk = file.read(_CHUNK if count is None else min(_CHUNK, count))
        if not chunk:
            break
        note(chunk)
        crc = google_crc32c.extend(crc, chunk)
        count = None if count is None else count - len(chunk)
    return crc


def _checksum(data):
    return _mask(google_crc32c.value(data))


def _mask(crc):
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
