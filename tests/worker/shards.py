"""A small shard, as a trainer would stage it, made without torch."""

from dtrain.storage import shards

VALUES = bytes(range(256)) * 16


def shard_bytes(*, rank: int, step: int, payload: bytes = VALUES) -> bytes:
    entry = shards.TensorEntry(
        name="weight",
        dtype="U8",
        shape=(len(payload),),
        offsets_in_whole=(0,),
        global_shape=(len(payload),),
        size_bytes=len(payload),
    )
    metadata = {
        shards.STEP_ENTRY: str(step),
        shards.RANK_ENTRY: str(rank),
        shards.WORLD_SIZE_ENTRY: "2",
        shards.TREE_ENTRY: "{}",
    }
    return shards.plan([entry], metadata).header + payload
