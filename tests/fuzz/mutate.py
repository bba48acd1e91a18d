"""Files that are nearly right: a pure function of what they were, and of bits drawn for one case."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from milan_pipe.random_bits import raw_bits, seed_of

T = TypeVar("T")

_INTERESTING = (0, 1, -1, 2, 7, 127, 128, 255, 256, 511, 512, 4096, 65535, 2**20, 2**31 - 1, 2**31, 2**32, 2**33 + 1,
                2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
STRINGS = ("", " ", "x" * 5000, "../../x", "/tmp/x", "..", "a/../../x", "<b>m</b>[red]m[/red]", "{{ 7*7 }}", "a\0b",
           "\n", "\ud800", "\u00e9\u202e", "nan", "-1", "1e400", "0x10", "True", "null", "C:\\x", "%n%s", "~/x",
           "float128", "local-dir:/tmp", "hf-hub:a/b", "timm:x", "0" * 64)  # fmt: skip
# As they stand in a file: no library writes them.
_RAW = ("9" * 5000, "-" + "9" * 400, "1e999", "NaN", "-Infinity", "[" * 100_000, '{"a":' * 50_000, "tru", '"\\ud800"',
        "-0", "0.1", "1e3", "[[]]", "{}", "[]", "null", "true", "''", '"\\u0000"')  # fmt: skip
_YAML_RAW = ("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!!binary aGVsbG8=", "2001-01-01", "!x y",
             "*nothing", "&a [*a]", "!!set {a, b}", "!!int x", "!!float x", "!!timestamp 2001-99-99", "0o777", "1_000",
             "? [a]\n: b", "%TAG", "\t- x", "- x", "| x", "=", "<<", "12:30:45", ".inf", ".nan", "!!bool maybe",
             "[&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b], "
             "&d [*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e,*e], "
             "&g [*f,*f,*f,*f,*f,*f,*f,*f,*f], &h [*g,*g,*g,*g,*g,*g,*g,*g,*g], *h]")  # fmt: skip
_PICKLES = (
    b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR.",
    b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
    b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x001tR.",
    b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01}q\x02s.",
    b"\x80\x02]q\x00(h\x00h\x00e.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x80\x02X\xff\xff\xff\x7fabc.",
    b"\x80\x02B\xff\xff\xff\x7fabc.",
    b"(((((((" * 1000 + b".",
    b"\x80\x02ccollections\nOrderedDict\nq\x00)R.",
    b"\x80\x02ctorch\nfloat32\n.",
    b"\x80\x02K\x01.",
)


class Draw:
    """Numbers of one case."""

    def __init__(self, *of: int | str) -> None:
        self._key, self._sequence, self._bits = seed_of(*of).to_bytes(16, "little"), 0, iter(())

    def below(self, count: int) -> int:
        for bits in self._bits:
            return int(bits) % count
        (row,) = raw_bits([self._key], 256, self._sequence)
        self._bits, self._sequence = iter(row.tolist()), self._sequence + 1
        return self.below(count)

    def of(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def one_in(self, count: int) -> bool:
        return self.below(count) == 0


# --- bytes --------------------------------------------------------------------------------------------------------


def _span(data: bytes, draw: Draw, most: int = 64) -> tuple[int, int]:
    start = draw.below(len(data) + 1)
    return start, min(len(data), start + 1 + draw.below(most))


def _flip(data: bytes, _: bytes, draw: Draw) -> bytes:
    changed = bytearray(data)
    for _ in range(1 + draw.below(3)):
        changed[draw.below(len(changed))] ^= 1 << draw.below(8)
    return bytes(changed)


def _run(data: bytes, _: bytes, draw: Draw) -> bytes:
    start, stop = _span(data, draw)
    fill = draw.of((b"\0", b"\xff", b" ", b"0", b"9", b"\x80", b"/"))
    return data[:start] + fill * (stop - start) + data[stop:]


def _cut(data: bytes, _: bytes, draw: Draw) -> bytes:
    return data[: draw.below(len(data))]


def _drop(data: bytes, _: bytes, draw: Draw) -> bytes:
    start, stop = _span(data, draw, draw.of((1, 64, 1024)))
    return data[:start] + data[stop:]


def _insert(data: bytes, _: bytes, draw: Draw) -> bytes:
    start = draw.below(len(data) + 1)
    more = bytes(draw.below(256) for _ in range(1 + draw.below(16)))
    return data[:start] + draw.of((more, bytes(512), more * 100, b"\n", b'"', b"\xef\xbb\xbf")) + data[start:]


def _twice(data: bytes, _: bytes, draw: Draw) -> bytes:
    start, stop = _span(data, draw, draw.of((8, 512, 4096)))
    return data[:stop] + data[start:stop] * draw.of((1, 1, 50)) + data[stop:]


def _splice(data: bytes, other: bytes, draw: Draw) -> bytes:
    return data[: draw.below(len(data) + 1)] + other[draw.below(len(other) + 1) :]


def _integer(data: bytes, _: bytes, draw: Draw) -> bytes:
    size, order = draw.of((1, 2, 4, 8)), draw.of(("little", "big"))
    # Lengths stand at beginnings and ends.
    last = max(1, len(data) - size)
    at = draw.of((draw.below(last), draw.below(min(last, 64)), last - 1 - draw.below(min(last, 64))))
    value = (draw.of(_INTERESTING) % 2 ** (8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
    return data[:at] + value + data[at + size :]


def _number(data: bytes, other: bytes, draw: Draw) -> bytes:
    found = [match.span() for match in re.finditer(rb"-?\d+(\.\d+)?", data[:100_000])]
    if not found:
        return _integer(data, other, draw)
    start, stop = draw.of(found)
    return data[:start] + str(draw.of(_INTERESTING)).encode() + data[stop:]


def _word(data: bytes, _: bytes, draw: Draw) -> bytes:
    start, stop = _span(data, draw, 8)
    return data[:start] + draw.of(STRINGS).encode("utf-8", "surrogatepass") + data[stop:]


_OF_BYTES: Sequence[Callable[[bytes, bytes, Draw], bytes]] = (
    _flip, _flip, _run, _cut, _drop, _insert, _twice, _splice, _integer, _number, _word,
)  # fmt: skip


def _bytes(data: bytes, other: bytes, draw: Draw) -> bytes:
    return draw.of(_OF_BYTES)(data, other, draw) if data else other


# --- trees: JSON and YAML -----------------------------------------------------------------------------------------


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Each container of a tree with each of its keys."""
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list):
            yield from _places(values[key])


