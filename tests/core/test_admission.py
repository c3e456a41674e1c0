from hypothesis import given
from hypothesis import strategies as st

from headgate.core.admission import Admission


def full(limit=2, link="a"):
    slots = Admission(limit)
    for _ in range(limit):
        assert slots.offer(link)
    return slots


def test_calls_are_accepted_up_to_the_limit_over_all_links_together():
    slots = Admission(limit=2)

    assert [slots.offer("a"), slots.offer("b"), slots.offer("c")] == [True, True, False]
    assert slots.held == 2


def test_a_slot_that_comes_free_while_nobody_waits_is_anybody_s():
    slots = full()

    assert slots.free() == []
    assert slots.offer("b")


def test_a_slot_that_comes_free_is_kept_for_the_link_that_was_refused():
    slots = full()
    assert not slots.owes
    slots.offer("b")
    assert slots.owes

    assert slots.free() == ["b"]
    assert not slots.owes
    assert (slots.held, slots.reserved) == (1, 1)
    assert not slots.offer("a")
    assert slots.offer("b")
    assert (slots.held, slots.reserved) == (2, 0)


def test_there_is_room_for_everybody_while_slots_are_free_and_nobody_waits_for_one():
    slots = Admission(limit=2)
    seen = [slots.room]
    for link in "aab":
        slots.offer(link)
        seen.append(slots.room)
    slots.free()  # kept for "b"
    seen.append(slots.room)
    slots.offer("b")
    slots.free()
    assert [*seen, slots.room] == [2, 1, 0, 0, 0, 1]


def test_there_is_no_room_above_a_limit_that_was_lowered():
    slots = full(limit=2)
    slots.set_limit(1)
    assert slots.room == 0


def test_calls_that_there_is_room_for_are_taken_together():
    slots = Admission(limit=3)
    slots.take("a", 2)
    assert (slots.held, slots.room) == (2, 1)
    slots.take("a", 0)
    assert slots.free(2) == []
    assert (slots.held, slots.room) == (0, 3)


def test_calls_that_are_taken_use_the_grants_of_their_link_first():
    slots = full(limit=3)
    assert not slots.offer("b")
    assert slots.free() == ["b"]
    slots.free()
    assert (slots.held, slots.reserved, slots.room) == (1, 1, 1)
    slots.take("b", 1)
    assert (slots.held, slots.reserved, slots.room) == (2, 0, 1)
    slots.free(2)
    slots.offer("c", want=1), slots.rooms()
    slots.take("a", 1)  # a grant of another's stays
    assert (slots.held, slots.reserved, slots.room) == (2, 1, 0)


def test_slots_that_come_free_together_go_to_those_who_wait_in_turn():
    slots = full(limit=3)
    for link in "bcb":
        assert not slots.offer(link)
    assert slots.free(2) == ["b", "c"]


def test_refused_links_take_turns_however_many_calls_each_lost():
    slots = full(limit=6)
    for link in "bbbbcd":
        assert not slots.offer(link)

    assert [slots.free() for _ in range(6)] == [["b"], ["c"], ["d"], ["b"], ["b"], ["b"]]
    assert slots.reserved == 6


def test_a_granted_call_may_ask_for_more():
    slots = full(limit=1)
    slots.offer("b")
    slots.offer("c")

    assert slots.free() == ["b"]
    assert slots.offer("b", want=2)
    assert slots.rooms() == []  # none is free
    assert [(slots.free(), slots.offer(link)) for link in "cbb"] == [(["c"], True), (["b"], True), (["b"], True)]
    assert slots.free() == []


def test_what_a_call_asks_for_is_granted_at_once_where_slots_are_free():
    slots = Admission(limit=3)

    assert slots.offer("a", want=5)
    assert slots.rooms() == ["a", "a"]
    assert not slots.offer("b")


def test_a_refused_call_that_asks_for_more_is_owed_both():
    slots = full(limit=3)
    slots.offer("b", want=1)

    assert [slots.free() for _ in range(3)] == [["b"], ["b"], []]


def test_nobody_overtakes_a_link_that_is_owed_a_slot():
    slots = Admission(limit=2)
    slots.offer("a", want=1)  # rooms() was not asked for yet

    assert not slots.offer("b")
    assert slots.rooms() == ["a"]


def test_grants_that_are_handed_back_go_to_the_next_in_turn():
    slots = full()
    for link in "bbc":
        slots.offer(link)
    assert slots.free(2) == ["b", "c"]

    assert slots.hand_back("b", 1) == ["b"]
    assert slots.hand_back("b", 1) == []
    assert slots.offer("a")


def test_one_of_several_grants_can_be_handed_back():
    slots = full()
    slots.offer("b", want=1)
    slots.free(), slots.free()

    assert slots.hand_back("b", 1) == []
    assert slots.reserved == 1
    assert slots.offer("b")


def test_handing_back_more_than_is_left_takes_no_slot_from_others():
    slots = full()
    slots.offer("b")
    slots.free()
    assert slots.offer("b")  # was under way before the grant reached its router

    assert slots.hand_back("b", 1) == []
    assert (slots.held, slots.reserved) == (2, 0)


def test_a_link_that_ended_gives_up_its_grants_and_its_turn():
    slots = full()
    for link in "bbc":
        slots.offer(link)
    assert slots.free() == ["b"]

    assert slots.forget("b") == ["c"]
    assert slots.free() == []
    assert slots.forget("unheard of") == []


def test_a_raised_limit_serves_those_who_wait():
    slots = full()
    for link in "bbc":
        slots.offer(link)

    assert slots.set_limit(4) == ["b", "c"]


def test_a_lowered_limit_takes_nothing_back_and_lets_nothing_in():
    slots = full(limit=3)
    slots.offer("b")
    slots.free()

    assert slots.set_limit(1) == []
    assert slots.offer("b")
    assert [slots.free(), slots.free()] == [[], []]
    assert not slots.offer("b")
    assert slots.free() == ["b"]


@given(
    limit=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from(["offer", "free", "back", "forget"]), st.integers(0, 3))),
)
def test_no_steps_exceed_the_limit_or_leave_a_free_slot_while_somebody_is_owed(limit, steps):
    slots = Admission(limit)
    owed, granted = dict.fromkeys(range(4), 0), dict.fromkeys(range(4), 0)
    for what, link in steps:
        rooms = []
        if what == "offer":
            want = link % 3
            had = granted[link] > 0
            accepted = slots.offer(link, want)
            assert accepted or not had
            granted[link] -= had
            owed[link] += want + (not accepted)
            rooms = slots.rooms()
        elif what == "free" and slots.held:
            rooms = slots.free()
        elif what == "back" and granted[link]:
            granted[link] -= 1
            rooms = slots.hand_back(link, 1)
        elif what == "forget":
            owed[link] = granted[link] = 0
            rooms = slots.forget(link)
        for room in rooms:
            owed[room] -= 1
            granted[room] += 1
        assert min(owed.values()) >= 0
        assert slots.reserved == sum(granted.values())
        assert slots.held + slots.reserved <= limit
        assert slots.held + slots.reserved == limit or not any(owed.values())
