"""make fuzz-data: mutated images, texts and tars through `shard_tars` and `prepare_energon`.

    python -m tests.benchmarks.fuzz_data --count 2000 --seed 0

Each input lies in a directory of its own beside a good sample. What must hold each time: samples
in are samples out plus samples quarantined, counted without our code; what was accepted can be
decoded in full; an error is one of ours, which names the input; nothing is written outside the
output directory; at most 2 s of CPU time, and 4 times the memory that an image of `max_pixels`
takes as RGB. The last line is JSON, {"inputs", "violations"}; exit code 1 if there are violations.
"""

from __future__ import annotations

import argparse
import collections
import csv
import gzip
import io
import itertools
import json
import logging
import os
import random
import shutil
import struct
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from llava_steps import prepare_energon, shard_tars
from llava_steps.core.errors import StepError
from llava_steps.settings.dataset import EnergonDataset, TarShards
from llava_steps.store.step import Context
from llava_steps.store.store import Input

SECONDS = 2.0
MAX_PIXELS = 25_000_000
MEMORY = 4 * 3 * MAX_PIXELS
QUESTION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing."}]
KINDS = {"jpg": ("JPEG", "MPO"), "png": ("PNG",), "webp": ("WEBP",)}
"""Parts of images, and what they may hold, in Pillow's words."""
Case = tuple[str, Callable[[Path], tuple[str, dict[str, Any]]]]
"""Name, and what writes the input into a directory and says its name there and the options."""


def picture(
    form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (96, 80), **options: Any
) -> bytes:
    noise = random.Random(7)
    small = Image.frombytes("RGB", (8, 8), noise.randbytes(192))
    image = small.resize(size, Image.Resampling.BICUBIC).convert("L" if mode[0] in "IF" else "RGB")
    out = io.BytesIO()
    image.convert(mode).save(out, form, **options)
    return out.getvalue()


def several(form: str) -> bytes:
    """Two frames in one file."""
    out = io.BytesIO()
    frames = [Image.linear_gradient("L").rotate(n).convert("RGB") for n in (0, 90)]
    frames[0].save(out, form, save_all=True, append_images=frames[1:])
    return out.getvalue()


