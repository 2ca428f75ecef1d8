"""engine/queue/order.py: who waits, in which order, and at which place."""

import random

import pytest

from engine.queue.order import Order, ranks_of
from engine.queue.tasks import Task
from tests.stand_ins import job

JOB = job()


def waiting(count: int) -> Order:
    order = Order()
    for task_id in range(1, count + 1):
        order.add(Task(task_id, JOB))
    return order


def ids(order: Order) -> list[int]:
    return [task.id for task in order]


def moved(order: Order, task_id: int, place: int) -> int:
    """Move a task; returns how many ranks that changed."""
    ranks = order.ranks_for(task_id, place)
    order.rerank(ranks)
    return len(ranks)


@pytest.mark.parametrize("seed", range(5))
def test_any_moves_and_removals_give_the_order_of_a_plain_list(seed: int) -> None:
    chance, order, plain = random.Random(seed), waiting(20), list(range(1, 21))
    for new_id in range(21, 400):
        task_id, place = chance.choice(plain), chance.choice([0, len(plain) - 1, chance.randrange(len(plain))])
        plain.remove(task_id)
        if chance.random() < 0.3:
            order.remove(task_id)
        else:
            plain.insert(place, task_id)
            moved(order, task_id, place)
        order.add(Task(new_id, JOB))  # what is submitted comes last, whatever was moved to the end before
        plain.append(new_id)
        assert ids(order) == plain
        assert [order.place(task_id) for task_id in plain] == list(range(len(plain)))


def test_a_move_changes_one_rank_until_no_number_is_left_between_two() -> None:
    order, changed = waiting(4), []
    for _ in range(200):
        changed.append(moved(order, ids(order)[2], 1))
    assert set(changed) == {1, 4}
    assert changed.count(4) < 10
    order.add(Task(5, JOB))
    assert ids(order)[-1] == 5


def test_a_removed_task_has_no_place() -> None:
    order = waiting(3)
    order.remove(2)
    order.remove(2)
    assert (order.place(2), order.get(2), ids(order)) == (None, None, [1, 3])


@pytest.mark.parametrize("back", [(1, 2), (2, 1)])
def test_what_ran_comes_back_in_its_order_before_all_that_wait_moved_or_not(back: tuple[int, int]) -> None:
    order, running = waiting(5), [Task(1, JOB), Task(2, JOB)]
    for task in running:
        order.take(task.id)
    for _ in range(100):  # each pair of moves halves the distance to what runs
        assert moved(order, ids(order)[2], 0) in {1, 5}
    front = ids(order)
    for task_id in back:
        order.add(running[task_id - 1])
    assert ids(order) == [1, 2, *front]


def test_ranks_of_an_order_stay_below_every_id() -> None:
    ranks = ranks_of([3, 1, 2])
    assert sorted(ranks, key=ranks.__getitem__) == [3, 1, 2]
    assert max(ranks.values()) < 0


def test_places_are_found_in_a_queue_of_a_hundred_thousand_without_looking_at_each() -> None:
    order = waiting(100_000)
    assert [order.place(task_id) for task_id in range(1, 100_001, 10)] == list(range(0, 100_000, 10))
