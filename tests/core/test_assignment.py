from collections import deque
from math import inf
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headgate.core.admission import Admission
from headgate.core.assignment import ReplicaSet, Waiting, assign


class Request(NamedTuple):
    order: int
    deadline: float = inf


def never():
    raise AssertionError("no chance is needed for four replicas or fewer")


def following(*names, limit=2, chance=never, near=()):
    replicas = ReplicaSet(chance)
    replicas.configure(names, limit, near)
    return replicas


def reserved(replicas, count):
    return [slot and slot[0] for slot in (replicas.reserve() for _ in range(count))]


def leaving(waiting, replicas):
    sent, late = assign(waiting, replicas, now=0.0)
    assert not late
    return sent


def queue(*orders):
    waiting = Waiting()
    for order in orders:
        waiting.push(Request(order))
    return waiting


# --- choosing -----------------------------------------------------------------------------------


def test_without_replicas_there_is_no_slot():
    assert following().reserve() is None


def test_one_replica_is_used_up_to_its_limit():
    replicas = following("a", limit=2)

    assert reserved(replicas, 3) == ["a", "a", None]
    replicas.release("a")
    assert reserved(replicas, 2) == ["a", None]


def test_sequential_requests_spread_over_all_replicas_in_turn():
    replicas = following("a", "b", "c")
    chosen = []
    for _ in range(6):
        chosen += reserved(replicas, 1)
        replicas.release(chosen[-1])

    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_the_replica_with_the_fewest_requests_is_chosen():
    replicas = following("a", "b", "c", limit=9)
    assert reserved(replicas, 6) == ["a", "b", "c", "a", "b", "c"]
    replicas.release("b")

    assert reserved(replicas, 2) == ["b", "a"]


def test_full_replicas_are_skipped():
    replicas = following("a", "b", limit=1)

    assert reserved(replicas, 3) == ["a", "b", None]
    replicas.release("b")
    assert reserved(replicas, 2) == ["b", None]


def test_beyond_four_replicas_two_are_looked_at():
    names = [f"iris#{number}" for number in range(5)]
    replicas = following(*names, chance=iter([0.0, 0.0, 0.99, 0.99]).__next__)

    # 0.0 looks at the first two, 0.99 at the last two
    assert reserved(replicas, 4) == ["iris#0", "iris#1", "iris#4", "iris#3"]


@given(chance=st.floats(0, 1, exclude_max=True), size=st.integers(5, 300))
def test_the_two_are_never_one_and_the_same(chance, size):
    replicas = following(*map(str, range(size)), limit=1, chance=lambda: chance)

    first, second = reserved(replicas, 2)
    assert first != second


def test_a_free_replica_is_found_also_when_the_two_looked_at_are_full():
    replicas = following(*"abcdef", limit=1, chance=lambda: 0.0)

    assert sorted(reserved(replicas, 6)) == list("abcdef")
    assert replicas.reserve() is None


@given(chances=st.lists(st.floats(0, 1, exclude_max=True), min_size=30, max_size=30), size=st.integers(1, 8))
def test_every_slot_is_used_and_none_twice(chances, size):
    replicas = following(*map(str, range(size)), limit=3, chance=iter(chances).__next__)

    chosen = reserved(replicas, size * 3)
    assert sorted(chosen) == sorted(list(map(str, range(size))) * 3)
    assert replicas.reserve() is None


# --- near ones ----------------------------------------------------------------------------------


def test_of_equally_busy_replicas_a_near_one_is_chosen():
    replicas = following("a", "b", "c", "d", limit=9, near=["c", "d"])

    assert reserved(replicas, 6) == ["c", "d", "a", "b", "c", "d"]
    replicas.release("b")
    assert reserved(replicas, 3) == ["b", "a", "b"]