@cache
def pictures() -> dict[str, bytes]:
    """Images of many kinds by name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    still = Image.new("P", (20, 20))
    moving = io.BytesIO()
    still.save(moving, "GIF", save_all=True, append_images=[Image.new("P", (20, 20), 3)])
    found = {
        "jpeg": picture(), "progressive": picture(progressive=True), "grey": picture(mode="L"),
        "cmyk": picture(mode="CMYK"), "exif": picture(exif=exif), "thin": picture(size=(1, 999)),
        "optimised": picture(optimize=True), "restarts": picture(restart_marker_rows=1),
        "subsampled": picture(subsampling=2), "full": picture(subsampling=0),
        "gif": moving.getvalue(), "bmp": picture("BMP"),
        "webp": picture("WEBP"), "webp-lossless": picture("WEBP", lossless=True),
        "webp-RGBA": picture("WEBP", "RGBA"), "webp-exif": picture("WEBP", exif=exif),
        "png-key": picture("PNG", "P", transparency=3), "png-exif": picture("PNG", exif=exif),
        "png-packed": picture("PNG", compress_level=9),
        "png-moving": several("PNG"), "webp-moving": several("WEBP"),
        "tiff": picture("TIFF"), "icon": picture("ICO"), "ppm": picture("PPM"),
    }  # fmt: skip
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        found[f"png-{mode}"] = picture("PNG", mode)
    for mode in ("I", "F", "CMYK", "YCbCr"):
        found[f"tiff-{mode}"] = picture("TIFF", mode)
    return found


def clear(width: int, height: int) -> bytes:
    """A PNG through which the ground shows."""
    out = io.BytesIO()
    Image.new("RGBA", (width, height), (9, 9, 9, 99)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def resized(data: bytes, width: int, height: int) -> bytes:
    """A lossless WebP whose header claims another size."""
    start = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[start : start + 4], "little") >> 28 << 28
    bits |= (width - 1) | (height - 1) << 14
    return data[:start] + bits.to_bytes(4, "little") + data[start + 4 :]


@cache
def large() -> dict[str, bytes]:
    """A bomb, and images just below and above the limit."""
    side = 5000
    return {
        "bomb": picture("PNG", "1", (13_400, 13_400)),
        "bomb-webp": resized(picture("WEBP", lossless=True), 16_383, 16_383),
        "below-webp": picture("WEBP", "RGBA", (2000, 2000), lossless=True, method=0),
        "below": picture("JPEG", "RGB", (side, side), progressive=True),
        "below-png": picture("PNG", "RGBA", (side, side - 1), compress_level=1),
        "below-clear": clear(side, side - 1),
        "above": picture("JPEG", "RGB", (side, side + 1)),
    }


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut out, doubled or added in one to four places."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(out) + 1)
        length = chance.choice((1, 1, 2, 8, 64))
        piece = out[place : place + length]
        out[place : place + length] = chance.choice(
            (chance.randbytes(len(piece)), b"", piece * 2, b"\xff" * length, bytes(length))
        )
    return bytes(out)


def with_image(data: bytes, kind: str) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    def write(folder: Path) -> tuple[str, dict[str, Any]]:
        (folder / "good.jpg").write_bytes(pictures()["jpeg"])
        (folder / "bad.jpg").write_bytes(data)
        records = [
            {"id": name, "image": f"{name}.jpg", "conversations": QUESTION}
            for name in ("good", "bad")
        ]
        (folder / "train.json").write_text(json.dumps(records))
        return "train.json", {"other_images": kind}

    return write


def images(chance: random.Random) -> Iterator[Case]:
    kinds = itertools.cycle(("refuse", "jpeg"))
    for name, data in large().items():
        for kind in ("refuse", "jpeg"):
            yield f"{name} {kind}", with_image(data, kind)
    for name, data in pictures().items():
        for part in range(17):
            cut = data[: len(data) * part // 16]
            yield f"{name} cut at {part}/16", with_image(cut, next(kinds))
    while True:
        name, data = chance.choice(list(pictures().items()))
        yield f"{name} damaged", with_image(damaged(data, chance), next(kinds))


def content(name: str, data: bytes) -> Callable[[Path], tuple[str, dict[str, Any]]]:
    def write(folder: Path) -> tuple[str, dict[str, Any]]:
        (folder / "good.jpg").write_bytes(pictures()["jpeg"])
        (folder / name).write_bytes(data)
        return name, {}

    return write


def texts(chance: random.Random) -> Iterator[Case]:
    good = {"id": "good", "image": "good.jpg", "conversations": QUESTION}
    plain = {"id": "text", "conversations": TEXT, "note": 1.5}
    odd: list[Any] = [
        {**plain, "note": float("nan")}, {**plain, "note": "\udc00"}, {**plain, "id": "\ud800"},
        {**plain, "conversations": [TEXT[0], {"from": "gpt", "value": "\udfff"}]}, None, [], 7,
        {**plain, "image": "../outside.jpg"}, {**plain, "image": "/etc/passwd"}, {**good, "id": {}},
        {**good, "image": ["good.jpg"] * 2}, {**plain, "conversations": {"from": "human"}},
        {**plain, "conversations": [[]]}, {**plain, "note": 10**400}, {**good, "image": {"a": 1}},
        {**good, "image": "a" * 5000}, {**plain, "conversations": [*TEXT, *TEXT * 500]},
    ]  # fmt: skip
    bases: dict[str, bytes] = {}
    for number, record in enumerate(odd):
        rows = [good, record, plain]
        bases[f"odd{number}.json"] = json.dumps(rows).encode()
        bases[f"odd{number}.jsonl"] = "\n".join(json.dumps(row) for row in rows).encode()
    bases["bom.json"] = b"\xef\xbb\xbf" + json.dumps([good]).encode()
    bases["wide.json"] = json.dumps([good]).encode("utf-16")
    bases["deep.json"] = b"[" * 100_000
    bases["deep.jsonl"] = json.dumps(good).encode() + b"\n" + b'{"a":' * 100_000
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["id", "image", "question", "answer"])
    writer.writerows([["a", "good.jpg", 'What, "this"?', "A\ndog."], ["b", "", "What?", "犬"]])
    bases["t.csv"] = table.getvalue().encode()
    bases["t.tsv"] = (
        b"id\timage\tquestion\tanswer\na\tgood.jpg\tWhat?\tA dog.\nb\t\tWhat?\tNothing\n"
    )
    yield from ((name, content(name, data)) for name, data in bases.items())
    while True:
        name, data = chance.choice(list(bases.items()))
        yield f"{name} damaged", content(name, damaged(data[:4000], chance))


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(entries: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for info, data in entries:
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample(key: str, image: str = "jpeg") -> list[tuple[tarfile.TarInfo, bytes]]:
    meta = json.dumps({"question": "What?"}).encode()
    part = {"jpeg": "jpg"}.get(image, image.partition("-")[0])
    parts = {part: pictures()[image], "txt": b"A dog.", "json": meta}
    return [member(f"{key}.{part}", data) for part, data in parts.items()]


def oversized(size: bytes) -> bytes:
    """A tar whose second header claims another size, with a checksum that is right."""
    data = bytearray(tar([*sample("0"), *sample("1")]))
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        start = file.getmembers()[3].offset
    data[start + 124 : start + 136] = size
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def tars(chance: random.Random) -> Iterator[Case]:
    good = [*sample("0"), *sample("1")]
    kinds = {
        name: getattr(tarfile, name)
        for name in ("SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "DIRTYPE")
    }
    bases = {
        "good": tar(good),
        "mixed": tar([*good, *sample("2", "png-RGBA"), *sample("3", "webp")]),
        "pax": tar([member("1.jpg", b"x", pax_headers={"comment": "y" * 9000})], 1),
        "outside": tar([*good, member("../outside.txt", b"x")]),
        "absolute": tar([*good, member("/tmp/outside.txt", b"x")]),
        "inside out": tar([*good, member("a/../../outside.txt", b"x")]),
        "twice": tar([*good, *sample("1")]), "apart": tar([*good, *sample("0")]),
        "names": tar([*good, member("a\nb.txt", b"x"), member("c\\..\\d.txt", b"x")]),
        "pax path": tar([member("2.jpg", b"x", pax_headers={"path": "../outside.jpg"})], 1),
        "pax size": tar([member("2.jpg", b"x", pax_headers={"size": "9" * 17})], 1),
        "pax bomb": tar([member("2.jpg", b"x", pax_headers={"a": "b" * 3_000_000})], 1),
        "long name": tar([member("n" * 200_000 + ".txt", b"x")], tarfile.GNU_FORMAT),
        "gzip bomb": gzip.compress(bytes(50_000_000), 9),
        "gzip": gzip.compress(tar(good)), "twice in a file": tar(good) * 2,
        "huge": oversized(struct.pack(">BxxxQ", 0x80, 1 << 62)),
        "negative": oversized(b"\xff" * 12), "octal": oversized(b"77777777777\0"),
        "no number": oversized(b"zzzzzzzzzzz\0"),
    }  # fmt: skip
    for name, kind in kinds.items():
        entry = member("2.jpg", type=kind, linkname="/etc/passwd")
        bases[name] = tar([*good, entry])
    for name, data in bases.items():
        yield f"tar {name}", content("x.tar", data)
    for length in range(0, len(bases["good"]), 512):
        yield f"tar cut at {length}", content("x.tar", bases["good"][:length])
    while True:
        name, data = chance.choice(list(bases.items()))
        yield f"tar {name} damaged", content("x.tar", damaged(data[:20_000], chance))


class Violation(Exception):
    pass


ENDS: collections.Counter[str] = collections.Counter()
"""How the inputs ended."""


def context(entry: Path, name: str, path: Path) -> Context:
    log = logging.getLogger("fuzz")
    log.setLevel(logging.CRITICAL)
    return Context(entry, {name: Input(path, "digest")}, log, entry / ".work")


def expected(source: Path) -> int | None:
    """Records in an input that was accepted, counted without our code; None for tables."""
    if source.suffix == ".json":
        return len(json.loads(source.read_bytes().decode("utf-8-sig")))
    if source.suffix == ".jsonl":
        return sum(1 for line in source.read_bytes().split(b"\n") if line.strip(b" \t\r\x0b\x0c"))
    if source.suffix == ".tar":
        with tarfile.open(source) as file:
            return len({info.name.partition(".")[0] for info in file if info.isreg()})
    return None


def check_shards(source: Path, out: Path, options: dict[str, Any]) -> None:
    """Shard the input; raise Violation when the books do not balance."""
    config = TarShards(
        source=str(source), quarantine_limit=1.0, workers=1, max_pixels=MAX_PIXELS, **options
    )
    metrics = shard_tars.run(context(out, "source", source), config)
    refused = (out / "quarantine.jsonl").read_text().splitlines()
    parts: dict[str, set[str]] = collections.defaultdict(set)
    for path in out.glob("*.tar"):
        with tarfile.open(path) as file:
            for info in file:
                key, _, part = info.name.partition(".")
                parts[key].add(part)
                data = file.extractfile(info)
                if not part.endswith(("txt", "json")) and data is not None:
                    try:
                        with Image.open(data) as image:
                            image.load()
                        if image.format not in KINDS[part.rpartition(".")[2]]:
                            raise Violation(f"{part} is {image.format}")
                    except Violation:
                        raise
                    except Exception as error:
                        raise Violation(f"accepted, but cannot be decoded: {error}") from error
    if any(not {"txt", "json"} <= found for found in parts.values()):
        raise Violation("a sample without text")
    reasons = [json.loads(line)["reason"] for line in refused]
    if not all(reasons) or any(word in why for why in reasons for word in ("0x", "BytesIO")):
        raise Violation(f"refused without a reason, or with an address: {reasons}")
    counts = (len(parts), len(refused))
    if counts != (metrics["samples_written"], metrics["samples_quarantined"]):
        raise Violation(f"{counts} on the disk, the books say {metrics}")
    if sum(counts) != metrics["samples_in"] or expected(source) not in (None, sum(counts)):
        raise Violation(f"lost: {metrics}")
    ENDS["sharded, all accepted" if not refused else "sharded, some quarantined"] += 1


def check_dataset(source: Path, out: Path) -> None:
    config = EnergonDataset(tar_dir=str(source.parent), workers=1)
    metrics = prepare_energon.run(context(out, "tar_dir", source.parent), config)
    if expected(source) != sum(metrics["samples"].values()):
        raise Violation(f"{expected(source)} samples in the tar, the books say {metrics}")
    ENDS["prepared"] += 1


def peak(reset: bool = False) -> int:
    """Bytes that this process holds at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def tree(root: Path, skip: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in root.rglob("*")
        if skip not in (path, *path.parents)
    }


