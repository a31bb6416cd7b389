"""A checkpoint as others read it: one safetensors file with whole tensors, or a folder of torch's own format.

The output file is mapped and the parts are copied to their places in it, so a state of any size is exported with the
memory of one part at a time. What is a rank's own (random states, data position) means nothing outside of its run and
is left out.
"""

import logging
import mmap
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dtrain.common.errors import UserError
from dtrain.storage import shards
from dtrain.storage.catalogs import OWN_PREFIX, Catalog, WholeTensor, catalog_of, tensor_leaves
from dtrain.storage.manifests import Manifest
from dtrain.storage.objects import ObjectStore
from dtrain.storage.planned_reads import read_whole
from dtrain.storage.ranges import read_needed
from dtrain.storage.retrying import read_again_if_damaged
from dtrain.storage.shards import ShardPlan, TensorEntry
from dtrain.storage.tensor_codes import view_bytes
from dtrain.storage.tree_values import decode, leaves_for_torch
from dtrain.storage.verify import read_index
from dtrain.trainer.cores import cores_of_rank
from dtrain.trainer.resharding import fill

_log = logging.getLogger("dtrain")

BATCH_BYTES = 1024 * 1024 * 1024  # read before they are copied: a bound on memory, far above what a request costs


def export_safetensors(store: ObjectStore, manifest: Manifest, path: Path) -> int:
    """Write every whole tensor of the checkpoint into one file, verified. Return how many there are.

    The file has its name only once it is whole and durable. Raises ShardDamagedError naming what is damaged.
    """
    return _export_safetensors(store, manifest, _catalog(store, manifest), path)


def _export_safetensors(store: ObjectStore, manifest: Manifest, catalog: Catalog, path: Path) -> int:
    tensors = {name: whole for name, whole in catalog.tensors.items() if not name.startswith(f"{OWN_PREFIX}.")}
    if not tensors:
        raise UserError(f"checkpoint {manifest.checkpoint} holds no tensors of tracked objects: nothing to export.")
    metadata = {
        shards.STEP_ENTRY: str(manifest.step),
        shards.TREE_ENTRY: catalog.shards[0].header.metadata[shards.TREE_ENTRY],
    }
    plan = shards.plan([_entry(name, whole) for name, whole in tensors.items()], metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, plan.total_bytes)
            _fill(mmap.mmap(file.fileno(), plan.total_bytes), plan, store, catalog, tensors)
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(tensors)


def export_dcp(store: ObjectStore, manifest: Manifest, folder: Path) -> int:
    """Write what was tracked as torch.distributed.checkpoint does, for its load(). Return how many tensors there are.

    What is no tensor is there under the names that its planner gives.
    """
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        whole, made = Path(beside) / "whole.safetensors", Path(beside) / "made"
        catalog = _catalog(store, manifest)
        count = _export_safetensors(store, manifest, catalog, whole)
        state: dict[str, object] = dict(load_file(whole))  # mapped, not read
        for leaf in (leaf for tree in catalog.trees for leaf in tensor_leaves(tree) if leaf.pairs):
            stored = state.get(leaf.name)
            if isinstance(stored, torch.Tensor) and not stored.is_complex():
                state[leaf.name] = torch.view_as_complex(stored)
        for name, value in _leaf_values(store, catalog).items():
            state.setdefault(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that this is one process, which is meant
            save(state, storage_writer=FileSystemWriter(made), no_dist=True)
        made.rename(folder)
    return count


def _catalog(store: ObjectStore, manifest: Manifest) -> Catalog:
    return catalog_of([read_again_if_damaged(partial(read_index, store, entry))[0] for entry in manifest.shards])


def _leaf_values(store: ObjectStore, catalog: Catalog) -> dict[str, object]:
    """Return what is no tensor in what was tracked. Values of the script's own types are left out: it is not here."""
    load = partial(read_whole, wholes=catalog.tensors, bring=partial(read_needed, store, catalog.shards))
    found: dict[str, object] = {}
    for name, node in leaves_for_torch(catalog.trees).items():
        try:
            found[name] = decode(node, load, torch.device("cpu"))
        except UserError as error:
            _log.warning("%s is left out: %s", name, error)
    return found


def _fill(
    page: mmap.mmap, plan: ShardPlan, store: ObjectStore, catalog: Catalog, tensors: dict[str, WholeTensor]
) -> None:
    """Copy header and tensors to their places; flush them."""
    image = memoryview(page)
    image[: plan.data_start] = plan.header
    for names in _batches(tensors):
        targets: dict[str, torch.Tensor] = {}
        for name in names:
            start = plan.data_start + plan.data_offsets[name][0]
            targets[name] = view_bytes(image, tensors[name].dtype, tensors[name].shape, start)
        fill(
            targets,
            tensors,
            lambda needed: read_needed(store, catalog.shards, needed),
            moved=False,
            threads=cores_of_rank(1),
        )
    page.flush()


def _batches(tensors: dict[str, WholeTensor]) -> Iterator[list[str]]:
    """Yield names of tensors of about BATCH_BYTES together."""
    batch: list[str] = []
    batch_bytes = 0
    for name, whole in tensors.items():
        batch.append(name)
        batch_bytes += sum(chunk.end - chunk.begin for chunk in whole.chunks)
        if batch_bytes >= BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def _entry(name: str, whole: WholeTensor) -> TensorEntry:
    return TensorEntry(
        name=name,
        dtype=whole.dtype,
        shape=whole.shape,
        offsets_in_whole=(0,) * len(whole.shape),
        global_shape=whole.shape,
        size_bytes=sum(chunk.end - chunk.begin for chunk in whole.chunks),
    )