def test_near_replicas_take_turns():
    replicas = following("a", "b", "c", near={"b", "c"})
    chosen = []
    for _ in range(4):
        chosen += reserved(replicas, 1)
        replicas.release(chosen[-1])

    assert chosen == ["b", "c", "b", "c"]


def test_a_busier_near_replica_does_not_win():
    replicas = following("a", "b", limit=9, near=["b"])
    assert reserved(replicas, 2) == ["b", "a"]
    replicas.release("a")

    assert reserved(replicas, 2) == ["a", "b"]


def test_a_full_or_silent_near_replica_is_skipped():
    replicas = following("a", "b", limit=2, near=["b"])
    replicas.suspend("b")
    assert reserved(replicas, 3) == ["a", "a", None]
    replicas.resume("b")

    assert reserved(replicas, 3) == ["b", "b", None]


def test_what_is_near_may_change():
    replicas = following("a", "b", "c", limit=9, near=["c"])
    assert reserved(replicas, 3) == ["c", "a", "b"]
    replicas.configure("abc", 9, ["b"])
    assert reserved(replicas, 3) == ["b", "c", "a"]
    replicas.configure("abc", 9)

    assert reserved(replicas, 3) == ["b", "c", "a"]  # by turn again


def test_beyond_four_replicas_two_near_ones_are_looked_at_as_well():
    replicas = following(*"abcdef", limit=9, chance=lambda: 0.0, near="cef")

    # 0.0 looks at a and b of all, and at f and c of the near ones
    assert reserved(replicas, 7) == ["f", "c", "a", "b", "f", "c", "a"]


def test_beyond_four_replicas_one_near_one_is_looked_at():
    replicas = following(*"abcdef", limit=9, chance=lambda: 0.99, near="b")

    # 0.99 looks at e and f of all
    assert reserved(replicas, 5) == ["b", "f", "e", "b", "f"]


def test_beyond_four_replicas_a_free_one_is_found_near_or_not():
    replicas = following(*"abcdef", limit=1, chance=lambda: 0.0, near="ab")

    assert reserved(replicas, 7) == [*"abcdef", None]


def steps(size):
    """Which of `size` replicas are near, and what happens: None takes a slot, a number ends a request there."""
    return st.tuples(
        st.sets(st.integers(0, size - 1)).map(lambda near: {str(number) for number in near}),
        st.lists(st.none() | st.integers(0, size - 1).map(str), max_size=60),
    )


def follow_steps(replicas, names, happenings):
    """The choices, each with the loads before it."""
    for name in happenings:
        if name is None:
            loads = {each: replicas.in_flight(each) for each in names}
            yield loads, (replicas.reserve() or [None])[0]
        elif not replicas.idle(name):
            replicas.release(name)


@given(st.integers(1, 4).flatmap(steps))
def test_of_a_few_the_least_busy_is_chosen_and_a_near_one_if_there_is_one(case):
    near, happenings = case
    names = list("0123")
    replicas = following(*names, limit=3, near=near)

    for loads, chosen in follow_steps(replicas, names, happenings):
        least = min(loads.values())
        if chosen is None:
            assert least == 3
        else:
            assert loads[chosen] == least
            assert chosen in near or least not in [loads[each] for each in near]


@given(case=st.integers(5, 9).flatmap(steps), chance=st.randoms(use_true_random=False))
def test_of_many_one_with_room_is_chosen_and_a_far_one_only_if_some_near_one_is_busier(case, chance):
    near, happenings = case
    names = list("012345678")
    replicas = following(*names, limit=2, chance=chance.random, near=near)

    for loads, chosen in follow_steps(replicas, names, happenings):
        if chosen is None:
            assert set(loads.values()) == {2}
        else:
            assert loads[chosen] < 2
            assert chosen in near or not near or loads[chosen] < max(loads[each] for each in near)


