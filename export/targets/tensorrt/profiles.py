"""Optimization profiles: the shapes that a plan takes, and those that it is tuned for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from export.manifest import TensorInfo
from pst.errors import ConfigError

_PAST_LENGTH = "past_sequence_length"

Shape = tuple[int, int]
"""Batch x tokens."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The shapes that a plan takes, (batch, tokens) each: the smallest, the one it is tuned for, the largest."""

    smallest: Shape
    usual: Shape
    largest: Shape
    past: tuple[int, int, int] | None = None
    """Tokens in a decoder's cache, likewise; None is none in the smallest, and as many as are read in the rest."""

    def __post_init__(self) -> None:
        """Raise ConfigError unless the three grow."""
        for place in (0, 1):
            if not 1 <= self.smallest[place] <= self.usual[place] <= self.largest[place]:
                raise ConfigError(
                    f"The profile {self} does not grow; give the smallest, the usual and the largest shape, "
                    "for example 1x1,8x128,32x128."
                )

    @property
    def is_fixed(self) -> bool:
        """Whether it takes one batch x tokens alone."""
        return self.smallest == self.usual == self.largest

    def __str__(self) -> str:
        """As typed: 1x1,8x128,32x512; of one shape 8x128, and with the tokens of a cache 8x1+128..160."""
        shapes = (self.usual,) if self.is_fixed else (self.smallest, self.usual, self.largest)
        text = ",".join(f"{batch}x{length}" for batch, length in shapes)
        return text if self.past is None else f"{text}+{self.past[0]}..{self.past[2]}"

    def shapes(self, tensor: TensorInfo) -> tuple[tuple[int, ...], ...]:
        """The three shapes of an input; of a decoder's cache the first is empty, so that it can read a prompt."""
        past = self.past or (0, self.usual[1], self.largest[1])
        return tuple(
            tuple(size if isinstance(size, int) else _length(size, shape, cached) for size in tensor.shape)
            for shape, cached in zip((self.smallest, self.usual, self.largest), past, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "shapes": [list(self.smallest), list(self.usual), list(self.largest)],
            "past": None if self.past is None else list(self.past),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Profile":
        """The reverse of to_json."""
        smallest, usual, largest = ((int(batch), int(tokens)) for batch, tokens in value["shapes"])
        past = value["past"] and tuple(int(tokens) for tokens in value["past"])
        return cls(smallest=smallest, usual=usual, largest=largest, past=past)


def _length(name: str, shape: Shape, past: int) -> int:
    batch, tokens = shape
    return sum({"batch_size": batch, _PAST_LENGTH: past}.get(part, tokens) for part in name.split(" + "))


def fixed_profile(shape: Shape, *, past: tuple[int, int, int] | None = None) -> Profile:
    """The profile of one *shape*, for which TensorRT can choose kernels that fit nothing else."""
    return Profile(smallest=shape, usual=shape, largest=shape, past=past)


def _span(shapes: Sequence[Shape], *, past: tuple[int, int, int] | None) -> Profile:
    """From the fewest rows and tokens of *shapes* to the most, tuned for the one of middle size."""
    rows, tokens = zip(*shapes, strict=True)
    middle = sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))[len(shapes) // 2]
    smallest, largest = (min(rows), min(tokens)), (max(rows), max(tokens))
    return Profile(smallest=smallest, usual=middle, largest=largest, past=past)


def run_profiles(
    shapes: Sequence[Shape],
    *,
    others: bool,
    max_length: int,
    cached: bool,
    new_tokens: int = 0,
    spanned: bool = False,
) -> tuple[Profile, ...]:
    """The profiles of a plan that will be run at *shapes*, and at *others* where that is so.

    cached: of a decoder each shape is a prompt without a past, and then up to *new_tokens* single tokens after it.
    spanned: one profile from the smallest of *shapes* to the largest, tuned for the middle one, not one for each.
    The profile of others takes as many rows as any of *shapes*, and 32 at least.
    """
    groups = [shapes] if spanned and shapes else [[shape] for shape in shapes]
    found = [_span(group, past=(0, 0, 0) if cached else None) for group in groups]
    if cached and new_tokens:
        for group, prompt in zip(groups, tuple(found), strict=True):
            past = (prompt.smallest[1], prompt.usual[1] + new_tokens // 2, prompt.largest[1] + new_tokens)
            found.append(_span([(batch, 1) for batch, _ in group], past=past))
    if others or not found:
        wide = parse_profile(None, max_length=max_length)
        most = max([wide.largest[0], *(batch for batch, _ in shapes)])
        found.append(replace(wide, largest=(most, wide.largest[1])))
    return tuple(dict.fromkeys(found))


def parse_profile(text: str | None, *, max_length: int) -> Profile:
    """The profile that *text* spells, BATCHxTOKENS three times; None is 1 to 32 rows, of up to *max_length* tokens.

    Raises ConfigError for another form, or more tokens than the model reads.
    """
    if text is None:
        text = f"1x1,8x{min(128, max_length)},32x{max_length}"
    try:
        shapes = [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(","))]
        smallest, usual, largest = shapes
    except ValueError:
        raise ConfigError(
            f"The profile {text!r} is not three shapes BATCHxTOKENS; give for example 1x1,8x128,32x128."
        ) from None
    profile = Profile(smallest=smallest, usual=usual, largest=largest)
    if largest[1] > max_length:
        raise ConfigError(f"The profile {text} goes beyond the model's {max_length} tokens; give fewer.")
    return profile
