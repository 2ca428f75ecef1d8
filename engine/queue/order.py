"""The order in which tasks wait: by rank, a number that the journal stores beside each task."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence

from engine.queue.tasks import Task


class Order:
    """The waiting tasks, sorted by rank. A place is counted from 0, and is found by bisection.

    The rank of a new task is its id, which puts it behind all others: whatever rank is given here stays below the next
    id. A task that is moved gets a rank between those of its new neighbours, so that only its own row changes.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, Task] = {}
        self._ranks: dict[int, float] = {}
        self._sorted: list[tuple[float, int]] = []  # rank, id

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[Task]:
        return (self._tasks[task_id] for _, task_id in self._sorted)

    @property
    def first(self) -> Task | None:
        """The task whose turn is next."""
        return self._tasks[self._sorted[0][1]] if self._sorted else None

    def get(self, task_id: int) -> Task | None:
        """The task with this id if it waits."""
        return self._tasks.get(task_id)

    def place(self, task_id: int) -> int | None:
        """How many tasks wait before this one; None if it does not wait."""
        rank = self._ranks.get(task_id)
        return None if rank is None else bisect_left(self._sorted, (rank, task_id))

    def add(self, task: Task, rank: float) -> None:
        """Let a task wait."""
        self._tasks[task.id], self._ranks[task.id] = task, rank
        insort(self._sorted, (rank, task.id))

    def remove(self, task_id: int) -> None:
        """Take a task out; nothing happens if it does not wait."""
        place = self.place(task_id)
        if place is not None:
            del self._sorted[place], self._tasks[task_id], self._ranks[task_id]

    def ranks_for(self, task_id: int, place: int) -> Mapping[int, float]:
        """The ranks that bring a task, waiting or not, to `place` among the others, by id.

        It is one rank, or those of all if no number is left between its new neighbours.
        """
        own = self.place(task_id)

        def other(index: int) -> float:
            return self._sorted[index + (own is not None and index >= own)][0]

        before = other(place - 1) if place else None
        after = other(place) if place < len(self) - (own is not None) else None
        if before is None:
            return {task_id: 0.0 if after is None else after - 1}
        rank = (before + (math.floor(before) + 1 if after is None else after)) / 2
        if before < rank < (math.inf if after is None else after):
            return {task_id: rank}
        ids = [waiting for _, waiting in self._sorted if waiting != task_id]
        ids.insert(place, task_id)
        return ranks_of(ids)

    def rerank(self, ranks: Mapping[int, float]) -> None:
        """Give new ranks to those of these tasks that wait."""
        for task_id, rank in ranks.items():
            if task := self._tasks.get(task_id):
                self.remove(task_id)
                self.add(task, rank)


def ranks_of(ids: Sequence[int]) -> dict[int, float]:
    """Ranks for tasks in this order: negative, so that whatever is submitted later (rank = id) comes behind."""
    return {task_id: float(place - len(ids)) for place, task_id in enumerate(ids)}
