"""The two ways of ``dtrain run``: on a cluster that is there, and on one that lives as long as the run."""

import asyncio

from dtrain.cli.clients import Address, Coordinator, connect_etcd, probe_etcd
from dtrain.cli.following import Follower, Outcome
from dtrain.cli.interrupts import Interrupted, interruptible
from dtrain.cli.output import ENDED_PHASES
from dtrain.cli.progress import Screen
from dtrain.cli.run import submission, submitted_words
from dtrain.common.specs import JobSpec
from dtrain.etcd.client import EtcdClient
from dtrain.standalone.cluster import LocalCluster, LocalPlan
from dtrain.standalone.data_folder import DataFolder

LOCAL_LEADER_S = 60.0  # a coordinator of our own, on a machine that may be very busy


async def run_on_cluster(address: Address, spec: JobSpec) -> int:
    """Submit, follow, and return the job's exit code. Ctrl-C leaves the job running."""
    await probe_etcd(address.etcd, wait_s=0.0)
    with Screen() as screen:

        async def work() -> Outcome:
            async with connect_etcd(address) as etcd, Coordinator(etcd, address.prefix) as coordinator:
                reply = await coordinator.submit(submission(spec, takes_over=False))
                screen.say(submitted_words(spec, reply))
                return await _follow(etcd, coordinator, address.prefix, spec, reply.run, screen)

        try:
            outcome = await interruptible(work(), first=lambda: None, hurry=lambda: None)
        except Interrupted as interrupted:
            screen.say(
                f"job {spec.name} goes on without you: dtrain logs {spec.name} --follow shows it, "
                f"dtrain cancel {spec.name} ends it"
            )
            return interrupted.exit_code
    screen.say(outcome.words)
    return outcome.exit_code


async def run_here(folder: DataFolder, spec: JobSpec, plan: LocalPlan) -> int:
    """Bring a cluster up, run the job, take the cluster down, return the job's exit code."""
    folder.make()
    await _check_store(spec.store)
    with Screen() as screen:
        cluster = LocalCluster(folder, plan, notice=screen.say)
        work = _run_in(cluster, plan.prefix, spec, screen)
        try:
            outcome = await interruptible(
                work,
                first=lambda: screen.say("stopping; once more to stop at once"),
                hurry=cluster.kill,
            )
        except Interrupted as interrupted:
            screen.say(f"stopped; run --name {spec.name} again to continue from its newest committed checkpoint")
            return interrupted.exit_code
    screen.say(outcome.words)
    return outcome.exit_code


async def _run_in(cluster: LocalCluster, prefix: str, spec: JobSpec, screen: Screen) -> Outcome:
    async with cluster:
        job = asyncio.create_task(_run_job(cluster.etcd, prefix, spec, screen), name="job")
        failure = asyncio.create_task(cluster.failed(), name="services")
        try:
            await asyncio.wait([job, failure], return_when=asyncio.FIRST_COMPLETED)
            if failure.done() and not job.done():
                failure.result()
            return await job
        finally:
            for task in (job, failure):
                task.cancel()
            await asyncio.gather(job, failure, return_exceptions=True)


async def _run_job(endpoint: str, prefix: str, spec: JobSpec, screen: Screen) -> Outcome:
    async with EtcdClient([endpoint]) as etcd, Coordinator(etcd, prefix) as coordinator:
        # The folder is ours alone, so whatever its log believes to be running has lost its launcher.
        reply = await coordinator.submit(submission(spec, takes_over=True), patience_s=LOCAL_LEADER_S)
        screen.say(submitted_words(spec, reply))
        await _cancel_others(coordinator, spec.name, screen)
        return await _follow(etcd, coordinator, prefix, spec, reply.run, screen)


async def _cancel_others(coordinator: Coordinator, name: str, screen: Screen) -> None:
    """End other jobs that a killed run left unfinished: nobody waits for them, and they would take the slots."""
    for job in (await coordinator.status()).jobs:
        if job.job != name and job.phase not in ENDED_PHASES:
            await coordinator.cancel(job.job)
            screen.say(f"job {job.job} of an earlier run was cancelled; run --name {job.job} again to continue it")


async def _follow(
    etcd: EtcdClient, coordinator: Coordinator, prefix: str, spec: JobSpec, run: int, screen: Screen
) -> Outcome:
    return await Follower(etcd, coordinator, prefix=prefix, job=spec.name, run=run, screen=screen).follow()


async def _check_store(uri: str) -> None:
    """Find out whether a folder can be written before anything is started; the coordinator tries the others."""
    if not uri.startswith("file:"):
        return
    from dtrain.storage.uris import open_store, probe

    await asyncio.to_thread(lambda: probe(open_store(uri)))
