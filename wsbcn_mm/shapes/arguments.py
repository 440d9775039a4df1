"""What the functions that draw are asked for, checked: one sample, or a whole data set."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SPLITS = ('train', 'val')
MAX_IMAGES = 1_000_000
_MIN_SIDE = 48


def checked_int(name: str, value: int, low: int, high: int | None = None) -> int:
    expected = f'an integer of at least {low}' + (f' and at most {high}' if high else '')
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f'{name} must be {expected}, got {value!r}') from None
    if number < low or (high is not None and number > high):
        raise ValueError(f'{name} must be {expected}, got {number}')
    return number


def checked_size(size: Sequence[int]) -> tuple[int, int]:
    try:
        width, height = size
    except (TypeError, ValueError):
        raise ValueError(
            f'size must be (width, height) in pixels, such as (192, 160), got {size!r}'
        ) from None
    return (
        checked_int('size (width)', width, _MIN_SIDE),
        checked_int('size (height)', height, _MIN_SIDE),
    )


@dataclass(frozen=True)
class Sample:
    """Which image, clip or picture is drawn: the same one always gives the same pixels."""

    split: str
    index: int
    size: tuple[int, int]
    seed: int

    @classmethod
    def checked(cls, split: str, index: int, size: Sequence[int], seed: int) -> 'Sample':
        """Returns it.

        Raises:
            ValueError: An argument is out of its range.
        """
        if split not in SPLITS:
            raise ValueError(
                f"split must be 'train' or 'val', got {split!r}; this data set has no other splits"
            )
        return cls(
            split,
            checked_int('index', index, 0, MAX_IMAGES - 1),
            checked_size(size),
            checked_int('seed', seed, 0),
        )

    def random(self, *kind: int) -> np.random.Generator:
        """Its random numbers; `kind` sets those of one data set apart from another's."""
        numbers = [self.seed, SPLITS.index(self.split), self.index, *kind]
        return np.random.default_rng(np.random.SeedSequence(numbers))


@dataclass(frozen=True)
class Stamp:
    """What makes a data set and is written beside its files: all that is asked of its folder."""

    format: str
    version: int
    num_train: int
    num_val: int
    size: tuple[int, int]
    seed: int

    @classmethod
    def checked(
        cls,
        kind: tuple[str, int],
        num_train: int,
        num_val: int,
        size: Sequence[int],
        seed: int,
        least: int = 1,
    ) -> 'Stamp':
        """Returns it.

        Args:
            kind: Format and version.
            num_train: Number of samples for training.
            num_val: Number of samples for validation.
            size: Width and height.
            seed: Seed of all samples.
            least: How many samples a split has at least.

        Raises:
            ValueError: An argument is out of its range.
        """
        return cls(
            *kind,
            checked_int('num_train', num_train, least, MAX_IMAGES),
            checked_int('num_val', num_val, least, MAX_IMAGES),
            checked_size(size),
            checked_int('seed', seed, 0),
        )

    @property
    def counts(self) -> dict[str, int]:
        """The number of samples of each split."""
        return {'train': self.num_train, 'val': self.num_val}

    def json(self) -> dict[str, Any]:
        return {**vars(self), 'size': list(self.size)}
