"""Histories: made from a seed, played, cut down to what still fails, and written as a scenario file.

A history is a list of commands (sim_world.World.do) whose first line names the seed of everything else that
chance decides: `simulation 4711 nodes=1 clients=2 slow_s=0.0005`. So it can be edited by hand, and one that was
cut down fails in the same way. What a file says below each line of dashes is what happened, and REWRITE=1 renews it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from msgspec import Struct
from simulation.sim_loop import NeverAtRest
from simulation.sim_world import World, play

from headgate.controller.failpoints import POINTS

DASHES = "----"
FIRST = "simulation"


class Played(Struct):
    """What became of a history: all that was said, and the rules that were broken."""

    said: list[str]
    broken: list[str]
    answers: dict[str, int]
    steps: int
    virtual_s: float

    def rules(self) -> set[str]:
        """The names of the rules that were broken."""
        return {line.split(" ", 1)[1].split(":")[0] for line in self.broken}


# --- from a seed ---


class _Maker:
    """Writes one history."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(f"{seed} history")
        self._seed = seed
        self._lines: list[str] = []
        self._users = 0

    def make(self) -> list[str]:
        chance = self._chance
        self._clients = ["c1"] if chance.random() < 0.5 else ["c1", "c2"]
        nodes = 2 if chance.random() < 0.2 else 1
        slow_s = chance.choice([0.0, 0.0003, 0.0003, 0.003])
        self._lines.append(f"{FIRST} {self._seed} nodes={nodes} clients={len(self._clients)} slow_s={slow_s}")
        self._tags = ["iris", "rose"][: chance.choice([1, 1, 2])]
        kinds = ["async", "async", "plain", "async-batch", "plain-batch"]
        self._kinds = {tag: chance.choice(kinds) for tag in self._tags}
        for tag in self._tags:
            self._create(tag)
        self._wait(0.6)
        self._lines.append(f"endpoint e {self._tags[0]}")
        self._wait(0.05)
        for _ in range(chance.randint(8, 22)):
            chance.choice(self._choices())()
            self._wait(chance.choice([0.0, 0.0, 0.01, 0.05, 0.2, 0.4, chance.uniform(0.0, 0.6)]))
        if chance.random() < 0.3:
            self._wait(4.0)
        self._lines.append("mend")
        return self._lines

    def _choices(self) -> list[object]:  # as often as each shall come
        return [
            *[self._ask] * 10,
            *[self._die] * 3,
            *[self._update] * 3,
            *[self._config] * 3,
            *[self._controller] * 3,
            self._freeze, self._thaw, self._cut, self._cut_control, self._brittle, self._traffic, self._traffic,
            self._shadow, self._delete, self._proxy, self._disk, self._again,
        ]  # fmt: skip

    def _wait(self, seconds: float) -> None:
        if seconds:
            self._lines.append(f"wait {seconds:.3f}")

    def _tag(self) -> str:
        return self._chance.choice(self._tags)

    def _fields(self, tag: str) -> str:
        chance = self._chance
        fields = [f"num_replicas={chance.choice([1, 1, 2, 2, 3])}"]
        if chance.random() < 0.7:
            fields.append(f"max_concurrent_queries={chance.choice([1, 2, 3, 5])}")
        if chance.random() < 0.3:
            fields.append(f"max_queued_requests={chance.choice([0, 1, 3, 10])}")
        if chance.random() < 0.2:
            fields.append(f"request_timeout_s={chance.choice([0.1, 0.5, 3.0])}")
        if chance.random() < 0.2:
            fields.append(f"graceful_shutdown_timeout_s={chance.choice([0.1, 2.0])}")
        if chance.random() < 0.2:
            fields.append("health_check_timeout_s=2.0")
        if "batch" in self._kinds[tag]:
            fields.append(f"max_batch_size={chance.choice([1, 2, 4])}")
            fields.append(f"batch_wait_timeout={chance.choice([0.0, 0.005, 0.05])}")
        return " ".join(fields)

    def _by(self) -> str:
        by = self._chance.choice(self._clients)
        return "" if by == "c1" else f" by={by}"

    def _create(self, tag: str) -> None:
        idempotent = " idempotent=1" if self._chance.random() < 0.15 else ""
        self._lines.append(f"create {tag} kind={self._kinds[tag]} {self._fields(tag)}{idempotent}")

    def _ask(self) -> None:
        chance = self._chance
        who = chance.choice(["proxy", *self._clients])
        line = f"ask {who} e {chance.choice([1, 3, 6, 12, 20])} work={chance.choice([0.0, 0.005, 0.02, 0.1, 0.5])}"
        for name, values, share in (
            ("every", [0.001, 0.01, 0.05], 0.5),
            ("deadline", [0.02, 0.1, 1.0], 0.2),
            ("cancel", [0.0, 0.001, 0.02, 0.1], 0.2),
            ("mode", ["raise"], 0.1),
            ("size", ["big"], 0.1),
        ):
            if chance.random() < share:
                line += f" {name}={chance.choice(values)}"
        self._lines.append(line)

    def _die(self) -> None:
        self._lines.append(f"die {self._tag()} {self._chance.randrange(4)}")

    def _update(self) -> None:
        tag = self._tag()
        kind = self._chance.choice([self._kinds[tag]] * 4 + ["raise"])
        fields = f" {self._fields(tag)}" if self._chance.random() < 0.3 else ""
        self._lines.append(f"update {tag} kind={kind}{fields}{self._by()}")

    def _config(self) -> None:
        tag = self._tag()
        line = f"config {tag} {self._fields(tag)}{self._by()}"
        if self._chance.random() < 0.3:
            self._users += 1
            line += f" user={self._chance.choice(['raise', f'u{self._users}', f'u{self._users}'])}"
        self._lines.append(line)

    def _controller(self) -> None:
        chance = self._chance
        what = chance.random()
        if what < 0.65:
            self._lines.append(f"trap {chance.choice(sorted(POINTS))} {chance.choice([1, 1, 1, 2, 3])}")
        elif what < 0.9:
            self._lines.append(f"kill_controller {chance.choice([0.0, 0.02, 0.5, 1.5])}")
        else:
            self._lines.append("freeze_controller")

    def _freeze(self) -> None:
        what = self._chance.choice([self._tag(), self._tag(), "c1"])
        self._lines.append(f"freeze {what} {self._chance.randrange(4)}")

    def _thaw(self) -> None:
        self._wait(self._chance.choice([0.0, 1.0, 2.5, 4.0]))
        self._lines.append("thaw")

    def _cut(self) -> None:
        who = self._chance.choice(["proxy", *self._clients])
        self._lines.append(f"cut {who} {self._tag()} {self._chance.randrange(4)}")

    def _cut_control(self) -> None:
        self._lines.append(f"cut_control {self._chance.choice(self._clients)}")

    def _brittle(self) -> None:
        self._lines.append(f"brittle {self._tag()} {self._chance.choice([1, 2, 5])}")

    def _traffic(self) -> None:
        if len(self._tags) == 1:
            self._ask()
            return
        share = self._chance.choice([0.0, 0.5, 0.5, 1.0])
        self._lines.append(f"traffic e iris={share} rose={1.0 - share}{self._by()}")

    def _shadow(self) -> None:
        self._lines.append(f"shadow e {self._tag()} {self._chance.choice([0.0, 0.5, 1.0])}{self._by()}")

    def _delete(self) -> None:
        chance = self._chance
        tag = self._tag()
        if chance.random() < 0.6:
            self._lines.append("drop e")
        self._lines.append(f"delete {tag}{chance.choice(['', '', ' force=1'])}{self._by()}")
        self._wait(chance.choice([0.0, 0.1, 1.0]))
        self._create(tag)
        self._wait(chance.choice([0.0, 0.5]))
        self._lines.append(f"endpoint e {tag}")

    def _proxy(self) -> None:
        self._lines.append(self._chance.choice(["die_proxy", "freeze_proxy"]))

    def _disk(self) -> None:
        self._lines.append(f"disk {self._chance.choice(['full', 'free'])}")

    def _again(self) -> None:
        """Two changes at once."""
        self._update()
        self._chance.choice([self._config, self._update, self._traffic, self._die])()


