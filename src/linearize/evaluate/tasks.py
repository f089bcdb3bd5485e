"""State-tracking tasks: random symbols, and the state that a reader of them is in after each.

Parity and modular arithmetic are those of Beck et al. (xLSTM, arXiv 2405.04517) and Grazzi et al. (arXiv 2411.12537),
the word problem of S5 is Merrill et al.'s (arXiv 2404.08819).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Generator, Tensor

MODULUS = 5
PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE = range(MODULUS, MODULUS + 6)  # symbols; before them the numbers
ELEMENTS = tuple(itertools.permutations(range(5)))  # of S5; number 0 is the identity


class Task(NamedTuple):
    """`generate(lengths, generator)` draws a row of symbols for each length, and the states after them.

    Symbols and states are numbered from 0, apart from each other. The state after the last symbol is the answer, one
    of the first `answers` states; both tensors are `[N, longest length]`, 0 past a row's end.
    """

    generate: Callable[[Tensor, Generator], tuple[Tensor, Tensor]]
    symbols: int
    states: int
    answers: int
    every: bool = False  # asked after every symbol, not only after the last
    longest: int = 256  # symbols in a test
    fit: Callable[[Tensor], Tensor] = lambda lengths: lengths  # the lengths that there are

    def scaled(self, accuracy: float) -> float:
        """0 at chance, 1 where every answer is right: `(accuracy - chance) / (1 - chance)`, chance = 1 / answers."""
        return (accuracy - 1 / self.answers) / (1 - 1 / self.answers)


def _random(high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)


def _ended(symbols: Tensor, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros past each row's end."""
    within = torch.arange(symbols.shape[1], device=symbols.device) < lengths[:, None]
    return symbols * within, states * within


def parity(lengths: Int[Tensor, "N"], generator: Generator) -> tuple[Tensor, Tensor]:
    """Bits; the state is whether the ones so far are odd in number."""
    bits = _random(2, (len(lengths), int(lengths.max())), generator)
    return _ended(bits, bits.cumsum(1) % 2, lengths)


def arithmetic(lengths: Int[Tensor, "N"], generator: Generator) -> tuple[Tensor, Tensor]:
    """`3+4*2-1=` modulo 5, products before sums; lengths are even.

    The state is the value so far and the last summand, which a product goes on with: 5 + 5 · value + summand. After
    `=` it is the value.
    """
    N, count = len(lengths), int(lengths.max()) // 2
    numbers = _random(MODULUS, (N, count), generator)
    operators = PLUS + _random(3, (N, count), generator)
    value = summand = numbers[:, 0]
    states = [value * MODULUS + summand]
    for i in range(1, count):
        operator, number = operators[:, i - 1], numbers[:, i]
        before = torch.where(operator == TIMES, value - summand, value)
        sign = 1 - 2 * (operator == MINUS).long()
        summand = torch.where(operator == TIMES, summand * number, sign * number) % MODULUS
        value = (before + summand) % MODULUS
        states.append(value * MODULUS + summand)
    after = torch.stack(states, dim=1)
    symbols = torch.stack([numbers, operators], dim=2).flatten(1)
    return _answered(symbols, after.repeat_interleave(2, dim=1) + MODULUS, after // MODULUS, lengths)


def _answered(symbols: Tensor, states: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`=` as each row's last symbol, and the value before it as the state after it."""
    last = lengths[:, None] - 1
    symbols = symbols.scatter(1, last, EQUALS)
    values = values.repeat_interleave(symbols.shape[1] // values.shape[1], dim=1)
    return _ended(symbols, states.scatter(1, last, values.gather(1, last)), lengths)


def brackets(lengths: Int[Tensor, "N"], generator: Generator) -> tuple[Tensor, Tensor]:
    """`((2+1)-(-3))=` modulo 5, of sums and differences; lengths of 2 and more.

    The state is the value of the numbers so far, each with the sign that its brackets give it, and the sign at hand:
    5 + 2 · value + (sign < 0). Which brackets are open is not in it. After `=` it is the value.

    An expression of n symbols is a number (1), `-` and a number (2), brackets around one of these (3, 4), or
    `(left + right)`, left and right of random lengths. Rows are written at once: what is to be written stands on a
    stack, and each item taken from it writes one symbol.
    """
    N, longest = len(lengths), int(lengths.max())
    rows = torch.arange(N, device=lengths.device)
    items = lengths.new_zeros(N, longest + 4)  # n > 0: an expression of n symbols; -s: the symbol s
    signs = lengths.new_ones(N, longest + 4)
    items[:, 1], depth = lengths - 1, torch.ones_like(lengths)  # the stack's top; place 0 is its bottom
    sign, value = torch.ones_like(lengths), torch.zeros_like(lengths)
    written, states, values = [], [], []
    for _ in range(longest):
        item, sign = items[rows, depth], torch.where(depth > 0, signs[rows, depth], sign)
        number, flip = _random(MODULUS, (N,), generator), _random(2, (N,), generator)
        left = 1 + (torch.rand(N, generator=generator, device=lengths.device) * (item - 4).clamp(min=1)).long()
        symbol = torch.where(item == 1, number, torch.where(item == 2, MINUS, torch.where(item > 2, OPEN, -item)))
        value = (value + sign * number * (item == 1)) % MODULUS
        depth = (depth - 1).clamp(min=0)
        other = sign * (1 - 2 * flip)
        for push, what, signed in (  # what is written last goes on the stack first
            (item > 2, torch.full_like(item, -CLOSE), sign),
            (item > 4, item - 3 - left, other),
            (item > 4, -PLUS - flip, other),
            (item > 1, torch.where(item > 4, left, 1 + (item == 4).long()), torch.where(item == 2, -sign, sign)),
        ):
            depth = depth + push.long()
            items[rows, depth] = torch.where(push, what, items[rows, depth])
            signs[rows, depth] = torch.where(push, signed, signs[rows, depth])
        written.append(symbol)
        states.append(MODULUS + 2 * value + (torch.where(item == 2, -sign, sign) < 0).long())
        values.append(value)
    return _answered(torch.stack(written, 1), torch.stack(states, 1), torch.stack(values, 1), lengths)


def _products() -> Tensor:
    """`[120, 120]`: the number of "first i, then j"."""
    number = {element: i for i, element in enumerate(ELEMENTS)}
    return torch.tensor([[number[tuple(b[x] for x in a)] for b in ELEMENTS] for a in ELEMENTS])


def s5(lengths: Int[Tensor, "N"], generator: Generator) -> tuple[Tensor, Tensor]:
    """Permutations of five things; the state is their product so far."""
    symbols = _random(len(ELEMENTS), (len(lengths), int(lengths.max())), generator)
    products = _products().to(symbols.device)
    states = [symbols[:, 0]]
    for i in range(1, symbols.shape[1]):
        states.append(products[states[-1], symbols[:, i]])
    return _ended(symbols, torch.stack(states, dim=1), lengths)


TASKS = {
    "parity": Task(parity, symbols=2, states=2, answers=2),
    "arithmetic": Task(
        arithmetic, symbols=EQUALS + 1, states=MODULUS + MODULUS**2, answers=MODULUS, fit=lambda n: n // 2 * 2
    ),
    "brackets": Task(brackets, symbols=CLOSE + 1, states=MODULUS * 3, answers=MODULUS),
    "s5": Task(s5, symbols=len(ELEMENTS), states=len(ELEMENTS), answers=len(ELEMENTS), every=True, longest=500),
}
