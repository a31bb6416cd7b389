"""The mailbox: one page of shared memory between a worker and one of its trainers.

The training loop must pay nothing for being supervised, so progress and checkpoint requests are single
aligned 64-bit stores and loads in memory that both processes map; there is no call, no lock and no wake-up
on the training path. Each word has exactly one writer. A value that needs two numbers (an attempt and its
step) is packed into one word, so that a reader can never see half of it. The two JSON regions are guarded by
a sequence word: odd while being written, changed when done. Each stage slot has a word that says whose state it
holds, and that is 0 while the slot is written: attempts never come twice, so whoever finds the same word before
and after it read the slot has read that state and nothing else.

The file lives in shared memory and outlives both processes, so a restarted worker reads on where it left.
"""

import json
from enum import IntEnum

MAILBOX_BYTES = 8192
PAIR_SLOTS = 2  # one is staged into while the other is uploaded, or kept as the newest committed state
STAGE_SLOTS = 2 * PAIR_SLOTS  # a pair in shared memory, and one in files, used where memory is too small
_MAGIC = 0x6474_7261_696E_0001  # "dtrain", layout 1
_STEP_BITS = 40
_STEP_MASK = (1 << _STEP_BITS) - 1
ATTEMPT_MAX = (1 << 24) - 1
_JSON_RETRIES = 64  # a reader gives up after this many torn reads and keeps what it had


class TrainerPhase(IntEnum):
    """What a trainer says it is doing."""

    STARTING = 0  # the process runs, the script has not called join()
    JOINED = 1  # join() returned; the process group is up
    RESTORING = 2  # waiting for, or loading, the checkpoint it starts from
    TRAINING = 3  # between step boundaries
    CHECKPOINTING = 4  # copying its state into shared memory
    FINISHED = 5  # all steps done, the script is leaving
    HOLDING = 6  # all steps done; waits for its last state to be asked for
    PAUSED = 7  # in ``run.paused()``: what is no step, and may take as long as it likes
    LEFT = 8  # after a loop that was left early: the same, and the steps may be over, or another loop take them up


class RestoreState(IntEnum):
    """What the worker says about the checkpoint this trainer starts from."""

    PENDING = 0  # the worker is still fetching or verifying
    NOTHING = 1  # the job starts from step 0
    READY = 2  # verified bytes lie in the stage folder


def pack(attempt: int, step: int) -> int:
    """Pack an attempt (1 to 2**24-1) and a step (0 to 2**40-1) into one 64-bit word. 0 means none."""
    if not 0 < attempt <= ATTEMPT_MAX or not 0 <= step <= _STEP_MASK:
        raise ValueError(f"attempt {attempt} or step {step} out of range")
    return attempt << _STEP_BITS | step


def unpack(word: int) -> tuple[int, int]:
    """Return (attempt, step) of a packed word; (0, 0) means none."""
    return word >> _STEP_BITS, word & _STEP_MASK


class _Word(IntEnum):
    MAGIC = 0
    # written by the worker
    REQUEST = 8  # packed: stage at the end of exactly this step
    RESTORE = 9  # RestoreState
    STAGE_SLOT = 10  # 1 + the slot that REQUEST goes to; 0: the one of the first pair not staged into last
    SLOT_BYTES = 11  # both slots of the pair have this many bytes allocated; 0 while the worker has allocated none
    SLOT_PAIR = 12  # the pair's first slot
    # written by the trainer
    PHASE = 16
    COMPLETED_STEP = 17
    UNTIL_STEP = 18  # the last step the script will run; 0 while unknown
    TRACKING = 19  # 1 once the script tracks state and so can be checkpointed
    STAGED = 20  # packed: state of this step lies in STAGED_SLOT
    STAGED_SLOT = 21
    STAGED_BYTES = 22
    MISSED = 23  # packed request whose step had already passed
    STAGE_FAILED = 24  # packed request whose state could not be stored; the error region says why
    STALL_NS = 25  # time the last staging held the training loop
    STEP_NS = 26  # duration of the last step, staging not counted
    NEEDED_BYTES = 27  # what each slot should have; 0 while unknown
    SLOT_HOLDS = 28  # to 31, one a slot: packed request whose state lies there whole; 0 while it is written
    METRICS_SEQ = 32
    METRICS_LEN = 33
    ERROR_SEQ = 34
    ERROR_LEN = 35
    READ_BYTES = 36  # of what it starts from, read by the trainer itself
    TO_READ_BYTES = 37  # 0: nothing


