"""Parse the HLO text of a compiled program."""

import math
import re
from typing import NamedTuple

SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8} | {
    f"{sign}{bits}": bits / 8 for sign in "su" for bits in (4, 8, 16, 32, 64)
}  # bytes of an element; the many 8-bit floats have one

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"(ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
_TABLE_ROW = re.compile(r'(\d+) (?:"(.*)"|\{(.*)\})$')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


class Array(NamedTuple):
    """The type of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Bytes."""
        return self.size * SIZES.get(self.dtype, 1)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    results: list[Array]
    """One, or the leaves of a tuple."""
    operands: list[str]
    """Names."""
    attributes: str
    """The text after the operands."""
    is_root: bool

    @property
    def nbytes(self) -> float:
        """Bytes of the results."""
        return sum(array.nbytes for array in self.results)

    def attribute(self, pattern: str) -> str | None:
        """The group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


class Module(NamedTuple):
    """A program."""

    computations: dict[str, list[Instruction]]
    """Operands come before their users."""
    entry: str
    frames: dict[int, tuple[str, int]]
    """Stack frames by number: (FILE:LINE, number of the caller's frame, 0 for none)."""

    def source(self, instruction: Instruction, package: str = "gptjax") -> str:
        """The innermost FILE:LINE of a package that traced an instruction, or ``elsewhere``."""
        frame = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0)
        while frame in self.frames:
            place, frame = self.frames[frame]
            if f"/{package}/" in place:
                return place.rpartition(f"/{package}/")[2]
        return "elsewhere"


def parse(text: str) -> Module:
    """Read `jax.stages.Compiled.as_text`."""
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    entry, current, table = "", None, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line in tables:
            table = tables[line]
        elif table is not None and (row := _TABLE_ROW.match(line)):
            table[int(row[1])] = row[2] or row[3]
        elif head := _COMPUTATION.match(line):
            current, table = computations.setdefault(head[2], []), None
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line.strip())):
            current.append(_instruction(found))
    return Module(computations, entry, _frames(tables))


def arrays(text: str) -> list[Array]:
    """The arrays of a type."""
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", text)
    ]


def _instruction(found: re.Match[str]) -> Instruction:
    operands, _, attributes = found["rest"].partition(")")
    return Instruction(
        found["name"],
        found["opcode"],
        arrays(found["type"]),
        re.findall(r"%([\w.\-]+)", operands),
        attributes,
        bool(found[1]),
    )


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[str, int]]:
    def field(row: str, name: str) -> int:
        found = re.search(rf"\b{name}=(\d+)", row)
        return int(found[1]) if found else 0

    frames = {}
    for number, frame in tables["StackFrames"].items():
        location = tables["FileLocations"].get(field(frame, "file_location_id"), "")
        file = tables["FileNames"].get(field(location, "file_name_id"), "")
        # Parent ids are offset by 1; 1 means no parent
        frames[number] = f"{file}:{field(location, 'line')}", field(frame, "parent_frame_id") - 1
    return frames
