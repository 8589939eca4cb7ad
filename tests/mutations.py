"""Files as damage or malice leaves them."""

from hypothesis import strategies as st

WORDS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1]


@st.composite
def mutated(draw: st.DrawFn, content: bytes, header: int = 4) -> bytes:
    """``content`` after one to three of: a byte or a word changed, often one of the first
    ``header``; a cut; a copy; an end.
    """
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        how = draw(st.sampled_from(["byte", "word", "header", "cut", "copy", "drop", "append"]))
        if how == "byte" and out:
            out[at] = draw(st.integers(0, 255))
        elif how in ("word", "header"):
            at = at if how == "word" else 4 * draw(st.integers(0, header - 1))
            out[at : at + 4] = draw(st.sampled_from(WORDS)).to_bytes(4, "little")
        elif how == "cut":
            del out[at:]
        elif how == "copy":
            out[at:at] = out[at : at + draw(st.integers(1, 64))]
        elif how == "drop":
            del out[at : at + draw(st.integers(1, 64))]
        else:
            out += draw(st.binary(max_size=64))
    return bytes(out)