_METRICS_AT, _METRICS_MAX = 1024, 3072
_ERROR_AT, _ERROR_MAX = 4096, 4096


class Mailbox:
    """Typed access to the page. ``buffer`` is a writable buffer of MAILBOX_BYTES (an mmap, or bytes in tests)."""

    def __init__(self, buffer: object, *, create: bool = False) -> None:
        self._bytes = memoryview(buffer)  # type: ignore[arg-type]
        if len(self._bytes) < MAILBOX_BYTES:
            raise ValueError(f"a mailbox has {MAILBOX_BYTES} bytes, not {len(self._bytes)}")
        self._words = self._bytes[:512].cast("Q")
        if create:
            self._words[_Word.MAGIC] = _MAGIC
        elif self._words[_Word.MAGIC] != _MAGIC:
            raise ValueError("not a mailbox of this version of dtrain")

    def close(self) -> None:
        """Release the buffer so that its mmap can be closed."""
        self._words.release()
        self._bytes.release()

    # -- the worker writes, the trainer reads --------------------------------------------------

    @property
    def request(self) -> int:
        """Packed (attempt, step) the worker asks for; 0 for none."""
        return self._words[_Word.REQUEST]

    @request.setter
    def request(self, word: int) -> None:
        self._words[_Word.REQUEST] = word

    def ask(self, word: int, *, slot: int) -> None:
        """Ask for a packed (attempt, step) to be staged into ``slot``; the request is published last."""
        self._words[_Word.STAGE_SLOT] = slot + 1
        self._words[_Word.REQUEST] = word

    @property
    def stage_slot(self) -> int | None:
        """The slot that the request goes to; None: the trainer chooses one."""
        slot = self._words[_Word.STAGE_SLOT]
        return slot - 1 if 0 < slot <= STAGE_SLOTS else None

    @property
    def slots(self) -> tuple[int, int]:
        """(first slot, bytes) of the pair that the worker has allocated; the bytes are 0 while there is none."""
        size_bytes = self._words[_Word.SLOT_BYTES]
        return min(self._words[_Word.SLOT_PAIR], STAGE_SLOTS - PAIR_SLOTS), size_bytes

    def publish_slots(self, first: int, size_bytes: int) -> None:
        """Say that the pair of slots from ``first`` on has this many bytes each; the bytes are published last."""
        self._words[_Word.SLOT_PAIR] = first
        self._words[_Word.SLOT_BYTES] = size_bytes

    @property
    def restore(self) -> RestoreState:
        return RestoreState(self._words[_Word.RESTORE])

    @restore.setter
    def restore(self, state: RestoreState) -> None:
        self._words[_Word.RESTORE] = state

    # -- the trainer writes, the worker reads --------------------------------------------------

    @property
    def phase(self) -> TrainerPhase:
        return TrainerPhase(self._words[_Word.PHASE])

    @phase.setter
    def phase(self, phase: TrainerPhase) -> None:
        self._words[_Word.PHASE] = phase

    @property
    def completed_step(self) -> int:
        return self._words[_Word.COMPLETED_STEP]

    @completed_step.setter
    def completed_step(self, step: int) -> None:
        self._words[_Word.COMPLETED_STEP] = step

    @property
    def until_step(self) -> int:
        return self._words[_Word.UNTIL_STEP]

    @until_step.setter
    def until_step(self, step: int) -> None:
        self._words[_Word.UNTIL_STEP] = step

    @property
    def tracking(self) -> bool:
        return bool(self._words[_Word.TRACKING])

    @tracking.setter
    def tracking(self, value: bool) -> None:
        self._words[_Word.TRACKING] = int(value)

    @property
    def staged(self) -> tuple[int, int, int]:
        """(packed word, slot, bytes) of the newest staged state; the word is published last."""
        word = self._words[_Word.STAGED]
        return word, self._words[_Word.STAGED_SLOT], self._words[_Word.STAGED_BYTES]

    def begin_staging(self, slot: int) -> None:
        """Say that ``slot`` is about to be written: what it held is gone."""
        self._words[_Word.SLOT_HOLDS + slot] = 0

    def slot_holds(self, slot: int) -> int:
        """The packed word of the state that lies whole in ``slot``; 0 for none."""
        return self._words[_Word.SLOT_HOLDS + slot] if 0 <= slot < STAGE_SLOTS else 0

    @property
    def needed_bytes(self) -> int:
        """What the trainer wants each slot to have; 0 while it does not know."""
        return self._words[_Word.NEEDED_BYTES]

    @needed_bytes.setter
    def needed_bytes(self, size_bytes: int) -> None:
        self._words[_Word.NEEDED_BYTES] = size_bytes

    def publish_staged(self, word: int, *, slot: int, size_bytes: int) -> None:
        self._words[_Word.SLOT_HOLDS + slot] = word
        self._words[_Word.STAGED_SLOT] = slot
        self._words[_Word.STAGED_BYTES] = size_bytes
        self._words[_Word.STAGED] = word

    @property
    def reading(self) -> tuple[int, int]:
        """(bytes read, bytes in all) of what the trainer reads itself of the checkpoint it starts from."""
        return self._words[_Word.READ_BYTES], self._words[_Word.TO_READ_BYTES]

    def publish_reading(self, done_bytes: int, total_bytes: int) -> None:
        self._words[_Word.READ_BYTES] = done_bytes
        self._words[_Word.TO_READ_BYTES] = total_bytes

    @property
    def missed(self) -> int:
        return self._words[_Word.MISSED]

    @missed.setter
    def missed(self, word: int) -> None:
        self._words[_Word.MISSED] = word

    @property
    def stage_failed(self) -> int:
        return self._words[_Word.STAGE_FAILED]

    @stage_failed.setter
    def stage_failed(self, word: int) -> None:
        self._words[_Word.STAGE_FAILED] = word

    @property
    def stall_ns(self) -> int:
        return self._words[_Word.STALL_NS]

    @stall_ns.setter
    def stall_ns(self, value: int) -> None:
        self._words[_Word.STALL_NS] = value

    @property
    def step_ns(self) -> int:
        return self._words[_Word.STEP_NS]

    @step_ns.setter
    def step_ns(self, value: int) -> None:
        self._words[_Word.STEP_NS] = value

    @property
    def metrics(self) -> dict[str, float | str]:
        """The newest metrics that the script reported."""
        text = self._read_region(_Word.METRICS_SEQ, _Word.METRICS_LEN, _METRICS_AT)
        return json.loads(text) if text else {}

    @metrics.setter
    def metrics(self, values: dict[str, float | str]) -> None:
        text = json.dumps(values).encode()
        if len(text) > _METRICS_MAX:
            raise ValueError(f"metrics take {len(text)} bytes as JSON; at most {_METRICS_MAX} fit")
        self._write_region(_Word.METRICS_SEQ, _Word.METRICS_LEN, _METRICS_AT, text)

    @property
    def error(self) -> str:
        """What the trainer says went wrong, empty if nothing."""
        return self._read_region(_Word.ERROR_SEQ, _Word.ERROR_LEN, _ERROR_AT).decode(errors="replace")

    @error.setter
    def error(self, text: str) -> None:
        self._write_region(_Word.ERROR_SEQ, _Word.ERROR_LEN, _ERROR_AT, text.encode(errors="replace")[:_ERROR_MAX])

    def _write_region(self, seq: _Word, length: _Word, at: int, text: bytes) -> None:
        before = self._words[seq] & ~1  # a writer that died half-way left it odd
        self._words[seq] = before + 1
        self._bytes[at : at + len(text)] = text
        self._words[length] = len(text)
        self._words[seq] = before + 2

    def _read_region(self, seq: _Word, length: _Word, at: int) -> bytes:
        for _ in range(_JSON_RETRIES):
            before = self._words[seq]
            text = bytes(self._bytes[at : at + min(self._words[length], _ERROR_MAX)])
            if before % 2 == 0 and self._words[seq] == before:
                return text
        return b""
