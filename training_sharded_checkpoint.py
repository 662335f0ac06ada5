"""Tensors in shards, through torch.distributed.checkpoint: each rank writes and reads what it holds, and no more.

    saving = save_in_background(folder, tensors, orders, group, checksum, complete)
    saving.result()                     # save_in_background returns as soon as the tensors are copied; this waits
    read_into(tensors, orders, folder)  # by any number of ranks, in any layout

`tensors` is {name: tensor}, DTensors where a mode shards. What several ranks hold alike is written once. Rows stand in
the files as the model has them, whatever order ranks hold them in. Nothing but tensors passes here, and the folder's
one pickle, `.metadata`, is read with the few classes that belong in it.
"""

import dataclasses
import pickle
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from training_mesh import local

# One process saves alone, on purpose; torch warns of it each time, from a thread, where no `catch_warnings` reaches.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

ITS_OWN_CLASSES = {  # what a pickled `.metadata` is made of
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"},
}  # fmt: skip


def background_group():
    """A group of every rank for what goes on beside training, on the CPU; None alone. All ranks call it together.

    Training's own group would mix the two up: ranks must agree on the order of what they exchange in one group.
    """
    return dist.new_group(backend="gloo") if _is_distributed() else None


def save_in_background(folder, tensors, orders, group, checksum, complete):
    """Copy {name: tensor} to the CPU and begin to write it into `folder`, each rank its shards; all call it together.

    Args:
        orders: {name: `training_mesh.rows_by_rank`} of tensors whose rows ranks hold in that order.
        group: a `background_group` in which no other saving is under way.
        checksum: of a file, by its path; each rank takes those of what it wrote.
        complete: called on rank 0, in a thread, as complete({file name: checksum}) when every rank's files are synced.

    Returns:
        A future that ends when `complete` has; `failure` reads what it raises.
    """
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    return dcp.async_save(
        tensors, storage_writer=_Writer(folder, checksum, complete), planner=_SavePlanner(orders),
        process_group=group, no_dist=not _is_distributed(),
    )  # fmt: skip


def failure(error):
    """The exception that made a `CheckpointException`: of the first rank that has one."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def read_into(tensors, orders, folder):
    """Fill {name: tensor} in place, each rank what it holds; every rank calls it, or one process alone.

    Args:
        orders: as for `save_in_background`.

    Raises:
        KeyError, ValueError, OSError: names or shapes that the folder does not have, or files that cannot be read.
    """
    try:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        planner = _LoadPlanner(orders)
        dcp.load(tensors, storage_reader=_Reader(folder), planner=planner, no_dist=not _is_distributed())
    except CheckpointException as error:
        raise failure(error) from error


def layouts(folder):
    """{name: (shape, dtype)} of the tensors that a folder holds, whole.

    Raises:
        OSError, pickle.UnpicklingError: a `.metadata` that is missing, or that is not what torch writes.
    """
    metadata = _Reader(folder).read_metadata().state_dict_metadata
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in metadata.items()}


def _is_distributed():
    return dist.is_available() and dist.is_initialized()


class _Rows:
    """Rows that a rank holds in an order of its own, as the pieces of the whole tensor that they are."""

    def __init__(self, orders):
        super().__init__()
        self.orders, self.pieces = orders, {}  # {MetadataIndex: rows of this rank's tensor}

    def pieces_of(self, name, chunk):
        """[(MetadataIndex, chunk of the whole tensor)] of a chunk that stands in the order of the ranks."""
        found, held = [], local(self.state_dict[name])
        rows = self.orders[name][chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]].tolist()
        begins = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1] + 1]
        for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True):
            place = (rows[begin], *chunk.offsets[1:]), (end - begin, *chunk.sizes[1:])
            index = MetadataIndex(name, place[0])
            self.pieces[index] = held[begin:end]
            found.append((index, ChunkStorageMetadata(*map(torch.Size, place))))
        return found


class _SavePlanner(_Rows, dcp.DefaultSavePlanner):
    def create_local_plan(self):
        plan, items = super().create_local_plan(), []
        for item in plan.items:
            if item.index.fqn not in self.orders:
                items.append(item)
                continue
            for index, chunk in self.pieces_of(item.index.fqn, item.tensor_data.chunk):
                data = dataclasses.replace(item.tensor_data, chunk=chunk)
                items.append(dataclasses.replace(item, index=index, tensor_data=data))
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index):
        return self.pieces[index] if index in self.pieces else super().lookup_object(index)


class _LoadPlanner(_Rows, dcp.DefaultLoadPlanner):
    def create_local_plan(self):
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.dest_index.fqn not in self.orders]
        for name in self.orders:
            pieces = [piece for chunk in self.state_dict[name].__create_chunk_list__()
                      for _, piece in self.pieces_of(name, chunk)]  # fmt: skip
            items += create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], pieces)
        return dataclasses.replace(plan, items=items)

    def lookup_tensor(self, index):
        return self.pieces[index] if index in self.pieces else super().lookup_tensor(index)


class _Writer(dcp.FileSystemWriter):
    """torch's writer of files, each synced, and their checksums."""

    def __init__(self, folder, checksum, complete):
        super().__init__(folder, sync_files=True)
        self.checksum, self.complete = checksum, complete

    def storage_meta(self):
        """Nothing: it would be the temporary folder's path, in the form of this machine's system."""
        return

    def write_data(self, plan, planner):
        written = super().write_data(plan, planner).wait()
        files = {result.storage_data.relative_path for result in written}
        checked = Future()
        checked.set_result((written, {name: self.checksum(self.path / name) for name in files}))
        return checked

    def finish(self, metadata, results):
        super().finish(metadata, [written for written, _ in results])
        checksums = {name: digest for _, of_rank in results for name, digest in of_rank.items()}
        self.complete(checksums | {".metadata": self.checksum(self.path / ".metadata")})


class _Reader(dcp.FileSystemReader):
    """torch's reader of files, which takes no class from `.metadata` but those that belong there."""

    def read_metadata(self, *arguments, **settings):
        with open(self.path / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in ITS_OWN_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)