def attempt(name: str, write: Callable[[Path], tuple[str, dict[str, Any]]], root: Path) -> str:
    """What a case violates; empty if nothing."""
    sandbox = root / "sandbox"
    shutil.rmtree(sandbox, ignore_errors=True)
    data, out = sandbox / "data" / "input", sandbox / "out"
    data.mkdir(parents=True)
    (data.parent / "outside.jpg").write_bytes(pictures()["jpeg"])
    file, options = write(data)
    checks: list[Callable[[], None]] = [lambda: check_shards(data / file, out, options)]
    if file.endswith(".tar"):
        checks.append(lambda: check_dataset(data / file, out))
    before = tree(root, out)
    for check in checks:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        memory, start = peak(reset=True), time.process_time()
        try:
            check()
        except StepError as error:
            ENDS["refused as a whole"] += 1
            if (out / "shards.json").exists():
                return "an error, and a result"
            if not str(error).isprintable() or "sandbox" not in str(error):
                return f"an error that does not say where: {error!r}"
        except Violation as error:
            return str(error)
        except Exception as error:
            return f"uncaught {type(error).__name__}: {error}"
        took, held = time.process_time() - start, peak() - memory
        if took > SECONDS:
            return f"{took:.1f} s"
        if held > MEMORY:
            return f"{held / 1e6:.0f} MB"
    return "" if tree(root, out) == before else "wrote outside the output"


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` inputs: half of them images, a sixth texts, a third tars."""
    chance = random.Random(seed)
    image, text, archive = images(chance), texts(chance), tars(chance)
    streams = itertools.cycle((image, archive, image, text, image, archive))
    yield from itertools.islice((next(stream) for stream in streams), count)


def fuzz(count: int, seed: int, root: Path) -> list[str]:
    """Names and violations of the inputs that violate something."""
    large(), pictures()
    # What is imported at the first use of a format is not the input's.
    for write in (with_image(pictures()["jpeg"], "refuse"), content("x.tar", tar(sample("0")))):
        attempt("", write, root)
    ENDS.clear()
    found = []
    for name, write in cases(count, seed):
        if said := attempt(name, write, root):
            found.append(f"{name}: {said}")
            print(found[-1], file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=os.environ.get("TMPDIR")) as root:
        found = fuzz(given.count, given.seed, Path(root))
    print(dict(ENDS), file=sys.stderr)
    print(json.dumps({"inputs": given.count, "violations": len(found)}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
