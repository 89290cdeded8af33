"""Which of several replicas of a model gets a request. Knows nothing of what replicas are, or how they are reached.

Requests are handed out late: a replica gets more only while less than `capacity` tokens of it are outstanding, and
while it has room by what it says itself. So those that are fast, or that drew short requests, take more of them, and at
the end all finish within one such amount of work.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

REMEMBERED_PREFIXES = 100_000
TOLERATED_LOAD = 0.1  # share by which a replica that has computed the prefix may be busier than the idlest
TOLERATED_ROOM = -0.5  # down to which it may be given more than it has room for, or few would go where their prefix is


@dataclass(slots=True)
class _Load:
    num_tokens: float = 0.0  # of what it was given and has not finished
    room: float = math.inf
    requests: dict[Hashable, float] = field(default_factory=dict)  # their tokens, by key, oldest first


class Dispatcher:
    """Gives each request to the replica with the fewest tokens outstanding, or to one that knows its beginning.

    All that it does takes the time O(log(replicas)).

    Args:
        capacity: Tokens outstanding, prompts' and expected ones, with which a replica gets no more requests.
    """

    def __init__(self, capacity: float = math.inf):
        self.capacity = capacity
        self._loads: dict[Hashable, _Load] = {}
        self._replica_of: dict[Hashable, Hashable] = {}  # of each unfinished request
        self._heap: list[tuple[float, int, Hashable]] = []  # (load, serial, replica); entries of former loads too
        self._serials: dict[Hashable, int] = {}  # of the entry that counts
        self._next_serial = 0
        self._prefixes: OrderedDict[Hashable, Hashable] = OrderedDict()  # who computed them last; least recent first

    def __contains__(self, replica: Hashable) -> bool:
        """Whether a replica was added, and not removed."""
        return replica in self._loads

    def __len__(self) -> int:
        """How many requests are unfinished."""
        return len(self._replica_of)

    def num_requests(self, replica: Hashable) -> int:
        """How many of them are that replica's."""
        return len(self._loads[replica].requests)

    def add(self, replica: Hashable) -> None:
        """A replica is ready. It has nothing to do yet."""
        assert replica not in self._loads
        self._loads[replica] = _Load()
        self._enter(replica)

    def remove(self, replica: Hashable) -> list[Hashable]:
        """A replica is gone: the keys of its unfinished requests, oldest first, which are to be given to others."""
        keys = list(self._loads.pop(replica).requests)
        self._serials.pop(replica)
        for key in keys:
            del self._replica_of[key]
        return keys

    def choose(self, prefix: Hashable | None = None) -> Hashable | None:
        """The replica that should get the next request, None while all are full.

        `prefix` stands for the beginning of the request: whoever was given the same one last is preferred if it is
        hardly busier than the idlest.
        """
        while self._heap and self._serials.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        if not self._heap or self._heap[0][0] >= self.capacity:
            return None
        least, _, idlest = self._heap[0]
        known = self._loads.get(self._prefixes.get(prefix)) if prefix is not None else None
        most = min(self.capacity, (1 + TOLERATED_LOAD) * least)
        if known and known.num_tokens < most and known.room > TOLERATED_ROOM:
            return self._prefixes[prefix]
        return idlest

    def set_room(self, replica: Hashable, room: float) -> None:
        """How much more a replica says that it can take, 1 if nothing waits there; it is full at 0 and below."""
        self._loads[replica].room = room
        self._enter(replica)

    def give(self, replica: Hashable, key: Hashable, num_tokens: float, prefix: Hashable | None = None) -> None:
        """Records that a request with `num_tokens`, of its prompt and expected, went to a replica."""
        assert key not in self._replica_of
        self._replica_of[key] = replica
        self._loads[replica].requests[key] = num_tokens
        self._loads[replica].num_tokens += num_tokens
        self._enter(replica)
        if prefix is not None:
            self._prefixes[prefix] = replica
            self._prefixes.move_to_end(prefix)
            if len(self._prefixes) > REMEMBERED_PREFIXES:
                self._prefixes.popitem(last=False)

    def finish(self, key: Hashable) -> bool:
        """Records that a request has ended. False if it was not, or no more, a replica's."""
        replica = self._replica_of.pop(key, None)
        if replica is None:
            return False
        load = self._loads[replica]
        load.num_tokens -= load.requests.pop(key)
        if not load.requests:
            load.num_tokens = 0.0  # no rounding errors stay
        self._enter(replica)
        return True

    def _enter(self, replica: Hashable) -> None:
        self._next_serial += 1
        self._serials[replica] = self._next_serial
        if self._loads[replica].room > 0:
            heapq.heappush(self._heap, (self._loads[replica].num_tokens, self._next_serial, replica))
        if len(self._heap) > 4 * len(self._loads) + 100:  # mostly former loads, higher than anybody looks
            self._heap = [entry for entry in self._heap if self._serials.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