@given(
    case=st.integers(1, 9).flatmap(lambda size: st.tuples(st.just(size), steps(size))),
    seed=st.integers(0, 99),
    all_near=st.booleans(),
)
def test_when_all_or_none_are_near_it_is_as_if_it_were_not_known(case, seed, all_near):
    size, (_, happenings) = case
    names = [str(number) for number in range(size)]
    one = following(*names, chance=Random(seed).random)
    other = following(*names, chance=Random(seed).random, near=names if all_near else ["z"])

    assert [*follow_steps(one, names, happenings)] == [*follow_steps(other, names, happenings)]


# --- following the snapshot ---------------------------------------------------------------------


def test_a_replica_that_stays_keeps_its_count():
    replicas = following("a", limit=2)
    reserved(replicas, 2)
    replicas.configure(["a", "b"], 3)

    assert replicas.in_flight("a") == 2
    assert reserved(replicas, 4) == ["b", "b", "a", "b"]


def test_who_holds_a_replica_may_count_itself_while_its_requests_last():
    replicas = following("a", "b")
    assert replicas.only is None
    replica = replicas.replica("b")
    replica.load += 1
    replicas.configure(["a"], 2)
    replicas.configure(["b"], 2)

    assert replicas.only is replicas.replica("b") is replica
    assert replicas.in_flight("b") == 1
    replica.load -= 1
    assert replicas.idle("b")


def test_a_replica_that_was_removed_gets_nothing_more_but_keeps_its_count():
    replicas = following("a", "b", limit=2)
    reserved(replicas, 4)
    replicas.configure(["b"], 2)
    replicas.release("a")

    assert replicas.reserve() is None
    assert (replicas.in_flight("a"), replicas.idle("a")) == (1, False)
    replicas.release("a")
    assert replicas.idle("a")


def test_a_replica_that_comes_back_still_has_its_requests():
    replicas = following("a", limit=2)
    reserved(replicas, 2)
    replicas.configure([], 2)
    replicas.configure(["a"], 2)

    assert replicas.reserve() is None
    replicas.release("a")
    assert replicas.reserve() == ("a", 0)


def test_a_lowered_limit_lets_nothing_in_until_enough_have_ended():
    replicas = following("a", limit=3)
    reserved(replicas, 3)
    replicas.configure(["a"], 1)
    for _ in range(2):
        replicas.release("a")
        assert replicas.reserve() is None
    replicas.release("a")

    assert replicas.reserve() == ("a", 0)


def test_an_unknown_replica_is_idle_and_may_be_spoken_of():
    replicas = following("a")

    assert replicas.idle("z")
    assert replicas.spare_grants("z") == replicas.suspend("z") == 0
    replicas.resume("z")
    replicas.lost("z")
    assert replicas.room("z", 3) == 3


# --- suspended, lost ----------------------------------------------------------------------------


def test_a_suspended_replica_is_skipped_until_it_answers_again():
    replicas = following("a", "b", limit=2)
    assert replicas.suspend("a") == 0
    assert reserved(replicas, 3) == ["b", "b", None]
    replicas.resume("a")

    assert reserved(replicas, 3) == ["a", "a", None]


def test_suspending_hands_back_grants_and_later_ones_at_once():
    replicas = following("a", limit=2)
    replicas.reserve()
    replicas.refuse("a")
    replicas.room("a", 1)

    assert replicas.suspend("a") == 1
    assert replicas.room("a", 1) == 1
    replicas.resume("a")
    assert replicas.reserve() == ("a", 0)


def test_a_lost_link_takes_its_refusals_and_grants_with_it():
    replicas = following("a", limit=2)
    reserved(replicas, 2)
    replicas.refuse("a")
    replicas.lost("a")

    assert replicas.in_flight("a") == 1  # until the router has decided what becomes of it
    replicas.release("a")
    assert replicas.reserve() is None
    replicas.resume("a")
    assert reserved(replicas, 3) == ["a", "a", None]


