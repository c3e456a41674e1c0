from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core import framing
from headgate.core.framing import BIG, HEADER_BYTES, MAX_FRAME_BYTES, Framer, pack
from headgate.errors import ProtocolError

SMALL = [
    (framing.CALL, framing.MORE, 4, 1, 30_000, b"metaGET / HTTP/1.1\r\n\r\n"),
    (framing.PING, 0, 0, 0, 0, b""),
    (framing.REPLY, 0, 0, 1, 200, b"x" * 300),
    (framing.CONTROL, framing.HEAD, 2, 2**32 - 1, 2**64 - 1, b"{}"),
]
LARGE = (framing.DATA, framing.STREAM, 0, 7, 9, bytes(range(256)) * 300)


def encode(kind, flags, meta, slot, argument, content):
    return pack(kind, flags, meta, slot, argument, len(content)) + content


def decode(frames):
    return [(*frame[:5], bytes(frame[5][frame[6] : frame[7]])) for frame in frames]


def receive(framer, data):
    """What a link does: into the big buffer where there is one, else feed."""
    frames = []
    while data:
        if framer.expected:
            buffer = framer.big_buffer()
            assert len(buffer) == framer.expected
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            frames += framer.big_filled(count)
        else:
            count = len(data)
            frames += framer.feed(data)
        data = data[count:]
    return frames


STREAM = b"".join(encode(*frame) for frame in SMALL)


def test_the_header_is_20_bytes():
    assert HEADER_BYTES == len(pack(framing.PING, 0, 0, 0, 0, 0)) == 20


def test_types_and_flags_are_as_every_version_knows_them():
    names = "CALL REPLY DATA END CREDIT CANCEL ERROR BUSY ROOM DRAINING FREE TAKEN PING PONG CONTROL"
    assert [getattr(framing, name) for name in names.split()] == [*range(1, 16)]
    flags = "MORE ARENA HEAD STREAM VALUE RESERVE SEGMENT"
    assert [getattr(framing, name) for name in flags.split()] == [1, 2, 4, 8, 16, 32, 64]


def test_frames_that_come_whole_point_into_the_bytes_that_were_fed():
    frames = Framer().feed(STREAM)

    assert decode(frames) == SMALL
    assert all(frame[5] is STREAM for frame in frames)


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_a_stream_may_be_cut_anywhere(cut):
    framer = Framer()

    frames = framer.feed(STREAM[:cut]) + framer.feed(STREAM[cut:])

    assert decode(frames) == SMALL
    framer.finish()


def test_a_stream_may_come_byte_by_byte():
    framer = Framer()

    frames = [frame for place in range(len(STREAM)) for frame in framer.feed(STREAM[place : place + 1])]

    assert decode(frames) == SMALL


frames_of_any_size = st.lists(
    st.builds(
        lambda kind, flags, slot, argument, size: (kind, flags, min(size, 9), slot, argument, b"y" * size),
        st.integers(framing.CALL, framing.CONTROL),
        st.integers(0, 63),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**64 - 1),
        st.sampled_from([0, 1, 19, 20, 21, 500, BIG - 1, BIG, BIG + 1, 3 * BIG]),
    ),
    max_size=6,
)


@given(
    frames=frames_of_any_size,
    cuts=st.lists(st.floats(0, 1), max_size=8),
    how=st.sampled_from([receive, Framer.feed]),
)
def test_any_frames_survive_any_cuts_received_either_way(frames, cuts, how):
    stream = b"".join(encode(*frame) for frame in frames)
    places = sorted({0, len(stream), *(int(cut * len(stream)) for cut in cuts)})
    framer = Framer()

    got = []
    for start, end in pairwise(places):
        got += decode(how(framer, stream[start:end]))

    assert got == frames
    assert framer.expected == 0
    framer.finish()


def test_a_big_frame_that_comes_in_pieces_gets_a_buffer_of_its_own():
    framer = Framer()
    stream = STREAM + encode(*LARGE)

    assert decode(framer.feed(stream[: len(STREAM) + HEADER_BYTES + 100])) == SMALL
    assert framer.expected == len(LARGE[-1]) - 100
    framer.big_buffer()[:1000] = LARGE[-1][100:1100]
    assert framer.big_filled(1000) == []
    [frame] = framer.feed(LARGE[-1][1100:])

    assert decode([frame]) == [LARGE]
    assert isinstance(frame[5], bytearray)
    assert (frame[6], frame[7]) == (0, len(LARGE[-1]))


def test_a_big_frame_may_be_fed_too_and_what_follows_it_is_not_lost():
    framer = Framer()
    stream = encode(*LARGE) + STREAM

    got = decode(framer.feed(stream[: BIG // 2]))
    got += decode(framer.feed(stream[BIG // 2 : BIG // 2 + 10]))
    got += decode(framer.feed(stream[BIG // 2 + 10 :]))

    assert got == [LARGE, *SMALL]


def test_a_big_frame_that_comes_whole_is_not_copied():
    stream = encode(*LARGE)

    [frame] = Framer().feed(stream)

    assert frame[5] is stream


def test_a_frame_of_exactly_big_bytes_is_still_a_small_one():
    framer = Framer()
    stream = encode(framing.DATA, 0, 0, 1, 0, b"z" * BIG)

    assert framer.feed(stream[:100]) == []
    assert framer.expected == 0
    assert len(framer.feed(stream[100:])) == 1


def test_outside_a_big_frame_there_is_no_buffer_to_fill():
    with pytest.raises(AssertionError):
        Framer().big_buffer()
    with pytest.raises(AssertionError):
        Framer().big_filled(1)


@pytest.mark.parametrize("kind", [0, 16, 255])
def test_an_unknown_type_breaks_the_link(kind):
    with pytest.raises(ProtocolError, match=f"type {kind}, .* same version of headgate"):
        Framer().feed(pack(kind, 0, 0, 0, 0, 0))


def test_a_length_over_the_limit_breaks_the_link_before_memory_is_taken():
    with pytest.raises(ProtocolError, match=f"the limit is {MAX_FRAME_BYTES}"):
        Framer().feed(pack(framing.DATA, 0, 0, 0, 0, MAX_FRAME_BYTES + 1))


def test_more_meta_than_frame_breaks_the_link():
    with pytest.raises(ProtocolError, match="5 bytes of meta in 4 bytes"):
        Framer().feed(pack(framing.CALL, 0, 5, 0, 0, 4))


@pytest.mark.parametrize("cut", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 3])
def test_an_end_inside_a_small_frame_is_an_error(cut):
    framer = Framer()
    framer.feed(encode(*SMALL[0])[:cut])

    with pytest.raises(ProtocolError, match=r"ended inside a frame: .* were missing"):
        framer.finish()


def test_an_end_inside_a_big_frame_is_an_error_that_says_how_far_it_came():
    framer = Framer()
    framer.feed(encode(*LARGE)[: HEADER_BYTES + 5])

    with pytest.raises(ProtocolError, match=f"5 of {len(LARGE[-1])} bytes had come"):
        framer.finish()


def test_it_is_between_frames_where_the_next_byte_begins_one():
    framer = Framer()
    for content in (b"", bytes(BIG + 1)):
        frame = framing.pack(framing.DATA, 0, 0, 1, 0, len(content)) + content
        assert framer.is_between
        framer.feed(frame[:-1])
        assert not framer.is_between
        framer.feed(frame[-1:])

    assert framer.is_between


def test_an_end_between_frames_is_none():
    framer = Framer()
    framer.feed(STREAM)
    framer.finish()