def history(seed: int) -> list[str]:
    """The commands of a seed."""
    return _Maker(seed).make()


# --- playing ---


def _world(first: str) -> World:
    word, seed, *options = first.split()
    assert word == FIRST, f"a simulation begins with {FIRST!r}, not {word!r}"
    named = dict(option.split("=") for option in options)
    return World(
        int(seed),
        nodes=int(named.get("nodes", 1)),
        clients=int(named.get("clients", 1)),
        slow_s=float(named.get("slow_s", 0.0003)),
    )


def perform(lines: list[str]) -> Played:
    """Play a history."""
    world = _world(lines[0])

    def act() -> None:
        try:
            for line in lines[1:]:
                world.do(line)
        except NeverAtRest as error:
            world.rules.breaks("no bugs", str(error))

    play(world, act)
    return Played(world.said, world.rules.broken, dict(world.rules.answers), world.clock.steps, world.time())


def outcome(blocks: list[list[str]]) -> list[list[str]]:
    """What happens in each block of a history: the first block's first line is the `simulation`."""
    first = next(line for line in blocks[0] if line.startswith(FIRST))
    world = _world(first)
    found: list[list[str]] = []

    def act() -> None:
        for block in blocks:
            said, broken = len(world.said), len(world.rules.broken)
            for line in block:
                if not line.startswith("# ") and line is not first:
                    world.do(line)
            answers = world.answers()
            found.append(
                [
                    *world.said[said:],
                    *([f"answers: {answers}"] if answers else []),
                    *(f"BROKEN {line}" for line in world.rules.broken[broken:]),
                ]
            )

    play(world, act)
    return found


