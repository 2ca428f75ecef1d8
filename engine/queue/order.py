"""The order in which tasks wait: by rank, a number that the journal stores beside each task."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence

from engine.queue.tasks import Task


class Order:
    """The waiting tasks, sorted by rank. A place is counted from 0, and is found by bisection.

    A new task's rank is its id, above all ranks that are given here. A task that is moved gets a rank between those of
    its new neighbours, so that only its row changes. A task that runs keeps its rank, below those of all that wait.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, Task] = {}
        self._ranks: dict[int, float] = {}  # also of those that run
        self._sorted: list[tuple[float, int]] = []  # rank, id

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[Task]:
        return (self._tasks[task_id] for _, task_id in self._sorted)

    @property
    def first(self) -> Task | None:
        return self._tasks[self._sorted[0][1]] if self._sorted else None

    def get(self, task_id: int) -> Task | None:
        """The task with this id if it waits."""
        return self._tasks.get(task_id)

    def place(self, task_id: int) -> int | None:
        """How many tasks wait before this one; None if it does not wait."""
        return bisect_left(self._sorted, (self._ranks[task_id], task_id)) if task_id in self._tasks else None

    def add(self, task: Task) -> None:
        """Let a task wait, at the rank that it has, or behind all others if it is new."""
        self._tasks[task.id] = task
        insort(self._sorted, (self._ranks.setdefault(task.id, task.id), task.id))

    def take(self, task_id: int) -> None:
        """Let a waiting task run; nothing happens if it runs already."""
        place = self.place(task_id)
        if place is not None:
            del self._sorted[place], self._tasks[task_id]

    def remove(self, task_id: int) -> None:
        """Forget a task, whether it waits or runs."""
        self.take(task_id)
        self._ranks.pop(task_id, None)

    def ranks_for(self, task_id: int, place: int) -> Mapping[int, float]:
        """The ranks that bring a waiting task to `place` among the others that wait, behind those that run; by id.

        It is one rank, or those of all if no number is left between its new neighbours.
        """
        own, count = self.place(task_id), len(self._sorted) - 1
        running = self._ranks.keys() - self._tasks.keys()
        assert own is not None

        def other(index: int) -> float:
            return self._sorted[index + (index >= own)][0]

        after = other(place) if place < count else math.inf
        ahead = [other(place - 1)] if place else [self._ranks[each] for each in running]
        before = max((rank for rank in ahead if rank < after), default=min(after, self._ranks[task_id]) - 2)
        rank = (before + min(after, math.floor(before) + 1)) / 2
        if before < rank < after:
            return {task_id: rank}
        ids = [waiting for _, waiting in self._sorted if waiting != task_id]
        ids.insert(place, task_id)
        return ranks_of([*sorted(running, key=self._ranks.__getitem__), *ids])

    def rerank(self, ranks: Mapping[int, float]) -> None:
        """Give new ranks to tasks that wait or run."""
        for task_id, rank in ranks.items():
            task = self._tasks.get(task_id)
            self.take(task_id)
            self._ranks[task_id] = rank
            if task:
                self.add(task)


def ranks_of(ids: Sequence[int]) -> dict[int, float]:
    """Ranks for tasks in this order: negative, so that whatever is submitted later (rank = id) comes behind."""
    return {task_id: float(place - len(ids)) for place, task_id in enumerate(ids)}
