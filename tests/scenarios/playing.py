"""Plays a scenario: a text of commands, each followed by the trace that it must give.

    # a comment
    > joins w1
    > submits every_steps=100
    JobSubmitted (client_request)
    GenerationStarted (...) generation=1
    + w1: mnist/g1/start

A command is a verb of the words in tests/coordinator/support/clusters.py, what it is about, and options. After each
the leader decides until it agrees with the facts. The trace names the events that were appended, then what is owed
to workers and to storage from now on (+) or not any more (-). Of an event it shows what tells the story, not every
field, so that events may gain fields without a change here.
"""

from collections.abc import Callable
from typing import Any

from dtrain.common.errors import UserError
from dtrain.common.packs import Pack, packs_prefix
from dtrain.common.specs import RetentionPolicy
from dtrain.coordinator.core.effects import DeleteAttempt, DeletePacks, Effect, ReadMarkers, WriteManifest, WriteMarker
from dtrain.coordinator.core.facts import RestorePhase, ShardPhase
from tests.coordinator.support.clusters import DIGEST, JOB, Cluster, spec

COMMAND = "> "
SHOWN = (
    *("generation", "world_size", "checkpoint", "attempt", "step", "counted", "missed", "reason", "exit_code"),
    *("culprit", "cleared"),
)
SHOWN_IF_SET = ("base", "suspect", "keys")


class Player:
    """One scenario as it is played."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._told = 0  # events that the trace has
        self._owed: set[str] = set()

    def play(self, line: str) -> list[str]:
        """Do what the command says; return its trace."""
        verb, *rest = line.split()
        given = [_value(word) for word in rest if "=" not in word]
        options = {name: _value(value) for name, _, value in (word.partition("=") for word in rest if "=" in word)}
        trace = []
        try:
            self._do(verb, given, options)
        except UserError as error:
            trace.append(f"refused: {error}")
        self._cluster.decides()
        for record, _ in self._cluster.log[self._told :]:
            said = [f"{name}={found}" for name in SHOWN if (found := getattr(record.event, name, None)) is not None]
            said += [f"{name}={found}" for name in SHOWN_IF_SET if (found := getattr(record.event, name, None))]
            point = getattr(record.event, "restore", None)
            said += [f"from checkpoint {point.checkpoint}"] if point is not None else []
            trace.append(" ".join([f"{record.type} ({record.cause.fact})", *said]))
        self._told = len(self._cluster.log)
        owed = self._owes()
        trace += [f"- {text}" for text in sorted(self._owed - owed)]
        trace += [f"+ {text}" for text in sorted(owed - self._owed)]
        self._owed = owed
        return trace

    def _do(self, verb: str, given: list[Any], options: dict[str, Any]) -> None:
        cluster = self._cluster
        match verb:
            case "submits":
                keep_last = options.pop("keep_last", 0)
                retention = RetentionPolicy(keep_last=keep_last)
                cluster.submits(spec(**options, retention=retention), request=f"request {self._told}")
            case "fails_over":
                self._cluster = cluster.fails_over()
                self._owed = set()
            case "shard":
                rank, phase = given
                made_in = options.pop("pack_of_attempt", 0)
                packs = (_pack(made_in, rank),) if made_in else ()
                cluster.shard(rank, ShardPhase(phase), packs=packs, **options)
            case "restore_is":
                (phase,) = given
                cluster.restore_is(RestorePhase(phase), **options)
            case _:
                assert not verb.startswith("_")
                act: Callable[..., None] = getattr(cluster, verb)
                act(*given, **options)

    def _owes(self) -> set[str]:
        owed = set()
        for name in self._cluster.jobs:
            for worker in self._cluster.nodes:
                owed |= {f"{worker}: {command.id}" for command in self._cluster.commands(worker, name)}
            owed |= {f"storage: {_words(effect)}" for effect in self._cluster.owes(name)}
        return owed


def _words(effect: Effect) -> str:
    match effect:
        case WriteManifest():
            return f"the manifest of attempt {effect.inflight.attempt}"
        case WriteMarker():
            return f"the marker of checkpoint {effect.checkpoint.number}"
        case ReadMarkers():
            return f"markers of {effect.job} to read"
        case DeleteAttempt():
            return f"attempt {effect.attempt} to delete"
        case DeletePacks():
            return f"{len(effect.packs)} packs to delete, by event {effect.expired}"


def _pack(attempt: int, rank: int) -> Pack:
    return Pack(key=f"{packs_prefix(JOB, attempt)}rank-{rank}", size_bytes=100, digest=DIGEST)


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"yes": True, "no": False}.get(word, word.replace("_", " "))


def played(text: str) -> str:
    """Return the scenario with the trace that it gives now. Comments and empty lines stay where they are."""
    player = Player()
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(COMMAND):
            lines.append(line)
            lines += player.play(line.removeprefix(COMMAND))
        elif not line.strip() or line.startswith("#"):
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)