# --- failing ---


def shrink(lines: list[str], rules: set[str], tries: int = 400) -> list[str]:
    """A shorter history that breaks one of the same rules: commands are left out while it does."""
    first, rest = lines[0], lines[1:]
    size = max(1, len(rest) // 2)
    while size and tries > 0:
        at = 0
        while at < len(rest) and tries > 0:
            shorter = rest[:at] + rest[at + size :]
            tries -= 1
            if _breaks([first, *shorter], rules):
                rest = shorter
            else:
                at += size
        size //= 2
    for at, line in enumerate(rest):  # fewer requests
        for other in _smaller(line):
            if tries > 0 and _breaks([first, *rest[:at], other, *rest[at + 1 :]], rules):
                rest[at] = other
                break
            tries -= 1
    return [first, *rest]


def _breaks(lines: list[str], rules: set[str]) -> bool:
    try:
        return bool(perform(lines).rules() & rules)
    except Exception:  # noqa: BLE001 - what is left makes no sense any more
        return False


def _smaller(line: str) -> Iterator[str]:
    words = line.split()
    if words[0] == "ask":
        for count in ("1", "3", "6"):
            if int(count) < int(words[3]):
                yield " ".join([*words[:3], count, *words[4:]])


def scenario(lines: list[str], about: list[str]) -> str:
    """A history as a file for tests/scenarios/: commands in blocks, and below each what follows."""
    blocks: list[list[str]] = [[lines[0]]]
    for line in lines[1:]:
        blocks[-1].append(line)
        if line.startswith(("wait", "mend")):
            blocks.append([])
    blocks = [block for block in blocks if block]
    text = []
    for block, said in zip(blocks, outcome(blocks), strict=True):
        text.append("\n".join([*block, DASHES, *(said or ["nothing"])]))
    comments = "".join(f"# {line}\n" for line in about)
    return comments + "\n\n".join(text) + "\n"
