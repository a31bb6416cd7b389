"""What a job's state means, as a digest that only changes when old logs are read differently.

A field that stands at its default is left out, so that a state which gained a field with a default means what it
meant. What counts is everything else: every value of the state, those inside its records included, by name.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from dtrain.common.names import JobName
from dtrain.coordinator.codec import event_key
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.states import JobState
from dtrain.coordinator.history import ChainReader
from dtrain.etcd.client import KeyValue

LOGS = Path(__file__).with_name("logs")
PREFIX = "/dtrain"
DIGEST_DIGITS = 16


def meaning(value: Any) -> Any:
    """Return ``value`` as plain JSON, without what stands at its default."""
    if is_dataclass(value) and not isinstance(value, type):
        said = {field.name: (field, getattr(value, field.name)) for field in fields(value)}
        return {name: meaning(found) for name, (field, found) in said.items() if not _is_default(field, found)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): meaning(found) for key, found in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [meaning(found) for found in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value


def _is_default(field: "Field[Any]", value: Any) -> bool:
    if field.default is not MISSING:
        return bool(field.default == value)
    return field.default_factory is not MISSING and bool(field.default_factory() == value)


def digest(state: JobState) -> str:
    text = json.dumps(meaning(state), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]


def log_paths() -> list[Path]:
    return sorted(LOGS.glob("*.jsonl"))


def job_of(values: list[bytes]) -> JobName:
    """The job of a log, as its first event names it."""
    return JobName(json.loads(values[0])["data"]["spec"]["name"])


def states_of(values: list[bytes]) -> list[tuple[str, JobState]]:
    """Type of each event, and the state after it, as a coordinator that replays the log has it."""
    job = job_of(values)
    reader = ChainReader(PREFIX, job)
    state: JobState | None = None
    found = []
    for number, value in enumerate(values, start=1):
        key = event_key(PREFIX, job, number)
        event = reader.read(
            KeyValue(key=key, value=value, create_revision=number, mod_revision=number, version=1, lease=0)
        )
        state = evolve(state, event)
        found.append((event.type, state))
    return found


def digest_lines(values: list[bytes]) -> list[str]:
    """What is stored beside a log: for each prefix its length, its last event's type and the state's digest."""
    return [f"{n} {kind} {digest(state)}" for n, (kind, state) in enumerate(states_of(values), start=1)]
