"""Make a checkpoint of checkpoint_format=sharded an unsharded one, on one machine, for programs that read no shards.

python scripts/convert_checkpoint.py runs/NAME/checkpoint-5000

The shards stay beside it as runs/NAME/sharded-checkpoint-5000. The whole model and its optimizer pass through memory.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import training_checkpoint as checkpoint
from user_errors import UserError, exit_on_user_error, paths_given


@exit_on_user_error
def main(arguments):
    usage = "python scripts/convert_checkpoint.py runs/NAME/checkpoint-5000 ..."
    for folder in paths_given(arguments, __doc__, "checkpoint", usage):
        print(f"{convert(folder)} is unsharded")


def convert(folder):
    """The folder of the unsharded checkpoint that takes the name of a sharded one.

    Args:
        folder: checkpoint-N; or sharded-checkpoint-N, where an earlier conversion was killed in between.

    Raises:
        UserError: no sharded checkpoint there, a damaged one, a name that is taken, or a full disk.
    """
    name = folder.name.removeprefix("sharded-")
    target, shards = folder.with_name(name), folder.with_name(f"sharded-{name}")
    if not re.fullmatch(r"checkpoint-\d+", name) or not checkpoint.is_sharded(folder):
        raise UserError(f"{folder} is no sharded checkpoint; give a folder such as runs/NAME/checkpoint-5000")
    if (taken := shards if folder == target else target).exists():
        raise UserError(f"{taken} exists, from an earlier conversion; move it away first")
    weights, state, metadata = checkpoint.read_whole(folder)
    if folder == target:
        os.replace(target, shards)
    try:
        return checkpoint.save_checkpoint(folder.parent, weights, state, metadata)
    except UserError:
        os.replace(shards, target)
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