def test_a_lost_link_of_a_removed_replica_leaves_nothing_behind():
    replicas = following("a", limit=2)
    replicas.reserve()
    replicas.refuse("a")
    replicas.configure([], 2)
    replicas.lost("a")
    replicas.configure(["a"], 2)

    assert replicas.reserve() == ("a", 0)


# --- BUSY and ROOM ------------------------------------------------------------------------------


def test_after_a_refusal_nothing_is_sent_without_a_grant():
    replicas = following("a", limit=9)
    replicas.reserve()
    replicas.refuse("a")

    assert replicas.idle("a")
    assert replicas.reserve() is None
    assert replicas.room("a", 1) == 0
    assert reserved(replicas, 2) == ["a", "a"]  # the grant, and then it is open again


def test_while_further_grants_are_owed_each_call_needs_its_own():
    replicas = following("a", limit=9)
    reserved(replicas, 3)
    for _ in range(3):
        replicas.refuse("a")
    replicas.room("a", 2)

    assert reserved(replicas, 3) == ["a", "a", None]


def test_a_replica_with_a_grant_is_used_before_others():
    replicas = following("a", "b", limit=9)
    reserved(replicas, 4)
    replicas.refuse("a")
    replicas.release("b")
    replicas.release("b")
    replicas.room("a", 1)

    assert reserved(replicas, 2) == ["a", "b"]


def test_a_granted_call_asks_for_as_many_as_wait_and_fit():
    replicas = following("a", limit=4)
    replicas.reserve()
    replicas.refuse("a")
    replicas.room("a", 1)

    assert replicas.reserve(behind=100) == ("a", 3)
    assert replicas.reserve(behind=99) is None
    replicas.room("a", 1)
    assert replicas.reserve(behind=99) == ("a", 0)  # two are owed already, and two fit


def test_a_router_that_holds_every_slot_asks_for_one_more():
    replicas = following("a", limit=2)
    reserved(replicas, 2)
    replicas.refuse("a")
    replicas.room("a", 1)

    assert replicas.reserve(behind=5) == ("a", 1)


def test_what_waits_is_asked_for_once_over_all_replicas():
    replicas = following("a", "b", limit=9)
    reserved(replicas, 2)
    replicas.refuse("a")
    replicas.room("a", 1)

    assert replicas.reserve(behind=5) == ("a", 3)


def test_grants_that_nobody_needs_are_handed_back():
    replicas = following("a", limit=9)
    reserved(replicas, 2)
    replicas.refuse("a")
    replicas.refuse("a")
    replicas.room("a", 2)

    assert replicas.spare_grants("a") == 2
    assert replicas.spare_grants("a") == 0
    assert replicas.reserve() == ("a", 0)


def test_grants_of_a_removed_replica_are_handed_back_at_once():
    replicas = following("a", "b", limit=9)
    reserved(replicas, 2)
    replicas.refuse("a")
    replicas.configure(["b"], 9)

    assert replicas.room("a", 1) == 1
    assert replicas.in_flight("a") == 0


def test_requests_leave_in_their_order_while_there_is_room():
    replicas, waiting = following("a", "b", limit=1), queue(1, 2, 3)

    assert leaving(waiting, replicas) == [(Request(1), "a", 0), (Request(2), "b", 0)]
    replicas.release("b")
    assert leaving(waiting, replicas) == [(Request(3), "b", 0)]
    assert leaving(waiting, replicas) == []


def test_a_request_that_is_late_takes_no_slot_wherever_it_stands():
    replicas, waiting = following("a", limit=1), queue()
    for request in (Request(1, 5.0), Request(2, 6.0), Request(3, 5.0), Request(4)):
        waiting.push(request)

    assert assign(waiting, replicas, now=5.0) == ([(Request(2, 6.0), "a", 0)], [Request(1, 5.0), Request(3, 5.0)])
    assert assign(waiting, replicas, now=99.0) == ([], [])
    replicas.release("a")
    assert assign(waiting, replicas, now=99.0) == ([(Request(4), "a", 0)], [])


