"""The story of one schedule, as it happens: faults, events, what trainers did, what the product logged."""

import logging

from tests.sim.etcd import Change
from tests.sim.faults import Storm
from tests.sim.loop import CURRENT
from tests.sim.trainers import Entry
from tests.sim.world import World

MAX_CHARS = 300


def tell(world: World, storm: Storm) -> None:
    """Print everything about ``world`` from now on."""

    def say(who: str, what: str) -> None:
        what = what.replace(f"{world.folder}", "")  # its name has the number of this process
        print(f"{world.loop.now_s:9.3f}  {who:8s}  {what[:MAX_CHARS]}")

    class ToTrace(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(repr(CURRENT.get()), record.getMessage())

    class Diary(list[Entry]):
        def append(self, entry: Entry) -> None:
            super().append(entry)
            of = entry.of
            if entry.what != "trained" or entry.step % 10 == 0:
                say(entry.node, f"rank {of.rank} g{of.generation} {entry.what} step {entry.step} {entry.detail}")

    def event(change: Change) -> None:
        if change.value is not None and "/events/" in change.key:
            say("LOG", f"r{change.revision} {change.value.decode()}")
        elif change.key.endswith("/leader"):
            say("ETCD", f"r{change.revision} leader {'gone' if change.value is None else change.value.decode()[:40]}")

    log = storm.say

    def struck(what: str) -> None:
        log(what)
        say("FAULT", what)

    storm.say = struck  # type: ignore[method-assign]
    world.diary.entries = Diary()
    world.etcd.on_change.insert(0, event)
    logging.basicConfig(level=logging.INFO, handlers=[ToTrace()], force=True)
    print(f"shape: {world.shape}\nmix: {storm.mix}")