def _other_value(old: Any, draw: Draw, words: Sequence[str], raw: list[str], raws: Sequence[str]) -> Any:
    if isinstance(old, str) and len(old) > 64 and draw.one_in(2):
        # Numbers in base64.
        try:
            return base64.b64encode(_bytes(base64.b64decode(old, validate=True), b"", draw)).decode()
        except ValueError:
            pass
    kind = draw.below(8)
    if kind == 0 and isinstance(old, int | float):
        return draw.of((-old, old + 1, old - 1, old * 2, old * 1_000_000, old / 3, str(old), [old]))
    if kind <= 2:
        return draw.of(_INTERESTING)
    if kind == 3:
        return draw.of(words)
    if kind == 4:
        raw.append(draw.of(raws))
        return f"@raw{len(raw) - 1}@"
    if kind == 5:
        return draw.of((None, True, False, 0.5, -0.5, float("nan"), float("inf"), 1e-300, [], {}))
    if kind == 6:
        return draw.of(([old], {"a": old}, [old, old], str(old), [[[old]]]))
    if isinstance(old, str) and old:
        return draw.of((old + old, old[:-1], old.upper(), f"{old}/../..", f" {old}", f"{old}\n"))
    return draw.of((old, [1, 2, 3], {"name": 1}))


def _changed(values: Any, draw: Draw, words: Sequence[str], raw: list[str], raws: Sequence[str]) -> Any:
    places = list(_places(values)) if isinstance(values, dict | list) else []
    if not places or draw.one_in(40):
        return _other_value(values, draw, words, raw, raws)
    container, key = draw.of(places)
    how = draw.below(6)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        again = f"@again{len(raw)}@"
        raw.append(json.dumps(str(key)))
        container[again] = _other_value(container[key], draw, words, raw, raws)
    elif how == 1 or (how == 2 and isinstance(container, list)):
        container.append(container[key])
    elif how == 2:
        container[draw.of(words)] = container.pop(key) if draw.one_in(2) else container[key]
    else:
        container[key] = _other_value(container[key], draw, words, raw, raws)
    return values


def _filled(text: str, raw: Sequence[str]) -> bytes:
    for number, value in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', value).replace(f'"@again{number}@"', value)
    return text.encode("utf-8", "surrogatepass")