def test_a_refused_request_leaves_first_and_says_how_many_are_behind_it():
    replicas, waiting = following("a", limit=9), queue(1)
    [(request, name, _)] = leaving(waiting, replicas)
    waiting.push(Request(2))
    replicas.refuse(name)
    waiting.push_front(request)
    assert leaving(waiting, replicas) == []
    replicas.room("a", 1)

    assert leaving(waiting, replicas) == [(Request(1), "a", 1)]


# --- several routers, one limit -----------------------------------------------------------------


class Link:
    """Two pipes that keep the order and take their time."""

    def __init__(self, router, replica):
        self.router, self.replica = router, replica
        self.down, self.up = deque(), deque()  # to the replica, to the router


class Replica:
    """Accepts, refuses, and ends calls when the test says so."""

    def __init__(self, name, limit):
        self.name, self.limit, self.ceiling = name, limit, limit
        self.slots = Admission(limit)
        self.calls = []

    def receive(self, link):
        match link.down.popleft():
            case "ROOM", count:
                self.send_rooms(self.slots.hand_back(link, count))
            case "CALL", request, want:
                if self.slots.offer(link, want):
                    self.calls.append((link, request))
                else:
                    link.up.append(("BUSY", request))
                self.send_rooms(self.slots.rooms() if want else [])
        assert not self.slots.rooms()

    def end_call(self, place):
        link, request = self.calls.pop(place)
        rooms = self.slots.free()
        link.up.append(("REPLY", request))
        self.send_rooms(rooms)

    def set_limit(self, limit):
        self.limit, self.ceiling = limit, max(limit, self.ceiling)
        self.send_rooms(self.slots.set_limit(limit))

    def send_rooms(self, links):
        for link in links:
            link.up.append(("ROOM", 1))

    def check(self):
        taken = self.slots.held + self.slots.reserved
        assert self.slots.held == len(self.calls)
        assert taken <= self.ceiling
        self.ceiling = max(self.limit, taken)  # a lowered limit is reached as calls end


class Router:
    """What router.py does with its replicas and its FIFO."""

    def __init__(self, replicas):
        self.all = replicas
        self.limit = replicas[0].limit
        self.replicas, self.waiting = ReplicaSet(lambda: 0.37), Waiting()
        self.links = {replica.name: Link(self, replica) for replica in replicas}
        self.sent = {replica.name: set() for replica in replicas}
        self.follows, self.silent = [], set()
        self.made, self.queued, self.ended = 0, set(), set()
        self.follow([replica.name for replica in replicas], self.limit)

    def follow(self, names, limit):
        returning = set(names) - set(self.follows)
        self.follows, self.limit = names, limit
        self.replicas.configure(names, limit)
        for name in returning:
            if self.links[name] is None or name in self.silent:
                self.replicas.suspend(name)
        self.pump()

    def request(self):
        self.made += 1
        request = Request(self.made)
        if not self.waiting and (slot := self.replicas.reserve()):
            self.send(request, *slot)
        else:
            self.queued.add(request)
            assert self.waiting.push(request)
            self.pump()

    def pump(self):
        for request, name, want in leaving(self.waiting, self.replicas):
            assert request == min(self.queued), "overtaken in the FIFO"
            self.queued.remove(request)
            self.send(request, name, want)
        for name in self.links if not self.waiting else ():
            self.hand_back(name, self.replicas.spare_grants(name))

    def send(self, request, name, want):
        self.sent[name].add(request)
        self.links[name].down.append(("CALL", request, want))

    def hand_back(self, name, count):
        if count:
            self.links[name].down.append(("ROOM", count))

    def requeue(self, request):
        self.queued.add(request)
        self.waiting.push_front(request)

    def receive(self, link):
        name = link.replica.name
        what, content = link.up.popleft()
        if what == "ROOM":
            self.hand_back(name, self.replicas.room(name, content))
        else:
            self.sent[name].remove(content)
        if what == "BUSY":
            self.replicas.refuse(name)
            self.requeue(content)
        if what == "REPLY":
            self.replicas.release(name)
            self.ended.add(content)
        self.pump()

    def give_up(self, request):
        assert self.waiting.remove(request)
        self.queued.remove(request)
        self.ended.add(request)

    def lose(self, name):
        """The link ends; what the replica may have begun fails, the rest is sent elsewhere."""
        link, self.links[name] = self.links[name], None
        began = {request for other, request in link.replica.calls if other is link}
        began |= {content for what, content in link.up if what == "REPLY"}
        self.replicas.lost(name)
        for request in self.sent[name]:
            self.replicas.release(name)
            if request in began:
                self.ended.add(request)
            else:
                self.requeue(request)
        self.sent[name].clear()
        self.pump()
        return link

    def connect(self, name):
        if self.links[name] is None:
            self.links[name] = Link(self, next(one for one in self.all if one.name == name))
        self.silent.discard(name)
        self.replicas.resume(name)
        self.pump()


