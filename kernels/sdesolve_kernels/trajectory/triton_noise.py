"""Where a step's random numbers come from in generated Triton source.

The generator makes blocks of four words. A normal or a three-point number takes a word (normals in pairs), a two-point
number one bit. In step ``k`` of a launch, a source with ``m`` numbers a step uses the entries of its sequence from
``first + k m`` on, whatever ``first`` is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import final

__all__ = ["Place", "Source", "period"]

_BITS = 32
_LARGEST_GROUP = 1500  # operations
_MAKERS = {"normal": "normals", "three-point": "three_points", "two-point": "words"}


def period(sources: Sequence[Source], operations: int) -> int:
    """Steps after which the numbers of all sources start a new block or word again; 0 if a group would be too long."""
    steps = max((s.period for s in sources), default=4)
    return steps if steps * operations <= _LARGEST_GROUP else 0


@final
@dataclasses.dataclass(frozen=True)
class Source:
    """One source of noise.

    Attributes:
        index: which.
        count: numbers in a step, ``m``.
        kind: ``normal``, ``three-point`` or ``two-point``.
        start: the step's noise leaves from this one on are this source's.
        swapped: whether steps ``2 k`` and ``2 k + 1`` of the sequence take each other's numbers.
    """

    index: int
    count: int
    kind: str
    start: int = 0
    swapped: bool = False

    @property
    def per_word(self) -> int:
        """Numbers in a word."""
        return _BITS if self.kind == "two-point" else 1

    @property
    def period(self) -> int:
        """Steps after which numbers start a new block again (two-point: a new word)."""
        whole = _BITS if self.kind == "two-point" else 4
        return math.lcm(whole // math.gcd(whole, self.count), 1 + self.swapped)

    def _words(self, steps: int) -> int:
        return steps * self.count // self.per_word

    def _moving(self, steps: int) -> bool:
        """Whether a group may start anywhere in a block: two-point numbers that take no whole blocks."""
        return self._words(steps) % 4 != 0

    def enter(self, steps: int, *, backwards: bool = False) -> tuple[list[str], str, str]:
        """Lines before a run of groups from step ``k`` on, whether there can be one, and the most groups it may have.

        Counters of the generator are split in 32-bit halves; within a run the upper one does not change. A run that
        goes `backwards` takes the groups before step ``k``.
        """
        g = self.index
        per_block = 4 * self.per_word
        lines = [
            f"n{g} = first{g} + k * {self.count}",
            f"block{g} = n{g} // {per_block}",
            f"low{g}, high{g} = block{g}.to(tl.uint32), (stream{g} + 256 * (block{g} >> 32)).to(tl.uint32)",
        ]
        if self._moving(steps):
            lines.append(f"w{g} = n{g} // {_BITS}")  # index of the first word
        start = self.per_word if self._moving(steps) else per_block
        below = f"(block{g} & {2**32 - 1})"
        words = f"{below} * 4" if backwards else f"({2**32} - {below}) * 4 - 4"
        start = math.lcm(start, 2 * self.count) if self.swapped else start
        return lines, f"(n{g} % {start} == 0)", f"({words}) // {self._words(steps)}"

    def turn(self, steps: int, *, backwards: bool = False) -> list[str]:
        """Lines at the end of a group; at the beginning of one if they are taken `backwards`."""
        g, words, sign = self.index, self._words(steps), "-" if backwards else "+"
        if self._moving(steps):
            return [f"w{g} {sign}= {words}", f"low{g} = (w{g} // 4).to(tl.uint32)"]
        return [f"low{g} {sign}= {words // 4}"]

    def group(self, steps: int) -> Place:
        """Numbers of a group of steps."""
        shift = f"w{self.index} % 4" if self._moving(steps) else ""
        low, high = f"low{self.index}", f"high{self.index}"
        counter = lambda block: (_plus(low, block), high)  # noqa: E731
        return Place(self, self._words(steps), shift, counter, [], "", flip=self.swapped)

    def single(self) -> Place:
        """Numbers of one step, wherever it starts."""
        g, m = self.index, self.count
        start = [f"n{g} = first{g} + k * {m}", f"block{g} = n{g} // {4 * self.per_word}"]
        if self.swapped:
            start.insert(1, f"n{g} += {m} - n{g} // {m} % 2 * {2 * m}")
        if self.per_word == 1:
            shift, words, bit = f"n{g} % 4", m, ""
        else:
            shift, bit = f"n{g} // {_BITS} % 4", f"n{g} % {_BITS}"
            words = (m + 2 * _BITS - 2) // _BITS

        def counter(block: int) -> tuple[str, str]:  # a step's blocks may lie on both sides of 2^32
            q = _plus(f"block{g}", block)
            return f"({q}).to(tl.uint32)", f"(stream{g} + 256 * ({q} >> 32)).to(tl.uint32)"

        return Place(self, words, shift, counter, start, bit)


def _plus(name: str, offset: int) -> str:
    return f"{name} + {offset}" if offset else name


@final
class Place:
    """Numbers of one or several steps, made as they are asked for.

    Args:
        source: whose they are.
        words: words they take, from the first on.
        shift: the first one's place in its block; empty if it is 0.
        counter: for a block after the first, the lower half of its counter and the word that holds the upper half.
        start: lines that come first.
        bit: for two-point numbers, the first one's place in its word; empty if it is 0.
        flip: whether two steps take each other's numbers.
    """

    def __init__(
        self,
        source: Source,
        words: int,
        shift: str,
        counter: Callable[[int], tuple[str, str]],
        start: list[str],
        bit: str,
        flip: bool = False,
    ) -> None:
        self._source, self._words, self._shift, self._counter, self._bit = source, words, shift, counter, bit
        self._start, self._flip = start, flip
        self._blocks: set[int] = set()
        self._made: set[str] = set()

    def number(self, step: int, j: int) -> tuple[list[str], str]:
        """Lines that must come before number ``j`` of the group's step ``step`` is used, and its text."""
        lines, self._start = self._start, []
        s = self._source
        i = (step ^ self._flip) * s.count + j
        if s.per_word == 1:
            more, name = self._entry(i)
            return lines + more, name
        if not self._bit:
            more, name = self._entry(i // _BITS)
            return lines + more, f"plus_minus({name}, {i % _BITS}, DOUBLE)"
        name = f"b{s.index}_{i // _BITS}"  # the 32 bits from the step's own start on
        if name not in self._made:
            self._made.add(name)
            more, first = self._entry(i // _BITS)
            second = first
            if i // _BITS + 1 < self._words:
                again, second = self._entry(i // _BITS + 1)
                more += again
            lines += [*more, f"{name} = joined({first}, {second}, {self._bit})"]
        return lines, f"plus_minus({name}, {i % _BITS}, DOUBLE)"

    def _entry(self, e: int) -> tuple[list[str], str]:
        """Entry ``e`` of the words, or of what is made of them."""
        g = self._source.index
        if not self._shift:
            return self._block(e // 4), f"n{g}_{e}"
        name = f"s{g}_{e}"
        if name in self._made:
            return [], name
        self._made.add(name)
        lines = [line for block in (e // 4, (e + 3) // 4) for line in self._block(block)]
        choices = ", ".join(f"n{g}_{e + shift}" for shift in range(4))
        return [*lines, f"{name} = pick({self._shift}, {choices})"], name

    def _block(self, block: int) -> list[str]:
        if block in self._blocks:
            return []
        self._blocks.add(block)
        g, maker = self._source.index, _MAKERS[self._source.kind]
        low, high = self._counter(block)
        names = ", ".join(f"n{g}_{4 * block + i}" for i in range(4))
        double = "" if maker == "words" else ", DOUBLE"
        return [f"{names} = {maker}(seed{g}, path{g}, {low}, {high}{double})"]
