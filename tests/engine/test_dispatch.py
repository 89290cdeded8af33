"""Against a model that looks at every replica each time."""

import math

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.dispatch import TOLERATED_LOAD, TOLERATED_ROOM, Dispatcher

REPLICAS = st.integers(0, 4)
STEPS = st.one_of(
    st.tuples(st.just("add"), REPLICAS),
    st.tuples(st.just("remove"), REPLICAS),
    st.tuples(st.just("give"), st.integers(1, 50), st.sampled_from([None, "a", "b", "c"])),
    st.tuples(st.just("finish"), st.integers(0, 30)),
    st.tuples(st.just("room"), REPLICAS, st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0])),
)


class Naive:
    def __init__(self, capacity: float):
        self.capacity = capacity
        self.given: dict[int, dict[int, float]] = {}  # tokens of unfinished requests, by replica
        self.rooms: dict[int, float] = {}
        self.prefixes: dict[str, int] = {}

    def load(self, replica: int) -> float:
        return sum(self.given[replica].values())

    def may_choose(self, prefix: str | None) -> set[int | None]:
        with_room = [r for r in self.given if self.rooms[r] > 0]
        least = min(map(self.load, with_room), default=math.inf)
        if least >= self.capacity:
            return {None}
        known = self.prefixes.get(prefix)
        most = min(self.capacity, (1 + TOLERATED_LOAD) * least)
        if known in self.given and self.rooms[known] > TOLERATED_ROOM and self.load(known) < most:
            return {known}
        return {r for r in with_room if self.load(r) == least}


@given(st.lists(STEPS, max_size=200), st.sampled_from([60, 200, math.inf]))
def test_the_choice_is_that_of_a_look_at_all_replicas(steps, capacity):
    dispatcher, naive = Dispatcher(capacity), Naive(capacity)
    for key, (kind, *args) in enumerate(steps):
        if kind == "add" and args[0] not in naive.given:
            dispatcher.add(args[0])
            naive.given[args[0]], naive.rooms[args[0]] = {}, math.inf
        elif kind == "remove" and args[0] in naive.given:
            assert dispatcher.remove(args[0]) == list(naive.given.pop(args[0]))
        elif kind == "room" and args[0] in naive.given:
            dispatcher.set_room(*args)
            naive.rooms[args[0]] = args[1]
        elif kind == "finish":
            [holder] = [r for r in naive.given if args[0] in naive.given[r]] or [None]
            assert dispatcher.finish(args[0]) == (holder is not None)
            if holder is not None:
                del naive.given[holder][args[0]]
        elif kind == "give":
            num_tokens, prefix = args
            replica = dispatcher.choose(prefix)
            assert replica in naive.may_choose(prefix)
            if replica is not None:
                dispatcher.give(replica, key, num_tokens, prefix)
                naive.given[replica][key] = num_tokens
                naive.prefixes |= {prefix: replica} if prefix is not None else {}
        assert len(dispatcher) == sum(map(len, naive.given.values()))
        assert all((replica in dispatcher) == (replica in naive.given) for replica in range(5))


def test_a_million_requests_leave_nothing_behind():
    dispatcher = Dispatcher()
    for replica in range(3):
        dispatcher.add(replica)
    for key in range(20_000):
        dispatcher.give(dispatcher.choose(), key, 1 + key % 7)
        if key >= 100:
            assert dispatcher.finish(key - 100)
        assert len(dispatcher._heap) < 150


def test_few_requests_with_one_prefix_are_spread():
    dispatcher = Dispatcher()
    for replica in range(4):
        dispatcher.add(replica)
    chosen = []
    for key in range(8):
        chosen.append(dispatcher.choose("same"))
        dispatcher.give(chosen[-1], key, 100, "same")
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_requests_go_where_their_prefix_is_while_loads_are_alike():
    dispatcher, where = Dispatcher(), {}
    for replica in range(2):
        dispatcher.add(replica)
    for key in range(400):
        prefix = key % 2
        replica = dispatcher.choose(prefix)
        dispatcher.give(replica, key, 10, prefix)
        where.setdefault(prefix, set()).add(replica)
    assert sorted(map(len, where.values())) == [1, 1] and where[0] != where[1]