class RoutersShareReplicas(RuleBasedStateMachine):
    """Any order of events; then all is delivered, all calls end, and everybody must be served."""

    routers_of, replicas_of = 3, 2

    def __init__(self):
        super().__init__()
        self.replicas = [Replica(f"iris#{number}", limit=2) for number in range(self.replicas_of)]
        self.routers = [Router(self.replicas) for _ in range(self.routers_of)]
        self.dying = []  # links that their replica does not know to be gone

    any_router = st.integers(0, routers_of - 1)
    any_replica = st.integers(0, replicas_of - 1)

    def links(self):
        return [link for router in self.routers for link in router.links.values() if link]

    @initialize(counts=st.lists(st.integers(0, 9), min_size=routers_of, max_size=routers_of))
    def all_slots_are_taken_and_some_wait(self, counts):
        for router, count in zip(self.routers, counts, strict=True):
            for _ in range(count):
                router.request()
        for link in self.links():
            for _ in range(len(link.down)):
                link.replica.receive(link)

    @rule(router=any_router, count=st.integers(1, 5))
    def requests_arrive(self, router, count):
        for _ in range(count):
            self.routers[router].request()

    @rule(data=st.data(), count=st.integers(1, 4))
    def messages_reach_a_replica(self, data, count):
        if links := [link for link in self.links() + self.dying if link.down]:
            link = data.draw(st.sampled_from(links))
            for _ in range(min(count, len(link.down))):
                link.replica.receive(link)

    @rule(data=st.data(), count=st.integers(1, 4))
    def messages_reach_a_router(self, data, count):
        if links := [link for link in self.links() if link.up]:
            link = data.draw(st.sampled_from(links))
            for _ in range(min(count, len(link.up))):
                link.router.receive(link)

    @rule(replica=any_replica, count=st.integers(1, 4), data=st.data())
    def calls_end(self, replica, count, data):
        for _ in range(count):
            self.a_call_ends(replica, data)

    def a_call_ends(self, replica, data):
        if calls := self.replicas[replica].calls:
            self.replicas[replica].end_call(data.draw(st.integers(0, len(calls) - 1)))

    @rule(router=any_router, data=st.data())
    def a_caller_gives_up(self, router, data):
        if queued := sorted(self.routers[router].queued):
            self.routers[router].give_up(data.draw(st.sampled_from(queued)))

    @rule(router=any_router, replica=any_replica)
    def a_link_is_lost(self, router, replica):
        name = self.replicas[replica].name
        if self.routers[router].links[name]:
            self.dying.append(self.routers[router].lose(name))

    @precondition(lambda self: self.dying)
    @rule(data=st.data())
    def a_replica_notices_a_lost_link(self, data):
        link = data.draw(st.sampled_from(self.dying))
        self.dying.remove(link)
        link.replica.send_rooms(link.replica.slots.forget(link))

    @rule(router=any_router, replica=any_replica)
    def a_router_connects_again(self, router, replica):
        if (name := self.replicas[replica].name) in self.routers[router].follows:
            self.routers[router].connect(name)

    @rule(router=any_router, replica=any_replica)
    def a_replica_seems_silent(self, router, replica):
        router, name = self.routers[router], self.replicas[replica].name
        if router.links[name]:
            router.silent.add(name)
            router.hand_back(name, router.replicas.suspend(name))

    @rule(router=any_router, which=st.sets(any_replica))
    def a_router_follows_a_new_snapshot(self, router, which):
        names = [self.replicas[number].name for number in sorted(which)]
        self.routers[router].follow(names, self.replicas[0].limit)

    @rule(limit=st.integers(1, 4))
    def the_limit_changes(self, limit):
        for replica in self.replicas:
            replica.set_limit(limit)

    @rule()
    def everything_is_delivered(self):
        while self.dying:
            link = self.dying.pop()
            link.replica.send_rooms(link.replica.slots.forget(link))
        for _ in range(1000):
            busy = [link for link in self.links() if link.down or link.up]
            for link in busy:
                for _ in range(len(link.down)):
                    link.replica.receive(link)
                for _ in range(len(link.up)):
                    link.router.receive(link)
            if not busy:
                break
        else:
            raise AssertionError("messages go to and fro for ever")
        for router in self.routers:
            self.nobody_waits_while_a_slot_is_free(router)

    def nobody_waits_while_a_slot_is_free(self, router):
        assert all(replica.slots.reserved == 0 for replica in self.replicas)
        for replica in self.replicas if router.waiting else ():
            name = replica.name
            if name in router.follows and router.links[name] and name not in router.silent:
                full = replica.slots.held >= replica.limit or router.replicas.in_flight(name) >= router.limit
                assert full, f"{len(router.waiting)} requests wait, {name} holds {replica.slots.held}"

    @invariant()
    def no_replica_holds_more_than_its_limit(self):
        for replica in self.replicas:
            replica.check()

    def teardown(self):
        names = [replica.name for replica in self.replicas]
        limit = self.replicas[0].limit
        for router in self.routers:
            router.follow(names, limit)
            for name in names:
                router.connect(name)
        self.everything_is_delivered()
        while any(replica.calls for replica in self.replicas):
            for replica in self.replicas:
                if replica.calls:
                    replica.end_call(0)
            self.everything_is_delivered()
        for router in self.routers:
            assert len(router.ended) == router.made, "a request was never answered"
            slots = reserved(router.replicas, limit * len(names))
            assert None not in slots, "a router lost a slot"
        for replica in self.replicas:
            accepted = [replica.slots.offer("new") for _ in range(limit + 1)]
            assert accepted == [True] * limit + [False], "a replica lost a slot"


TestRoutersShareReplicas = RoutersShareReplicas.TestCase
TestRoutersShareReplicas.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_under_contention_each_router_gets_its_share_and_few_calls_travel_twice(limit):
    replica = Replica("iris#0", limit)
    routers = [Router([replica]) for _ in range(4)]
    links = [router.links["iris#0"] for router in routers]
    answered, refused = [], 0
    for _ in range(400):
        for router, link in zip(routers, links, strict=True):
            while len(router.waiting) < 10:
                router.request()
            while link.down:
                replica.receive(link)
        if replica.calls:
            answered.append(replica.calls[0][0])
            replica.end_call(0)
        for link in links:
            while link.up:
                refused += link.up[0][0] == "BUSY"
                link.router.receive(link)

    shares = [answered.count(link) for link in links]
    assert max(shares) - min(shares) <= 2 * limit
    assert refused <= 4 * limit  # at the start only; afterwards calls leave with a grant
