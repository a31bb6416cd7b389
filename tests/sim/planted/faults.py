"""The planted faults: each one place of the product's text, and what it becomes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Planted:
    name: str
    file: str  # under dtrain/
    old: str  # there exactly once
    new: str


_CHECKPOINTS = "coordinator/core/checkpoints.py"
_EFFECTS = "coordinator/effects.py"
_RETENTION = "coordinator/core/retention.py"
_PLACEMENT = "coordinator/core/placement.py"
_PACKS = "coordinator/core/packs.py"
_LOG = "coordinator/log.py"

PLANTED = (
    Planted("skip the compare of the term", _LOG,
            "compares = [create_revision_is(self._leadership.key, self.term)]", "compares = []"),
    Planted("act before the append", "coordinator/loop.py",
            "await self._log.append(this.entries)", "asyncio.ensure_future(self._log.append(this.entries))"),
    Planted("take a lost answer for a success", _LOG,
            'logger.warning("append of %s is not confirmed: %s", batch[0].record.key, error)', "return"),
    Planted("try an append again without a compare", _LOG,
            "compares += [absent(entry.record.key) for entry in firsts.values()]", "compares += []"),
    Planted("take the leader key from whoever has it", "coordinator/election.py",
            "client.txn([absent(key)], [put(key, value, lease=lease.id)])",
            "client.txn([], [put(key, value, lease=lease.id)])"),
    Planted("accept an older attempt's ack", _CHECKPOINTS,
            "if shard.attempt == inflight.attempt and shard.checkpoint == inflight.number",
            "if shard.checkpoint == inflight.number"),
    Planted("commit with an ack missing", _CHECKPOINTS,
            "    if len(durable) != generation.world_size:\n        return None\n"
            "    return tuple(durable[rank] for rank in range(generation.world_size))",
            "    if len(durable) < max(1, generation.world_size - 1):\n        return None\n"
            "    return tuple(durable[rank] for rank in sorted(durable))"),
    Planted("count staged as stored", _CHECKPOINTS,
            "if shard.phase is ShardPhase.DURABLE and shard.step == inflight.step",
            "if shard.phase in (ShardPhase.STAGED, ShardPhase.DURABLE) and shard.step == inflight.step"),
    Planted("commit before the manifest is written", _EFFECTS,
            "    failpoints.hit(Point.MANIFEST_BEFORE)\n    _put_once(store, key, data)\n",
            "    failpoints.hit(Point.MANIFEST_BEFORE)\n"),
    Planted("put the marker before the event", _EFFECTS,
            "    failpoints.hit(Point.MANIFEST_BEFORE)\n    _put_once(store, key, data)\n",
            "    _put_once(store, key, data)\n    store.put(keys.marker_key(effect.job, inflight.number), data)\n"),
    Planted("believe the size of a shard", _EFFECTS,
            "if info is None or info.size_bytes != shard.size_bytes:", "if info is None:"),
    Planted("note a marker before it is there", _CHECKPOINTS,
            "if not checkpoint.marked and (job.name, number) in observed.markers:", "if not checkpoint.marked:"),
    Planted("say another position in the marker", _EFFECTS,
            "position_seq=checkpoint.position.seq,", "position_seq=1,"),
    Planted("reuse an attempt's key", "storage/keys.py",
            "attempt-{_number('attempt', attempt, 1, ATTEMPT_MAX):06d}/\"\n\n\ndef shard_key",
            "attempt-{1 + _number('attempt', attempt, 1, ATTEMPT_MAX) % 2:06d}/\"\n\n\ndef shard_key"),
    Planted("delete before the event", "coordinator/core/effects.py",
            "        if c.expired\n", "        if c.expired or (c.marked and c.number + 1 < job.last_checkpoint)\n"),
    Planted("keep the oldest instead of the newest", _RETENTION,
            "wanted = {c.number for c in sound[-policy.keep_last :]}",
            "wanted = {c.number for c in sound[: policy.keep_last]}"),
    Planted("expire what a generation starts from", _RETENTION,
            "wanted.add(job.generation.restore.checkpoint)", "pass"),
    Planted("leave the marker of what is deleted", _EFFECTS,
            "    if effect.committed:\n        store.delete(keys.marker_key",
            "    if False:\n        store.delete(keys.marker_key"),
    Planted("note a deletion before it is done", _RETENTION,
            "if checkpoint.expired and (job.name, checkpoint.attempt) in observed.deleted:", "if checkpoint.expired:"),
    Planted("sweep an attempt at once", _RETENTION,
            "if a.store and (job.ended or number < newest)]", "if a.store]"),
    Planted("start from a quarantined checkpoint", "coordinator/core/states.py",
            "if not c.quarantined and not c.expired]", "if not c.expired]"),
    Planted("start from the oldest checkpoint", "coordinator/core/states.py",
            "self.committed[max(sound)] if sound", "self.committed[min(sound)] if sound"),
    Planted("start from nothing", "worker/core/commands.py",
            "stage=RestoreStage.NONE if spec.restore is None else RestoreStage.FETCHING",
            "stage=RestoreStage.NONE"),
    Planted("never quarantine", "coordinator/core/failures.py",
            "if not job.committed[restore.checkpoint].quarantined:", "if False:"),
    Planted("take one rank's end for the job's", "coordinator/core/reconcile.py",
            "not all(rank.succeeded for rank in ranks)", "not any(rank.succeeded for rank in ranks)"),
    Planted("restart on the coordinator's death", "coordinator/core/failures.py",
            "elif observed.lost(member.worker, now):", "elif not observed.view(member.worker).connected:"),
    Planted("fence after a moment of silence", "worker/core/trainers.py",
            "if silent_s <= turn.state.fence_after_s:", "if silent_s <= 1.5:"),
    Planted("sweep living trainers at a restart", "worker/agent.py",
            "if assignment.stage is not GenerationStage.OVER\n        }", "if False\n        }"),
    Planted("forget the journal", "worker/journal.py",
            "assignments={JobName(job): self._load_assignment(JobName(job)) for (job,) in jobs},", "assignments={},"),
    Planted("do not sync the journal", "worker/journal.py", "PRAGMA synchronous = FULL", "PRAGMA synchronous = OFF"),
    Planted("start beside an older generation", "worker/core/trainers.py",
            "if assignment.stage is not GenerationStage.READY or spec is None or assignment.retiring:",
            "if assignment.stage is not GenerationStage.READY or spec is None:"),
    Planted("let an older generation go on", "worker/core/commands.py",
            "turn.act(EndTrainers(job=old.job, generation=old.generation, grace_s=0.0))", "pass"),
    Planted("accept an older generation's command", "worker/core/commands.py",
            "if assignment is not None and received.generation < assignment.newest:", "if False:"),
    Planted("ignore a stop", "worker/core/commands.py",
            'end_generation(turn, assignment, stop.grace_s, "stopped before it was started")', "turn.put(assignment)"),
    Planted("take a watch for complete", "coordinator/workers.py",
            "import ChangeKind, watch_a_while\n",
            "import ChangeKind, watch\n\n\ndef watch_a_while(client, prefix, *, from_revision):\n"
            "    return watch(client, prefix, from_revision=from_revision + 8)\n\n\n"),
    Planted("wait for a deposed leader's loop", "coordinator/service.py",
            "            for task in tasks:\n                task.cancel()\n            await asyncio.gather",
            "            await asyncio.gather"),
    Planted("go on counting after a step", "coordinator/core/step_clocks.py",
            "clock.phase, clock.step, clock.idle_s = rank.phase, rank.completed_step, 0.0",
            "clock.phase, clock.step = rank.phase, rank.completed_step"),
    Planted("give up what was staged", "worker/core/checkpoints.py",
            "        _settle(turn, assignment, shard, ShardStage.STAGED)\n",
            "        _settle(turn, assignment, shard, ShardStage.FAILED)\n"),
    Planted("commit parts that make no whole", _EFFECTS,
            "    catalog_of([shard for shard, _ in indexes])", "    list(indexes)"),
    Planted("tell what the journal does not hold", "worker/agent.py",
            "            await asyncio.to_thread(self._journal.write, entries)\n",
            "            self._state = state\n            await asyncio.to_thread(self._journal.write, entries)\n"),
    Planted("take every marker for put at a change of leader", _LOG,
            "    return jobs",
            "    for c in (c for state in jobs.values() for c in state.committed.values()):\n"
            "        object.__setattr__(c, 'marked', True)\n    return jobs"),
    Planted("give the workers of a new leader no time", "coordinator/core/observed.py",
            "UNSEEN_LOST_AFTER_S = 3.0", "UNSEEN_LOST_AFTER_S = 0.0"),
    Planted("forget quarantines at a change of leader", _LOG,
            "    return jobs",
            "    for c in (c for state in jobs.values() for c in state.committed.values()):\n"
            "        object.__setattr__(c, 'quarantined', '')\n    return jobs"),
    Planted("delete packs that others name", _EFFECTS, "if info.key not in effect.keep:", "if True:"),
    Planted("take a new data folder for the old one", "coordinator/core/failures.py",
            "if view.journal and view.journal != member.journal:", "if False:"),
    Planted("let a registration go before it is put anew", "etcd/registrations.py",
            "asyncio.create_task(self._carry(lease, moved))", "asyncio.create_task(asyncio.sleep(0))"),
    Planted("meet under one prefix for all generations", "worker/environment.py",
            '"DTRAIN_GENERATION": str(of.generation)', '"DTRAIN_GENERATION": "1"'),
    Planted("delete the shards before the manifest", _EFFECTS,
            "    store.delete(keys.manifest_key(effect.job, effect.checkpoint, effect.attempt))\n"
            "    prefix = keys.attempt_prefix(effect.job, effect.checkpoint, effect.attempt)\n"
            "    store.abandon(prefix)  # before the list, which so holds whatever was completed meanwhile\n"
            "    for info in list(store.list(prefix)):\n",
            "    prefix = keys.attempt_prefix(effect.job, effect.checkpoint, effect.attempt)\n"
            "    store.abandon(prefix)\n"
            "    for info in reversed(list(store.list(prefix))):\n"),
    Planted("leave the indexes of what is deleted", _EFFECTS,
            "    for info in list(store.list(prefix)):\n        store.delete(info.key)\n",
            "    for info in list(store.list(prefix)):\n"
            "        if not info.key.endswith('.index.json'):\n            store.delete(info.key)\n"),
    Planted("note a sweep before it is done", _RETENTION,
            "        if (job.name, aborted.attempt) in observed.deleted:\n            swept",
            "        if aborted in sweepable(job):\n            swept"),
    Planted("note a deletion of packs before it is done", _PACKS,
            "if (job.name, number) in observed.packs_deleted:", "if True:"),
    Planted("expire packs that are named", _PACKS,
            "return {pack.key for checkpoint in job.committed.values() for pack in checkpoint.packs}",
            "newest = job.newest_restorable\n"
            "    return {pack.key for pack in newest.packs} if newest is not None else set()"),
    Planted("never delete what has expired", "coordinator/core/effects.py",
            "        if c.expired\n    ]", "        if False\n    ]"),
    Planted("never sweep", "coordinator/core/effects.py", "for a in sweepable(job)", "for a in ()"),
    Planted("count the slots of other jobs by desired state alone", _PLACEMENT,
            "    if view.snapshot is not None:\n        for assignment", "    if False:\n        for assignment"),
    Planted("count the slots of other jobs by report alone", _PLACEMENT,
            "if other.name != job and other.generation is not None:", "if False:"),
    Planted("give the port that another job was given", _PLACEMENT,
            "(view.worker, view.snapshot.rendezvous_port) not in given:", "True:"),
    Planted("never send a command again", "coordinator/rpc/agents.py", "RESEND_S = 2.0", "RESEND_S = 2e9"),
)  # fmt: skip