def change_json(data: bytes, draw: Draw, words: Sequence[str]) -> bytes:
    values, raw = json.loads(data), []
    for _ in range(draw.of((1, 1, 1, 2, 4))):
        values = _changed(values, draw, words, raw, _RAW)
    # Spaced as it was: some files are compared to the byte.
    indent = {b"{\n ": 1, b"{\n  ": 2}.get(data[: data.find(b'"')])
    text = json.dumps(values, indent=indent, sort_keys=draw.one_in(2), ensure_ascii=draw.one_in(2))
    return _filled(text, raw) + (b"\n" if data.endswith(b"\n") else b"")


def _change_yaml(data: bytes, draw: Draw, words: Sequence[str]) -> bytes:
    values, raw = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), []
    for _ in range(draw.of((1, 1, 1, 2, 4))):
        values = _changed(values, draw, words, raw, (*_RAW, *_YAML_RAW, *_YAML_RAW))
    text = json.dumps(values, ensure_ascii=False)
    return _filled(text, raw)


def _change_lines(data: bytes, draw: Draw, words: Sequence[str]) -> bytes:
    """One line of JSON lines, or one field of a table."""
    lines = data.split(b"\n")
    at = draw.below(len(lines))
    try:
        lines[at] = change_json(lines[at], draw, words)
    except ValueError:
        separator = b"\t" if b"\t" in lines[at] else b","
        fields = lines[at].split(separator)
        field, word = draw.below(len(fields)), draw.of(words).encode("utf-8", "surrogatepass")
        fields[field] = draw.of(
            (word, b'"' + word, str(draw.of(_INTERESTING)).encode(), b"", fields[field] + separator)
        )
        lines[at] = separator.join(fields)
    return b"\n".join(lines)


# --- containers ---------------------------------------------------------------------------------------------------


def _change_safetensors(data: bytes, draw: Draw, words: Sequence[str]) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    head = json.loads(data[8 : 8 + length])
    of_json = [key for key, text in head.get("__metadata__", {}).items() if text[:1] == "{"]
    if of_json and draw.one_in(2):
        key = draw.of(of_json)
        text = change_json(head["__metadata__"][key].encode(), draw, words).decode("utf-8", "replace")
        head["__metadata__"][key] = text
        new = json.dumps(head).encode()
    elif draw.one_in(3):
        # It still fits the bytes that follow.
        name = draw.of([key for key in head if key != "__metadata__"])
        one = head[name]
        kinds = {"F32": ("I32", "U32"), "F16": ("BF16", "I16"), "I64": ("F64", "U64"), "U8": ("I8", "BOOL")}
        change = draw.below(3)
        if change == 0:
            one["dtype"] = draw.of(kinds.get(one["dtype"], ("F32",)))
        elif change == 1:
            one["shape"] = draw.of((one["shape"][::-1], [1, *one["shape"]], [*one["shape"], 1], one["shape"][1:]))
        else:
            head[draw.of(words)] = head.pop(name)
        new = json.dumps(head).encode()
    else:
        new = change_json(data[8 : 8 + length], draw, words)
    new += b" " * (-len(new) % 8)
    size = len(new) if not draw.one_in(8) else draw.of(_INTERESTING) % 2**64
    return struct.pack("<Q", size) + new + data[8 + length :]


def _headers(data: bytes) -> list[tuple[int, int]]:
    """Offset and size of each member of a tar."""
    found, at = [], 0
    while at + 512 <= len(data) and data[at]:
        size = int(data[at + 124 : at + 135], 8)
        found.append((at, size))
        at += 512 + size + -size % 512
    return found


def _change_tar(data: bytes, draw: Draw, words: Sequence[str]) -> bytes:
    at, size = draw.of(_headers(data))
    header = bytearray(data[at : at + 512])
    body, rest = data[at + 512 : at + 512 + size], data[at + 512 + size + -size % 512 :]
    how = draw.below(7)
    if how <= 2:
        name = bytes(header[:100]).rstrip(b"\0").decode("utf-8", "replace")
        body = mutated(name, body, body, draw, words)
        header[124:136] = b"%011o\0" % len(body)
    elif how == 3:
        header[:100] = draw.of(words).encode("utf-8", "surrogatepass")[:100].ljust(100, b"\0")
    elif how == 4:
        number = draw.of(_INTERESTING)
        octal = b"%011o\0" % max(0, number)
        header[124:136] = draw.of(
            (octal[-12:], b"\x80" + (number % 2**88).to_bytes(11, "big"), b"-1".ljust(12), b" " * 12)
        )
    elif how == 5:
        header[156] = draw.of(b"01234567xgLKSDMVN\0\xff")
    else:
        start = draw.below(512)
        header[start : start + 8] = bytes(draw.below(256) for _ in range(len(header[start : start + 8])))
    if not draw.one_in(6):
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    padded = body + bytes(-len(body) % 512)
    return data[:at] + bytes(header) + padded + rest


