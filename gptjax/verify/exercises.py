"""Check an answer to an exercise: `matches` says what is right and how far off the rest is."""

from typing import Any, NamedTuple

import numpy as np


class Remark(NamedTuple):
    """What there is to say of one result that an exercise asks for."""

    name: str
    right: bool
    text: str


class Verdict(tuple[Remark, ...]):
    """A remark on each part of an answer; true if all of it is right."""

    def __bool__(self) -> bool:
        """Whether every part is right."""
        return all(part.right for part in self)

    def __repr__(self) -> str:
        width = max(len(part.name) for part in self)
        return "\n".join(f"{part.name:<{width}}  {part.text}" for part in self)


def matches(answer: Any, expected: Any, names: str = "answer") -> Verdict:
    """Compare an answer with what is expected.

    Args:
        answer: one value or, if there are several names, a tuple with one for each. ``...`` stands
            for what is not done yet.
        expected: the same in the right form. Floating-point arrays may differ by rounding: by a
            relative L2 error of 1e-8, or of 1e-4 if either is narrower than float64. Anything else,
            such as a shape or a word, has to be equal.
        names: what the parts are called, separated by ", ".

    """
    labels = names.split(", ")
    if len(labels) == 1:
        answer, expected = (answer,), (expected,)
    if answer is ...:
        answer = (...,) * len(labels)
    if not isinstance(answer, tuple | list) or len(answer) != len(labels):
        return Verdict([Remark("answer", False, f"wrong: it should be {names}")])
    return Verdict(map(_judge, labels, answer, expected))


def _judge(name: str, answer: Any, expected: Any) -> Remark:
    if answer is ...:
        return Remark(name, False, "not done yet")
    wanted = np.asarray(expected)
    if wanted.dtype.kind != "f":
        ok = np.array_equal(answer, wanted)
        return Remark(name, ok, "right" if ok else f"wrong: it is not {answer}")
    given = np.asarray(answer)
    if given.dtype.kind not in "fiu":
        return Remark(name, False, f"wrong: it should be numbers, not {type(answer).__name__}")
    if given.shape != wanted.shape:
        turned = ", transposed" if given.T.shape == wanted.shape else ""
        return Remark(
            name, False, f"wrong: its shape is {given.shape}, it should be {wanted.shape}{turned}"
        )
    error = _distance(given, wanted)
    limit = 1e-8 if min(given.itemsize, wanted.itemsize) >= 8 else 1e-4
    if error <= limit:
        return Remark(name, True, f"right: relative error {error:.1e}")
    return Remark(name, False, f"wrong: relative error {error:.1e}; {_hint(given, wanted, limit)}")


def _distance(given: np.ndarray, wanted: np.ndarray) -> float:
    size = float(np.linalg.norm(wanted)) or 1.0
    return float(np.linalg.norm(given - wanted)) / size


def _hint(given: np.ndarray, wanted: np.ndarray, limit: float) -> str:
    """A single factor or a transposition, if that is all; else the element that is furthest off."""
    factor = float(np.vdot(wanted, given) / (np.vdot(wanted, wanted) or 1.0))
    if factor and _distance(given, factor * wanted) <= limit:
        return f"it is {factor:.4g} times what it should be"
    if given.ndim == 2 and given.T.shape == wanted.shape and _distance(given.T, wanted) <= limit:
        return "it is transposed"
    at = np.unravel_index(np.abs(given - wanted).argmax(), wanted.shape)
    place = f"[{', '.join(map(str, at))}]" if at else "it"
    return f"{place} is {given[at]:.4g}, it should be {wanted[at]:.4g}"
