"""What goes through memory that both processes share, and what through the socket.

A client that reads slowly keeps the memory that its HTTP answer lies in, though the request is over for the
replica. So only so much is lent to clients at a time; what comes beyond goes in pieces, each as the client
takes the one before, and holds its request's slot meanwhile. A handle's value is kept by whoever called, who
has it in memory either way.

Who lends is wire/segments.py.
"""

from __future__ import annotations

from .spares import MOST

#: A smaller value goes through the socket, and an HTTP answer, which is mapped once for many and costs less to read.
SMALLEST_BYTES = 512 * 1024
SMALLEST_ANSWER_BYTES = 64 * 1024
#: What a replica has lent to clients at most, in no more than MOST pieces: those can all be kept for the next answers.
MOST_BYTES = 64 << 20


def lends_value(size: int, lent: int, count: int) -> bool:
    """Whether a handle's value of `size` bytes is to be lent where `lent` bytes are already, in `count` pieces.

    >>> lends_value(1 << 20, lent=0, count=0), lends_value(1000, lent=0, count=0)
    (True, False)
    """
    return size >= SMALLEST_BYTES


def lends_answer(size: int, lent: int, count: int) -> bool:
    """As `lends_value`, for an HTTP answer.

    >>> lends_answer(1 << 20, lent=0, count=0), lends_answer(1000, lent=0, count=0)
    (True, False)
    >>> lends_answer(1 << 20, lent=MOST_BYTES, count=9), lends_answer(1 << 20, lent=1 << 20, count=MOST)
    (False, False)
    """
    return SMALLEST_ANSWER_BYTES <= size <= MOST_BYTES - lent and count < MOST
