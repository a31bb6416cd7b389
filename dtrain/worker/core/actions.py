"""Everything the machine can ask of the shell.

Two kinds: entries for the journal, and acts upon the world. In every list the entries come first; the shell
writes them in one transaction and waits for the disk before it performs the first act. So whatever was done to
the world, the journal knows why. Every act is idempotent: after a crash it is asked again.
"""

from dataclasses import dataclass

from dtrain.common.names import Generation, JobName, Term
from dtrain.worker.core.states import Assignment, CheckpointRequest, CommandRecord, ShardAttempt, TrainersSpec

# ---- entries for the journal ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalTerm:
    term: Term


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalCommand:
    record: CommandRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalAssignment:
    """The job's generation, spec, stop, newest attempt, restore and position; its ranks as they are."""

    assignment: Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRetired:
    """A rank of an older generation is gone."""

    job: JobName
    generation: Generation
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalShard:
    """Storage confirmed this shard."""

    job: JobName
    generation: Generation
    shard: ShardAttempt


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalForgotten:
    """The job is over and was pushed out by newer ones."""

    job: JobName


# ---- acts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareFolders:
    """Make the generation's folders, mailboxes and keeper files. Answered by FoldersReady or FoldersFailed."""

    job: JobName
    generation: Generation
    spec: TrainersSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnTrainer:
    """Start the rank's keeper unless it was ever started; otherwise watch the running one or report the exit."""

    job: JobName
    generation: Generation
    rank: int
    start: bool = True  # False: it is being ended, so if it was never started it never will be
    rendezvous_port: int = 0  # where this rank will listen; the agent lets go of it if it holds it


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTrainers:
    """End every running trainer of this generation: SIGTERM, and SIGKILL after the grace; 0: SIGKILL at once."""

    job: JobName
    generation: Generation
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AskStage:
    job: JobName
    generation: Generation
    rank: int
    word: int  # packed (attempt, step) for the mailbox
    committed_attempt: int = 0  # whose staged bytes must not be written over; 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Send the staged bytes to storage. Answered by UploadDone or UploadFailed."""

    job: JobName
    generation: Generation
    rank: int
    request: CheckpointRequest
    slot: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRestore:
    """Bring every local rank's shard. Answered by RestoreReady or RestoreDamaged, or not while storage is away."""

    job: JobName
    generation: Generation
    spec: TrainersSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRestore:
    """Tell the rank that its shard is ready."""

    job: JobName
    generation: Generation
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveRestore:
    """The rank trains, so it has read its shard: give the shared memory back."""

    job: JobName
    generation: Generation
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTransfers:
    """Give up the uploads and the restore of a generation: nobody waits for them any more."""

    job: JobName
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanGeneration:
    """Remove the generation's folders in shared memory. The job's stage slots stay for its next generation."""

    job: JobName
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveArena:
    """The job has left this node: give back the memory of its stage slots."""

    job: JobName


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeStack:
    """Find out where the rank stands. Answered by StackTaken."""

    job: JobName
    generation: Generation
    rank: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendSnapshot:
    """Something changed that the coordinator should not wait a heartbeat for."""


JournalEntry = JournalTerm | JournalCommand | JournalAssignment | JournalRetired | JournalShard | JournalForgotten
Act = (
    PrepareFolders
    | SpawnTrainer
    | EndTrainers
    | AskStage
    | Upload
    | FetchRestore
    | OpenRestore
    | RemoveRestore
    | DropTransfers
    | CleanGeneration
    | RemoveArena
    | TakeStack
    | SendSnapshot
)
Action = JournalEntry | Act
JOURNAL_ENTRIES = (JournalTerm, JournalCommand, JournalAssignment, JournalRetired, JournalShard, JournalForgotten)
