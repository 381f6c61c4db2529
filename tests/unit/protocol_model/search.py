"""Breadth first through everything that a model can do."""

from dataclasses import dataclass, field

from .workers import Model
from .world import Violation


class TooManyStates(Exception):
    """The search was given up: it proves nothing."""


@dataclass
class Found:
    states: int = 0
    moves: set[tuple[str, str]] = field(default_factory=set)
    #: What happened that never may, …
    violation: str = ""
    #: … or `stuck`, if a job can't end any more without a further fault; and one of the shortest ways there. The
    #: number of a worker is its place among those that are alike, which changes from step to step.
    way: tuple[str, ...] = ()


def search(model: Model, most_states: int) -> Found:
    """Look at all states, up to a violation. Raises `TooManyStates`."""
    first = model.canonical(model.first())
    found, states, numbers = Found(), [first], {first: 0}
    came_from: list[tuple[int, str]] = [(0, "")]
    #: By state, those that lead to it without a fault.
    before: list[list[int]] = [[]]
    for number, state in enumerate(states):
        try:
            # `states` grows meanwhile.
            for is_fault, what, after in model.steps(state):
                after = model.canonical(after)
                known = numbers.setdefault(after, len(states))
                if known == len(states):
                    states.append(after)
                    came_from.append((number, what))
                    before.append([])
                if not is_fault:
                    before[known].append(number)
                found.moves.add((state.row.status, after.row.status))
        except Violation as e:
            found.violation, found.way = str(e), _way(came_from, number)
            break
        if len(states) > most_states:
            raise TooManyStates(f"{model} has more than {most_states}")
    found.states = len(states)
    if not found.violation:
        ends = [number for number, state in enumerate(states) if model.is_done(state)]
        stuck = set(range(len(states))) - _leading_to(ends, before)
        if stuck:
            found.violation, found.way = "stuck", _way(came_from, min(stuck))
    return found


def _leading_to(goals: list[int], before: list[list[int]]) -> set[int]:
    reached, left = set(goals), list(goals)
    while left:
        new = set(before[left.pop()]) - reached
        reached |= new
        left += new
    return reached


def _way(came_from: list[tuple[int, str]], number: int) -> tuple[str, ...]:
    way = []
    while number:
        number, what = came_from[number]
        way.append(what)
    return tuple(reversed(way))
