"""Damage to files: changed values in trees, headers, archives and pickles, and changed bytes.

Every function takes the random generator of the case, which alone determines the damage.
"""

import copy
import io
import json
import struct
import warnings
import zipfile
from itertools import pairwise

import numpy as np

# Text that ``json.dumps`` does not write, by the string that stands for it in a tree.
_RAW = {
    "@deep list@": "[" * 50_000 + "]" * 50_000,
    "@deep object@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@nested list@": "[" * 300 + "]" * 300,
    "@nested object@": '{"sigmas":' * 200 + "1" + "}" * 200,
    "@many digits@": "9" * 5000,
    "@digits@": "9" * 400,
    "@large@": "1e999",
    "@many numbers@": f"[{', '.join(['0.5'] * 5000)}]",
    "@no value@": "",
}
_WORDS = ("", "x", "é\0\ud800\n", "x" * 5000, "../../outside", "/etc/hostname", ".", "true", "1", "none", *_RAW)
_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 65_536, 10**6, 10**9, 2**31, 2**53, 2**63, 2**64, 10**30)
_FRACTIONS = (0.5, -0.5, -0.0, 1e-320, 1e-30, 1e-7, 1e30, 1e300, float("nan"), float("inf"), float("-inf"))
_OTHERS = (None, True, False, [], {}, [1], [[]], [None], {"a": 1}, [1, 2, 3], {"sigmas": [1.0]}, ["x", 1])
POOL = (*_WORDS, *_NUMBERS, *_FRACTIONS, *_OTHERS)


class Again(str):
    """A key of a dict that is written like another key, and differs from it in the dict."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


# -- Trees of dicts and lists -----------------------------------------------------------------------------------------


def _places(tree):
    """All (container, key) in a tree."""
    pending = [tree]
    while pending:
        container = pending.pop()
        keys = range(len(container)) if isinstance(container, list) else list(container)
        for key in keys:
            yield container, key
            if isinstance(container[key], dict | list):
                pending.append(container[key])


def _changed(value, rng, strings, pool):
    """Another value for a place in a tree: often a similar one, otherwise any of the pool."""
    kind = rng.random()
    if isinstance(value, bool) and kind < 0.3:
        return not value
    if isinstance(value, int | float) and not isinstance(value, bool) and kind < 0.5:
        return rng.choice([-value, value + 1, value - 1, 2 * value, 1000 * value, value / 2, float(value), str(value)])
    if isinstance(value, str) and kind < 0.4 and strings:
        return rng.choice(strings)
    if isinstance(value, list) and value and kind < 0.5:
        i = rng.randrange(len(value))
        return rng.choice(
            [value[:i], value[i:], [*value, value[i]], value[::-1], value * 30, [*value, None], value[i], [value]]
        )
    return _any(pool, rng)


def _any(pool, rng):
    """A copy of any value of the pool: a later change of it must not change the pool."""
    return copy.deepcopy(rng.choice(pool))


def change_tree(tree, rng, pool=POOL):
    """Changes one to three values or keys of a tree of dicts and lists, in place."""
    strings = sorted({c[k] for c, k in _places(tree) if isinstance(c[k], str)})
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return
        container, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.7:
            container[key] = _changed(container[key], rng, strings, pool)
        elif kind < 0.8:
            del container[key]
        elif isinstance(container, list):
            container.insert(key, _any(pool, rng))
        elif kind < 0.87:
            container[Again(key)] = _any(pool, rng)
        elif kind < 0.94:
            container[rng.choice([f"{key}x", *_WORDS[:4], *strings])] = container.pop(key)
        else:
            other, place = rng.choice(places)
            container[key], other[place] = other[place], container[key]


def change_json(content, rng):
    """The text of a JSON file with changed values, sometimes also with changed bytes."""
    tree = json.loads(content)
    change_tree(tree, rng)
    try:
        text = json.dumps(tree, indent=rng.choice([None, 2]))
    except (ValueError, RecursionError):  # two swapped values now contain each other
        return content[: len(content) // 2]
    for word, raw in _RAW.items():
        text = text.replace(json.dumps(word), raw)
    if rng.random() < 0.05:
        return rng.choice([b"[%s]", b"%s,", b"\xef\xbb\xbf%s", b"// a comment\n%s"]) % text.encode()
    return text.encode("utf-16") if rng.random() < 0.01 else text.encode()


# -- Bytes ------------------------------------------------------------------------------------------------------------


def change_bytes(data, rng):
    """The bytes with a few changes at random places, or only their beginning."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if not data:
            break
        place, length = rng.randrange(len(data)), rng.randrange(1, 9)
        other = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place : place + length] = rng.choice([b"\xff", b"\0", b"R", b"0", b"h\x01"]) * length
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[other : other + 4 * length]
        elif kind == 4:
            data[place : place + length] = data[other : other + length]
        else:
            data[place] ^= 1 << rng.randrange(8)
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def change_text(content, rng):
    """The text of options with changed words or lines."""
    lines = content.decode().split("\n")
    for _ in range(rng.choice([1, 1, 2])):
        i = rng.randrange(len(lines))
        words = lines[i].split(" ")
        new = rng.choice(
            [
                *("-1", "0", "1e9", "10**9", "9" * 400, "1e999", ".nan", "null", "[]", "{}", "[" * 300, "(" * 3000),
                *('"', "'", "\0", "é", "x" * 5000, "&a [*a]", "- " * 500, "=", "--", "\t", "!!python/name:os.system"),
                *("!!python/object/apply:os.system ['touch canary']", "!!binary x", "!!int x", "? [a]", "<<: 1", "-"),
                *("__import__('os').system('touch canary')", "[0]*10**9", "'x'*10**9", "lambda: 1", "{1: 2}", "..."),
                "a: &a {x: 1}\n"
                + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 8)}]}}\n" for a, b in pairwise("abcdefghij")),
                *("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "2026-01-01", "1:30", "0x10", "0o7", "1_0", "!!set {a}"),
            ]
        )
        kind = rng.random()
        if kind < 0.5:
            words[rng.randrange(len(words))] = new
            lines[i] = " ".join(words)
        elif kind < 0.7:
            lines[i] = new
        elif kind < 0.8:
            lines.insert(i, rng.choice(lines))
        elif kind < 0.9:
            del lines[i]
            lines = lines or [""]
        else:
            lines[i] = lines[i].replace(" ", rng.choice(["", "  ", "\n", "\t"]), 1)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# -- Archives, headers and pickles ------------------------------------------------------------------------------------


