"""Made sessions in which what an item is tells what follows, for tests and benchmarks where no data set is at hand."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from recsys_models.data.malformed import MalformedLog
from recsys_models.data.reader import check_at_least
from recsys_models.data.sessions.attributes import bag_attribute, text_attribute
from recsys_models.data.sessions.protocols import DAY
from recsys_models.data.sessions.raw import Events, RawAttribute, gather
from recsys_models.data.sessions.reader import TimedReader

_DAYS = 60
_SLOPE = 0.8
_SUBCATEGORIES, _PER_CATEGORY, _ITEMS_PER_BRAND, _PRICES = 32, 4, 40, 8
_TYPICAL_WORDS, _COMMON_WORDS = 6, 150
_LATE_SHARE, _FIRST_LATE_DAY = 0.15, 30
_STAY, _FOLLOW = 0.6, 0.3
_CANDIDATES = 4
_LONGEST, _STOP = 20, 0.35


@dataclass(frozen=True, kw_only=True)
class SyntheticSessions(TimedReader):
    """Makes sessions of 60 days; the same options give the same sessions on every machine.

    Items are popular by Zipf's law. After an item comes, with probability 0.6, one of the same subcategory, with 0.3
    one of the subcategory that follows it in a hidden cycle, else one of any. Of four popular candidates a session
    takes the one nearest to its taste, a brand and a price. 15 % of the items appear only in the second half of time,
    some of them after training. Models can learn the cycle from ids for frequent items, from attributes for all.

    Attributes: category, subcategory, brand, price, title (bag of words).

    Args:
        sessions: number of sessions, of 2 to 20 items.
        items: number of items.
        seed: of everything drawn.
    """

    name: ClassVar[str] = "synthetic_sessions"
    folder: ClassVar[str] = ""

    protocol: str = "last_days"
    min_length: int = 2
    test_days: int = 7
    keep_unseen: bool = True
    sessions: int = 20_000
    items: int = 2_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_at_least(self.name, "sessions", self.sessions, 10)
        check_at_least(self.name, "items", self.items, 1)
        check_at_least(self.name, "seed", self.seed, 0)

    def files(self, folder: Path) -> dict[str, Path]:
        """Return no files."""
        return {}

    def read(self, files: Mapping[str, Path], log: MalformedLog) -> tuple[Events, tuple[RawAttribute, ...]]:
        """Make all sessions, and what is known about items."""
        world = World(self.items, self.seed)
        sessions, items, times = gather(world.sessions(self.sessions, np.random.default_rng([self.seed, 1])))
        return Events(sessions, items, times), world.attributes()


class World:
    """All items by popularity, and how sessions go on.

    Args:
        items: number of items.
        seed: of everything drawn.
    """

    def __init__(self, items: int, seed: int) -> None:
        generator = np.random.default_rng([seed, 0])
        self.num_subcategories = max(1, min(_SUBCATEGORIES, items // 8))
        self.keys = generator.permutation(items) + 1
        self.subcategory = generator.integers(self.num_subcategories, size=items)
        self.subcategory[: self.num_subcategories] = np.arange(self.num_subcategories)
        self.num_brands = -(-items // _ITEMS_PER_BRAND)
        self.brand = generator.integers(self.num_brands, size=items)
        typical = generator.integers(_PRICES, size=self.num_subcategories)[self.subcategory]
        self.price = np.clip(typical + generator.integers(-1, 2, size=items), 0, _PRICES - 1)
        self.words = generator.integers(_TYPICAL_WORDS, size=(items, 2))
        self.common = generator.integers(_COMMON_WORDS, size=items)
        cycle = generator.permutation(self.num_subcategories)
        self.following = np.empty(self.num_subcategories, np.int64)
        self.following[cycle] = np.roll(cycle, -1)
        late = generator.random(items) < _LATE_SHARE
        late[: self.num_subcategories] = False  # so that there is always something to draw
        self.births = np.where(late, generator.integers(_FIRST_LATE_DAY * DAY, _DAYS * DAY, size=items), 0)
        # Whole numbers, so that what is drawn does not hang on the last bit of a power.
        weights = np.floor(1e6 * np.arange(1, items + 1) ** -_SLOPE).astype(np.int64)
        self._order = np.argsort(self.subcategory, kind="stable")
        self._cumulated = np.cumsum(weights[self._order])
        sizes = np.bincount(self.subcategory, minlength=self.num_subcategories)
        self._bounds = np.concatenate(([0], self._cumulated[np.cumsum(sizes) - 1]))

    def sessions(self, number: int, generator: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield, position by position, the sessions that reach it: their numbers, raw items and times in seconds."""
        start = np.sort(generator.integers(_DAYS * DAY, size=number))
        length = np.minimum(1 + generator.geometric(_STOP, size=number), _LONGEST)
        brand, price = generator.integers(self.num_brands, size=number), generator.integers(_PRICES, size=number)
        subcategory = generator.integers(self.num_subcategories, size=number)
        for position in range(_LONGEST):
            session = np.flatnonzero(length > position)
            time = start[session] + 60 * position
            item = self._choose(subcategory[session], time, brand[session], price[session], generator)
            subcategory[session] = self._go_on(subcategory[session], generator)
            yield session, self.keys[item], time

    def attributes(self) -> tuple[RawAttribute, ...]:
        """Return what is known about items."""
        category = self.subcategory // _PER_CATEGORY
        titles = (
            (f"word{part}_{first}", f"word{part}_{second}", f"brand{brand}", f"common{common}")
            for part, (first, second), brand, common in zip(
                self.subcategory, self.words, self.brand, self.common, strict=True
            )
        )
        return (
            text_attribute("category", self.keys, [f"category{value}" for value in category]),
            text_attribute("subcategory", self.keys, [f"subcategory{value}" for value in self.subcategory]),
            text_attribute("brand", self.keys, [f"brand{value}" for value in self.brand]),
            RawAttribute("price", self.keys, np.arange(len(self.keys)), self.price),
            bag_attribute("title", self.keys, titles),
        )

    def _go_on(self, subcategory: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return the subcategory of the item that comes after one of ``subcategory``, int64 ``(n,)``."""
        chance = generator.random(len(subcategory))
        other = generator.integers(self.num_subcategories, size=len(subcategory))
        moved = np.where(chance < _STAY + _FOLLOW, self.following[subcategory], other)
        return np.where(chance < _STAY, subcategory, moved)

    def _choose(
        self,
        subcategory: np.ndarray,
        time: np.ndarray,
        brand: np.ndarray,
        price: np.ndarray,
        generator: np.random.Generator,
    ) -> np.ndarray:
        """Return the candidate nearest to the taste, the first of equals, int64 ``(n,)``."""
        drawn = self._draw(np.repeat(subcategory, _CANDIDATES), np.repeat(time, _CANDIDATES), generator)
        candidates = drawn.reshape(-1, _CANDIDATES)
        likes = 2 * (self.brand[candidates] == brand[:, None]) - np.abs(self.price[candidates] - price[:, None])
        chosen: np.ndarray = candidates[np.arange(len(candidates)), likes.argmax(axis=1)]
        return chosen

    def _draw(self, subcategory: np.ndarray, time: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw items of given subcategories that are there at given times, int64 ``(n,)``."""
        low, high = self._bounds[subcategory], self._bounds[subcategory + 1]
        drawn = self._order[np.searchsorted(self._cumulated, generator.integers(low, high), side="right")]
        while len(again := np.flatnonzero(self.births[drawn] > time)):
            chance = generator.integers(low[again], high[again])
            drawn[again] = self._order[np.searchsorted(self._cumulated, chance, side="right")]
        return drawn
