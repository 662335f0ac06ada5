"""What ranks tell one another: sums, flags, values. Alone, what they share is one's own.

loss = sum_over_ranks(nats, place) / n_tokens
folder = from_main(lambda: new_run_folder(...), place)      # rank 0 decides, and its UserError is raised on each
"""

import torch
import torch.distributed as dist

from user_errors import UserError


def sum_over_ranks(tensor, place):
    """The sum over all data, on every rank: ranks that read the same are counted once."""
    if place.rank % place.tensor_parallel:
        tensor = torch.zeros_like(tensor)
    return sum_over_all(tensor, place)


def sum_over_all(tensor, place):
    """The sum of every rank's tensor, on every rank."""
    if place.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def sums_over_ranks(tensors, place):
    """{name: integer tensor (n,)} -> the same of every rank added up, on every rank, in one exchange."""
    if place.world_size == 1 or not tensors:
        return tensors
    sizes = [tensor.numel() for tensor in tensors.values()]
    sums = sum_over_ranks(torch.cat(list(tensors.values())), place).split(sizes)
    return dict(zip(tensors, sums, strict=True))


def to_host(scalars, place):
    """Floats of several scalar tensors, waiting for the device once."""
    dtype = torch.float32 if place.device.type == "mps" else torch.float64
    return torch.stack([scalar.to(place.device, dtype) for scalar in scalars]).tolist()


def any_rank(flag, place):
    """True on every rank when it is true on one."""
    if place.world_size == 1:
        return bool(flag)
    return bool(sum_over_all(torch.tensor(float(bool(flag)), device=place.device), place) > 0)


def from_main(decide, place):
    """What rank 0 decides, on every rank: of files that come and go, each rank might see something else.

    Raises:
        UserError: that of rank 0, on every rank.
    """
    outcome = [None]
    if place.is_main:
        try:
            outcome = [(decide(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    if place.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    decided, problem = outcome[0]
    if problem is not None:
        raise UserError(problem)
    return decided


def gather(value, place):
    """[value of rank 0, of rank 1, ...], on every rank."""
    values = [value] * place.world_size
    if place.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_all(place):
    """Return when every rank has come here."""
    gather(None, place)