def change_safetensors(data, rng):
    """A safetensors file with another header, with another length of the header, or with other numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.6:
        header = change_json(header, rng)
        length = len(header)
    elif kind < 0.75:
        length = rng.choice([0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
    else:
        body = rng.choice([body[:-1], body[: len(body) // 2], body + bytes(8), b"", change_bytes(body, rng)])
    return struct.pack("<Q", length) + header + body


def change_zip(data, rng):
    """A zip file with changed entries and the right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [[name, archive.read(name)] for name in archive.namelist()]
    chosen = rng.choice(entries)
    # In a file of torch.save, the pickle is of most interest.
    chosen = next((entry for entry in entries if entry[0].endswith("data.pkl") and rng.random() < 0.8), chosen)
    kind = rng.random()
    if kind < 0.7:
        change = change_npy if chosen[0].endswith(".npy") else change_pickle
        chosen[1] = change(chosen[1], rng)
    elif kind < 0.75:
        entries.remove(chosen)
    elif kind < 0.8:
        chosen[0] = rng.choice(["../outside", "/outside", f"{chosen[0]}x", "a" * 3000, "é\n", "arr_0.npy"])
    elif kind < 0.85:
        entries.append(chosen)
    elif kind < 0.9:
        chosen[1] = chosen[1][: len(chosen[1]) // 2]
    else:
        chosen[1] = bytes(2_000_000)
    kinds = [zipfile.ZIP_DEFLATED] if len(chosen[1]) > 9**6 else [zipfile.ZIP_STORED] * 2 + [zipfile.ZIP_BZIP2]
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", rng.choice(kinds)) as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two entries may have the same name
        for name, content in entries:
            new.writestr(zipfile.ZipInfo(name), content, compress_type=new.compression)
    return result.getvalue()


def change_npy(data, rng):
    """An array of NumPy with another header: its shape, type or order."""
    try:
        (length,) = struct.unpack("<H", data[8:10])
        header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    except struct.error:
        return change_bytes(data, rng)
    kind = rng.random()
    if kind < 0.2:
        return change_bytes(data, rng)
    if kind < 0.3:
        return data[:-1] if rng.random() < 0.5 else data + bytes(8)
    if kind < 0.4:
        text = io.BytesIO()
        other = rng.choice(
            [np.array({"a": 1}, dtype=object), np.array("x"), np.zeros(0), np.array(1j), np.zeros((2, 2))]
        )
        np.save(text, rng.choice([other, np.full((3, 4), np.nan), np.zeros((1, 1, 1), "M8[s]")]))
        return text.getvalue()
    shape = header[header.find("(") : header.find(")") + 1]
    new = rng.choice(
        [
            *(
                "()",
                "(1,)",
                "(-1,)",
                "(0,)",
                "(10000000000,)",
                "(100000, 100000)",
                "(1000000000000000000000,)",
                "(1.5,)",
            ),
            *("(2**40,)", "None", "(True,)", "(1,) * 99", f"({'1,' * 40})", f"({'1,' * 200})", "('x',)", "((1,),)"),
        ]
    )
    descr = header[header.find(":") + 1 : header.find(",")]
    kinds = [
        " '|O'",
        " '<f4'",
        " '<f8'",
        " '>f8'",
        " '|u1'",
        " '<U9'",
        " '|V8'",
        " [('a', '<f8')]",
        " 'x'",
        " 1",
        " '<f2'",
    ]
    header = header.replace(*rng.choice([(shape, new), (descr, rng.choice(kinds))]), 1)
    if rng.random() < 0.1:
        header = rng.choice(["", "{}", "(" * 1000, header + "x" * 20_000, "__import__('os').system('touch canary')"])
    return data[:8] + struct.pack("<H", len(header)) + header.encode("latin1") + body


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


_CALLS = (  # a call of a function, as operations of a pickle
    b"cos\nsystem\n" + _text("touch canary") + b"\x85R0",
    b"cbuiltins\nexec\n" + _text("open('canary', 'w')") + b"\x85R0",
    b"cnumpy\nzeros\n\x8a\x05\x00\x00\x00\x00\x10\x85R",
    b"ctorch\nload\n" + _text("a.pth") + b"\x85R",
)
_OPERATIONS = (
    b"]" * 3000 + b"a" * 2999,
    b"\x85" * 3000,
    b"(",
    b"t",
    b"R",
    b"b",
    b"Q",
    b"N",
    b"}",
    b"]",
    b"0",
    b".",
    b"u",
)


def change_pickle(data, rng):
    """A pickle with other operations or other bytes."""
    if rng.random() < 0.6:
        return change_bytes(data, rng)
    place = rng.randrange(2, max(3, len(data)))
    return data[:place] + rng.choice([*_CALLS, *_OPERATIONS]) + data[place + rng.choice([0, 0, 1, 2]) :]