def _change_zip(data: bytes, draw: Draw, words: Sequence[str]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.of(sorted(members))
    if draw.one_in(2):
        name = next(key for key in sorted(members) if key.endswith("data.pkl"))
    how = draw.below(5)
    if how == 0:
        members[name] = draw.of(_PICKLES)
    elif how == 1:
        members[draw.of(words).replace("\ud800", "")] = members.pop(name)
    elif how == 2 and name.endswith(".pkl"):
        # A global and a call before the rest.
        members[name] = members[name][:2] + draw.of(_PICKLES)[2:-1] + b"0" + members[name][2:]
    else:
        members[name] = _bytes(members[name], draw.of(_PICKLES), draw)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw.of((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for key, content in members.items():
            archive.writestr(key, content)
    return buffer.getvalue()


def _change_pickle(data: bytes, draw: Draw, words: Sequence[str]) -> bytes:
    if data[:2] == b"PK":
        return _change_zip(data, draw, words)
    at = draw.below(min(len(data), 2048))
    return draw.of((draw.of(_PICKLES), data[:at] + draw.of(_PICKLES), draw.of(_PICKLES) + data, data[: at // 8 + 1]))


def _change_png(data: bytes, draw: Draw, _: Sequence[str]) -> bytes:
    """One chunk, with a checksum that fits."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    number = 0 if draw.one_in(2) else draw.below(len(chunks))
    kind, body = chunks[number]
    if draw.one_in(4):
        kind = draw.of((b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"acTL", b"zTXt", b"IEND", b"fcTL"))
    chunks[number] = kind, _bytes(body, body, draw)
    if draw.one_in(5):
        chunks.insert(draw.below(len(chunks)), draw.of(chunks))
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return data[:8] + b"".join(parts)


def _change_npy(data: bytes, draw: Draw, words: Sequence[str]) -> bytes:
    length = int.from_bytes(data[8:10], "little")
    text = data[10 : 10 + length].decode("latin-1")
    descr = draw.of(("'|O'", "'<f8'", "'>f2'", "'|V4'", "'<U9'", "[('a','<f4')]", repr(draw.of(words))))
    shape = draw.of(("()", "(-1,)", f"({draw.of(_INTERESTING)},)", "(0,)", "(2**40,)", "(1,1,1,1)"))
    text = draw.of((re.sub(r"'[<>|]\w+'", lambda _: descr, text), re.sub(r"\([\d, ]*\)", shape, text), "{}\n"))
    head = text.encode("utf-8", "surrogatepass")
    return data[:8] + (len(head) % 65536).to_bytes(2, "little") + head + data[10 + length :]


def _change_parquet(data: bytes, draw: Draw, _: Sequence[str]) -> bytes:
    """The footer, which says what all else is."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = _bytes(data[-8 - length : -8], data, draw)
    return data[: -8 - length] + footer + struct.pack("<I", len(footer)) + data[-4:]


_BY_SUFFIX: Mapping[str, Callable[[bytes, Draw, Sequence[str]], bytes]] = {
    "json": change_json,
    "running": change_json,
    "lock": change_json,
    "yaml": _change_yaml,
    "jsonl": _change_lines,
    "csv": _change_lines,
    "tsv": _change_lines,
    "txt": _change_lines,
    "tar": _change_tar,
    "safetensors": _change_safetensors,
    "pth": _change_pickle,
    "bin": _change_pickle,
    "png": _change_png,
    "npy": _change_npy,
    "parquet": _change_parquet,
}


def mutated(name: str, data: bytes, other: bytes, draw: Draw, words: Sequence[str] = STRINGS) -> bytes:
    """A file's bytes, changed; by its structure more often than not.

    Args:
        other: bytes to splice with.
        words: strings to put in.
    """
    change = _BY_SUFFIX.get(name.rpartition(".")[2].rpartition("-is-")[2])
    if change is not None and not draw.one_in(3):
        try:
            return change(data, draw, words)
        # A part of something else that was changed before, as a member of a tar.
        except (ValueError, LookupError, TypeError, struct.error, zipfile.BadZipFile, StopIteration, OverflowError,
                AttributeError, yaml.YAMLError, RecursionError, tarfile.TarError, NotImplementedError):  # fmt: skip
            pass
    for _ in range(draw.of((1, 1, 1, 2, 5))):
        data = _bytes(data, other, draw)
    return data
