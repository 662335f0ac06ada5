"""What the loss is. An objective wraps a model and returns sums, so that one division at the end is right everywhere.

    objective = OBJECTIVE_REGISTRY['causal_lm'](model, train_config)
    sums = objective(batch)      # {'loss': to differentiate, 'nats': cross-entropy, 'tokens': supervised tokens,
                                 #  'counts': {part: what it counted}}

A batch is a dict of tensors from `training_data`: 'inputs' (B, T), 'targets' (B, T) with IGNORE_INDEX where nothing is
supervised, and where a dataset has them 'positions' and 'document_ids' (B, T).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model_builder import IGNORE_INDEX, soft_cap
from registry import Registry
from training_data import bits_per_byte
from training_parallel import sum_over_ranks
from user_errors import UserError

OBJECTIVE_REGISTRY = Registry("objective", of="train")


class Objective(nn.Module):
    """Args:
    model: ConfigurableGPT.
    config: TrainConfig.
    """

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config = model, config
        self.options = config.options_for(type(self))

    def forward(self, batch):
        """batch -> {name: scalar sum over the batch}; 'loss' carries the gradient, 'tokens' is what to divide by."""
        raise NotImplementedError

    def read(self, batch):
        """batch -> (hidden states (B, T, C), auxiliary loss of the batch's tokens, {part: counts}).

        The auxiliary loss (an MoE's balance) is per token and counts as often as the batch has supervised tokens, so
        that one division at the end makes it a mean over micro-batches and ranks. It is for 'loss', never for 'nats'.
        """
        self.model.listen()
        hidden = self.model.hidden_states(batch["inputs"], batch.get("positions"), batch.get("document_ids"))
        per_token, counts = self.model.take_findings()
        return hidden, per_token * supervised_tokens(batch) if counts else 0.0, counts


@OBJECTIVE_REGISTRY("causal_lm")
class CausalLM(Objective):
    """Next-token cross-entropy in nats, and z_loss * log(Z)^2 where asked (PaLM, section 5)."""

    def __init__(self, model, config):
        super().__init__(model, config)
        if not model.config.causal:
            raise UserError("objective='causal_lm' predicts the next token, and causal=False lets the model see it")

    def forward(self, batch):
        hidden, auxiliary, counts = self.read(batch)
        loss, nats = linear_cross_entropy(
            hidden.flatten(0, 1), self.model.head.weight, batch["targets"].flatten(),
            self.model.config.logit_soft_cap, self.config.z_loss, self.config.loss_chunk_elements,
        )  # fmt: skip
        sums = {"nats": nats.detach(), "tokens": supervised_tokens(batch), "counts": counts}
        return {"loss": loss + auxiliary if counts else loss, **sums}


def added(counts, more):
    """{part: counts} of two micro-batches or steps as one."""
    return {**counts, **{part: counts.get(part, 0) + count for part, count in more.items()}}


def supervised_tokens(batch):
    """Scalar int64: how many targets count."""
    return (batch["targets"] != IGNORE_INDEX).sum()


# ---- cross-entropy of a linear head ----------------------------------------------------------------------------------


def linear_cross_entropy(hidden, weight, targets, cap=0.0, z_loss=0.0, chunk_elements=2**24):
    """Cross-entropy of softmax(cap * tanh(hidden @ weight.T / cap)), summed over targets that are not IGNORE_INDEX.

    Args:
        hidden: (N, C). weight: (V, C). targets: (N,) int64.
        cap: logit soft cap, 0 for none.
        z_loss: weight of log(Z)^2.
        chunk_elements: logits held at once. When all N x V fit, they are formed once; otherwise rows go through in
            chunks, each one's gradient taken while its logits exist, so that memory does not grow with N x V.

    Returns:
        (loss, nats): with and without the z-loss; the gradient flows through `loss`.
    """
    if hidden.size(0) * weight.size(0) <= chunk_elements:
        return _whole(hidden, weight, targets, cap, z_loss)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # so that the chunks take no gradients in passing
    rows = max(1, chunk_elements // weight.size(0))
    return ChunkedLinearCrossEntropy.apply(hidden, weight, targets, cap, z_loss, rows)


def _whole(hidden, weight, targets, cap, z_loss):
    logits = F.linear(hidden, weight)
    logits = soft_cap(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap)
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if not z_loss:
        return nats, nats
    log_z = torch.logsumexp(logits, dim=-1)
    return nats + z_loss * (log_z.square() * (targets != IGNORE_INDEX)).sum(), nats


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """`_whole`, a chunk of rows at a time. The loss is a sum, so its gradient is known up to one scalar in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, z_loss, rows):
        device = hidden.device.type
        matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        sum_dtype = torch.promote_types(matmul_dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if need_weight else None
        loss, nats = hidden.new_zeros((), dtype=sum_dtype), hidden.new_zeros((), dtype=sum_dtype)
        with torch.autocast(device, enabled=False):
            w = weight.to(matmul_dtype)
            for start in range(0, hidden.size(0), rows):
                h, target = hidden[start : start + rows].to(matmul_dtype), targets[start : start + rows]
                chunk_nats, chunk_z, grad = _chunk(F.linear(h, w).to(sum_dtype), target, cap, z_loss)
                nats += chunk_nats
                loss += chunk_nats + z_loss * chunk_z
                grad = grad.to(matmul_dtype)
                if need_hidden:
                    grad_hidden[start : start + rows] = grad @ w
                if need_weight:
                    grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype)
        grad_weight = None if grad_weight is None else grad_weight * grad_loss.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _chunk(logits, targets, cap, z_loss):
    """(sum of nats, sum of log(Z)^2, gradient of nats + z_loss log(Z)^2 with respect to the raw logits (n, V))."""
    tanh = torch.tanh(logits / cap) if cap else None
    logits = cap * tanh if cap else logits
    supervised = targets != IGNORE_INDEX
    index = targets.masked_fill(~supervised, 0)[:, None]
    log_z = torch.logsumexp(logits, dim=-1)
    nats = ((log_z - logits.gather(1, index).squeeze(1)) * supervised).sum()
    z = (log_z.square() * supervised).sum()
    grad = torch.exp(logits - log_z[:, None])
    if z_loss:
        grad = grad * (1 + 2 * z_loss * log_z)[:, None]
    grad.scatter_add_(1, index, -torch.ones_like(index, dtype=grad.dtype))
    grad = grad * (1 - tanh.square()) if cap else grad
    return nats, z, grad * supervised[:, None]


# ---- validation ------------------------------------------------------------------------------------------------------


def validation_scores(objective, validation, batch_size, place):
    """{'val_loss', 'perplexity', 'bits_per_byte'} on a fixed ValidationSet.

    Sums and counts are carried over batches and ranks and divided once. Loss is in nats per supervised token.
    """
    sums = torch.zeros(3, dtype=torch.float32 if place.device.type == "mps" else torch.float64, device=place.device)
    was_training = objective.training
    objective.eval()
    with torch.no_grad(), place.autocast():
        for batch in validation.batches(batch_size, place.rank, place.world_size):
            n_bytes = validation.target_bytes(batch["targets"]) or 0
            scores = objective({name: tensor.to(place.device) for name, tensor in batch.items()})
            sums += torch.stack([scores["nats"].to(sums), scores["tokens"].to(sums), torch.tensor(n_bytes).to(sums)])
    objective.train(was_training)
    nats, tokens, n_bytes = sum_over_ranks(sums, place).tolist()
    loss = nats / tokens
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_byte(nats, n_bytes)}
