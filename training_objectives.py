"""What the loss is. An objective wraps a model and returns sums, so that one division at the end is right everywhere.

    objective = OBJECTIVE_REGISTRY['causal_lm'](model, train_config)
    batch = objective.prepare(batch, key)        # as the stream has it -> as the objective wants it, on the CPU
    sums = objective(batch)      # {'loss': to differentiate, 'nats': cross-entropy, 'tokens': supervised tokens,
                                 #  'counts': {part: what it counted}}

A batch is a dict of tensors from `training_data`: 'inputs' (B, T), 'targets' (B, T) with IGNORE_INDEX where nothing is
supervised, 'window' (B,), and where a dataset has them 'positions' and 'document_ids' (B, T), or of records 'outcomes'
(B,) and 'chances' (B, T).
"""

import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model_builder import soft_cap
from model_config import IGNORE_INDEX
from registry import Registry
from training_corpora import PROBE_REGISTRY
from training_data import bits_per_byte, keys_of, scrambled, shuffled
from training_ranks import sum_over_ranks
from training_win import win_scores, win_sums
from user_errors import UserError

OBJECTIVE_REGISTRY = Registry("objective", of="train")


class Objective(nn.Module):
    """Args:
    model: ConfigurableGPT.
    config: TrainConfig.
    """

    head_fraction = 1.0  # the share of tokens that the output head is applied to, for the count of FLOPs
    heads: ClassVar = {}  # {name: outputs} of what it reads from the hidden states beside the next token

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config = model, config
        self.options = config.options_for(type(self))

    def scoring(self):
        """For config.json: the number of summary.json that runs are ranked by, and the tokens behind it if a subset."""
        return {"ranked_by": "final_val_loss"}

    @classmethod
    def extra_tokens(cls, config):
        """How many ids the model's vocabulary must have beyond the dataset's."""
        return 0

    @classmethod
    def check_dataset(cls, dataset):
        """Refuse a dataset that lacks what the objective needs, with a UserError."""

    @classmethod
    def example(cls, batch_size, block_size):
        """A micro-batch of zeros with all that a stream may have for this objective, to count what a step holds."""
        zeros = torch.zeros(batch_size, block_size, dtype=torch.int64)
        return {"inputs": zeros, "targets": zeros, "window": zeros[:, 0]}

    def prepare(self, batch, key):
        """The batch as `forward` takes it, computed on the CPU while the batch before it trains.

        A pure function of the key (the run's seed, or the name of a fixed set) and of each row by itself, whose number
        is its 'window': the same however rows are split into micro-batches and ranks.
        """
        return batch

    def forward(self, batch):
        """batch -> {name: scalar sum over the batch}; 'loss' carries the gradient, 'tokens' is what to divide by."""
        raise NotImplementedError

    def read(self, batch):
        """batch -> (hidden states (B, T, C), auxiliary loss of the batch's tokens, {part: counts}).

        Where a batch has 'places' (B, K), the hidden states are those there, (B, K, C). The auxiliary loss (an MoE's
        balance) is per token and counts as often as the batch has supervised tokens, so that one division at the end
        makes it a mean over micro-batches and ranks. It is for 'loss', never for 'nats'.
        """
        self.model.listen()
        more = batch.get("positions"), batch.get("document_ids"), batch.get("places")
        hidden = self.model.hidden_states(batch["inputs"], *more)
        per_token, counts = self.model.take_findings()
        return hidden, per_token * supervised_tokens(batch) if counts else 0.0, counts

    def cross_entropy(self, hidden, targets):
        """(loss, nats) of the output head on hidden (..., C), targets (...)."""
        head = self.model.head
        return linear_cross_entropy(
            hidden.flatten(0, -2), head.weight, targets.flatten(), self.model.config.logit_soft_cap,
            self.config.z_loss, self.config.loss_chunk_elements, head.bias,
        )  # fmt: skip

    def scores(self, sums):
        """{'val_loss', 'perplexity', 'bits_per_byte', ...} from the sums over the validation set and its 'bytes'."""
        loss = sums["nats"] / sums["tokens"]
        bits = bits_per_byte(sums["nats"], sums["bytes"])
        return {"val_loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits}

    def more_scores(self, validation, batch_size, place, is_final):
        """{name: number} that take passes of their own over the validation set; is_final at the end of a run."""
        return {}


@OBJECTIVE_REGISTRY("causal_lm")
class CausalLM(Objective):
    """Next-token cross-entropy in nats, and z_loss * log(Z)^2 where asked (PaLM, section 5).

    Of a probe, which has targets only where an answer is due, evaluations also count the answers that are right.
    """

    def __init__(self, model, config):
        super().__init__(model, config)
        if not model.config.causal:
            raise UserError(
                "objective='causal_lm' predicts the next token, and causal=False lets the model see it; "
                "use objective='masked_lm'"
            )
        self.counts_answers = config.dataset in PROBE_REGISTRY

    def forward(self, batch):
        hidden, auxiliary, counts = self.read(batch)
        loss, nats = self.cross_entropy(hidden, batch["targets"])
        sums = {"nats": nats.detach(), "tokens": supervised_tokens(batch), "counts": counts}
        if self.counts_answers and not self.training:
            sums["correct"] = n_correct(hidden, self.model.head, batch["targets"], self.config.loss_chunk_elements)
        return {"loss": loss + auxiliary if counts else loss, **sums}

    def scores(self, sums):
        more = {"answer_accuracy": sums["correct"] / sums["tokens"]} if self.counts_answers else {}
        return super().scores(sums) | more


@OBJECTIVE_REGISTRY("lm_plus_win")
class LMPlusWin(CausalLM):
    """The next token, and at every step who wins: lm_loss + lambda_wp * wp_loss, both in nats per supervised token.

    wp_loss is the binary cross-entropy between a record's outcome and the `win` head's prediction after each token that
    has a next one. How good it can get is known where the dataset has the true chances (`training_games.py`).
    """

    heads: ClassVar = {"win": 1}

    class Options:
        lambda_wp: float = 1.0  # weight of wp_loss, the loss of predicting the winner, beside lm_loss

    def __init__(self, model, config):
        super().__init__(model, config)
        if not 0 <= self.options.lambda_wp < math.inf:
            raise UserError(f"lambda_wp={self.options.lambda_wp} must be a number from 0 on")

    @classmethod
    def check_dataset(cls, dataset):
        if not dataset.has_outcomes:
            raise UserError(
                f"objective='lm_plus_win' predicts an outcome, and {dataset.folder} has none; use --dataset=games (of "
                "your own: --input=FILE.jsonl), or objective='causal_lm'"
            )

    @classmethod
    def example(cls, batch_size, block_size):
        records = {"outcomes": torch.zeros(batch_size), "chances": torch.zeros(batch_size, block_size)}
        return super().example(batch_size, block_size) | records

    def scoring(self):
        """Losses of different weights are different losses."""
        return {"ranked_by": "final_val_loss", "loss": f"lm_loss + {self.options.lambda_wp:g} wp_loss"}

    def forward(self, batch):
        hidden, auxiliary, counts = self.read(batch)
        lm_loss, lm_nats = self.cross_entropy(hidden, batch["targets"])
        logits = self.model.heads["win"](hidden).squeeze(-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, T)
        is_supervised = batch["targets"] != IGNORE_INDEX
        outcomes = batch["outcomes"].to(logits.dtype)[:, None].expand_as(logits)
        wp_nats = (F.binary_cross_entropy_with_logits(logits, outcomes, reduction="none") * is_supervised).sum()
        weight = self.options.lambda_wp
        loss = lm_loss + weight * wp_nats
        sums = {"nats": (lm_nats + weight * wp_nats).detach(), "tokens": supervised_tokens(batch), "counts": counts}
        sums["loss"] = loss + auxiliary if counts else loss
        if not self.training:
            sums |= {"lm_nats": lm_nats, "wp_nats": wp_nats}
            sums |= win_sums(logits, outcomes, is_supervised, batch.get("chances"))
        return sums

    def scores(self, sums):
        """val_loss is lm_loss + lambda_wp * wp_loss; perplexity and bits per byte are those of lm_loss."""
        lm = super().scores({**sums, "nats": sums["lm_nats"]})
        n = sums["tokens"]
        losses = {"lm_loss": lm["val_loss"], "wp_loss": sums["wp_nats"] / n}
        return lm | {"val_loss": sums["nats"] / n} | losses | win_scores(sums)


def added(counts, more):
    """{part: counts} of two micro-batches or steps as one."""
    return {**counts, **{part: counts.get(part, 0) + count for part, count in more.items()}}


@OBJECTIVE_REGISTRY("masked_lm")
class MaskedLM(Objective):
    """Tokens are hidden and predicted from both sides (Devlin et al. 2018, section 3.1), in nats per hidden token.

    As in BERT's released code each window has the same number of them, max(1, round(mask_fraction T)), so that shapes
    are fixed and the output head is applied to these alone. Most are shown as the mask token, some as a random token,
    some as they are. Which, and as what, is a pure function of the seed and of the window's place in the stream.

    The loss depends on how much is hidden and is no loss of a text, so runs are ranked by pseudo-perplexity (Salazar et
    al. 2020, eq. 2): each token hidden alone, all others of its window shown.
    """

    class Options:
        mask_fraction: float = 0.15  # tokens of a window that are hidden and predicted
        mask_random_fraction: float = 0.1  # of those, shown as a random token: what is shown is not always the mask
        mask_keep_fraction: float = 0.1  # of those, shown as they are
        mask_token: int | None = None  # id that stands for a hidden token; None adds one to the vocabulary
        pseudo_perplexity_tokens: int = 1024  # validation tokens that are hidden one at a time; 0 for none
        pseudo_perplexity_always: bool = False  # score them at every evaluation, not at the last alone

    def __init__(self, model, config):
        super().__init__(model, config)
        if model.config.causal:
            raise UserError(
                "objective='masked_lm' predicts a token from both sides, and causal=True hides the later one; "
                "use causal=False (config/arch_bert.py), or objective='causal_lm'"
            )
        self.vocab_size = model.head.out_features
        check_mask_options(self.options, self.vocab_size)
        self.mask_token = self.vocab_size - 1 if self.options.mask_token is None else self.options.mask_token
        T = model.config.block_size
        self.head_fraction = self.n_hidden(T) / T

    @classmethod
    def extra_tokens(cls, config):
        if config.dataset in PROBE_REGISTRY:
            raise UserError(
                f"objective='masked_lm' chooses what to predict, and dataset={config.dataset!r} is a probe, which says "
                "where an answer is due; use objective='causal_lm'"
            )
        if config.options_for(cls).mask_token is not None:
            return 0
        if ":" in config.init_from:  # a new id would be a token of the source's, or beyond its vocabulary
            raise UserError(
                f"objective='masked_lm' with init_from={config.init_from!r} needs mask_token=ID, the id that the "
                "source hides tokens behind (103 in bert-base-uncased)"
            )
        return 1

    def scoring(self):
        return {"ranked_by": "pseudo_perplexity", "tokens": self.options.pseudo_perplexity_tokens}

    def n_hidden(self, T):
        """Tokens that are hidden of a window of T."""
        return max(1, round(self.options.mask_fraction * T))

    def prepare(self, batch, key):
        """Adds 'places' (B, K), what is hidden; 'targets' (B, K) are the tokens there, 'inputs' what is shown."""
        tokens, o = batch["inputs"], self.options
        places, shares, draws = hidden_places(key, batch["window"], tokens.size(1), self.n_hidden(tokens.size(1)))
        others = draws % (self.vocab_size - 1)
        others += others >= self.mask_token  # any token but the mask
        shown = torch.where(shares < o.mask_random_fraction, others, self.mask_token)
        shown = torch.where(shares >= 1 - o.mask_keep_fraction, tokens.gather(1, places), shown)
        return hidden_batch(batch, places, shown)

    def forward(self, batch):
        hidden, auxiliary, counts = self.read(batch)  # (B, K, C)
        loss, nats = self.cross_entropy(hidden, batch["targets"])
        sums = {"nats": nats.detach(), "tokens": supervised_tokens(batch), "counts": counts}
        sums["loss"] = loss + auxiliary if counts else loss
        if not self.training:
            sums["correct"] = n_correct(hidden, self.model.head, batch["targets"], self.config.loss_chunk_elements)
        return sums

    def scores(self, sums):
        """val_loss is of the hidden tokens; perplexity and bits per byte, which are of a text, it has none."""
        loss, accuracy = sums["nats"] / sums["tokens"], sums["correct"] / sums["tokens"]
        return {"val_loss": loss, "perplexity": None, "bits_per_byte": None, "masked_accuracy": accuracy}

    def more_scores(self, validation, batch_size, place, is_final):
        """{'pseudo_nats', 'pseudo_perplexity'}: the mean of -log p(token | the rest of its window), and its exp."""
        n = self.options.pseudo_perplexity_tokens
        if n == 0 or not (is_final or self.options.pseudo_perplexity_always):
            return {}
        batches = self.one_at_a_time(validation, n, batch_size, place.data_rank, place.data_size)
        sums = summed(self, batches, validation, place)
        nats = sums["nats"] / sums["tokens"]
        return {"pseudo_nats": nats, "pseudo_perplexity": perplexity(nats)}

    def one_at_a_time(self, validation, n, batch_size, rank=0, world_size=1):
        """Yield this rank's batches with one hidden token in each row: n tokens, the same for every run.

        They are drawn from all places of all windows, none twice; asking for fewer takes the first of the same.
        """
        T, n = validation.block_size, min(n, validation.n_tokens)
        chosen = shuffled(np.arange(n), validation.n_tokens, keys_of("pseudo-perplexity", n_keys=7))
        chosen, stride = chosen.reshape(-1, 1), batch_size * world_size  # (n, 1)
        for start in range(0, n, stride):
            rows = chosen[start + rank * batch_size :][:batch_size]
            n_filler = batch_size - len(rows)  # every rank makes equally many batches of one shape
            rows = np.concatenate([rows, np.repeat(chosen[:1], n_filler, axis=0)])
            batch = validation.windows_at(rows[:, 0] // T)
            batch["targets"][batch_size - n_filler :] = IGNORE_INDEX
            places = torch.from_numpy(rows % T)
            yield hidden_batch(batch, places, torch.full_like(places, self.mask_token))


def check_mask_options(o, vocab_size):
    """Refuse shares that are none, and a mask that is not in the vocabulary."""
    if not 0 < o.mask_fraction <= 1:
        raise UserError(f"mask_fraction={o.mask_fraction} must lie in (0, 1]")
    random, keep = o.mask_random_fraction, o.mask_keep_fraction
    if random < 0 or keep < 0 or random + keep > 1:
        raise UserError(f"mask_random_fraction={random} and mask_keep_fraction={keep} must be shares of one whole")
    if o.mask_token is not None and not 0 <= o.mask_token < vocab_size:
        raise UserError(f"mask_token={o.mask_token} is not in the vocabulary of vocab_size={vocab_size}")
    if o.pseudo_perplexity_tokens < 0:
        raise UserError(f"pseudo_perplexity_tokens={o.pseudo_perplexity_tokens} must be at least 0")


def hidden_places(key, windows, T, n):
    """n places of each window to hide, and two random numbers for each, by counting and hashing (splitmix64).

    Args:
        key: printable; with it every window is hidden otherwise.
        windows: (B,) int64, which window each row is.

    Returns:
        (places (B, n) int64, ascending, shares (B, n) float64 in [0, 1), draws (B, n) int64 from 0 on).
    """
    keys = keys_of("masked_lm", key, n_keys=3)
    start = scrambled(windows.numpy().astype(np.uint64)[:, None] ^ keys[0])
    noise = scrambled(start + np.arange(T, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # (B, T)
    places = np.sort(np.argsort(noise, axis=1, kind="stable")[:, :n], axis=1)
    noise = np.take_along_axis(noise, places, axis=1)
    shares = (scrambled(noise ^ keys[1]) >> np.uint64(11)) * 2.0**-53
    draws = (scrambled(noise ^ keys[2]) >> np.uint64(1)).astype(np.int64)
    return torch.from_numpy(places), torch.from_numpy(shares), torch.from_numpy(draws)


def hidden_batch(batch, places, shown):
    """The batch with `shown` (B, K) at `places`, whose tokens are the targets, padding apart.

    A token is no padding where the place before it was to predict it, the first one where it was to predict the next.
    """
    tokens, followed = batch["inputs"], batch["targets"] != IGNORE_INDEX
    is_text = torch.cat((followed[:, :1], followed[:, :-1]), dim=1)
    targets = tokens.gather(1, places).masked_fill(~is_text.gather(1, places), IGNORE_INDEX)
    return {**batch, "inputs": tokens.scatter(1, places, shown), "targets": targets, "places": places}


def n_correct(hidden, head, targets, chunk_elements):
    """Scalar int64: supervised targets (...) that are the likeliest token of the head on hidden (..., C)."""
    rows = max(1, chunk_elements // head.out_features)
    pieces = zip(hidden.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
    return sum((F.linear(h, head.weight, head.bias).argmax(-1) == target).sum() for h, target in pieces)


def supervised_tokens(batch):
    """Scalar int64: how many targets count."""
    return (batch["targets"] != IGNORE_INDEX).sum()


# ---- cross-entropy of a linear head ----------------------------------------------------------------------------------


def linear_cross_entropy(hidden, weight, targets, cap=0.0, z_loss=0.0, chunk_elements=2**24, bias=None):
    """Cross-entropy of softmax(cap * tanh(logits / cap)), summed over targets that are not IGNORE_INDEX.

    The logits are hidden @ weight.T + bias.

    Args:
        hidden: (N, C). weight: (V, C). targets: (N,) int64.
        cap: logit soft cap, 0 for none.
        z_loss: weight of log(Z)^2.
        chunk_elements: logits held at once. When all N x V fit, they are formed once; otherwise rows go through in
            chunks, each one's gradient taken while its logits exist, so that memory does not grow with N x V.
        bias: (V,), or None.

    Returns:
        (loss, nats): with and without the z-loss; the gradient flows through `loss`.
    """
    if hidden.size(0) * weight.size(0) <= chunk_elements:
        return _whole(hidden, weight, bias, targets, cap, z_loss)
    if not torch.is_grad_enabled():  # so that the chunks take no gradients in passing
        hidden, weight, bias = (None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias))
    rows = max(1, chunk_elements // weight.size(0))
    return ChunkedLinearCrossEntropy.apply(hidden, weight, bias, targets, cap, z_loss, rows)


def _whole(hidden, weight, bias, targets, cap, z_loss):
    logits = F.linear(hidden, weight, bias)
    logits = soft_cap(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap)
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if not z_loss:
        return nats, nats
    log_z = torch.logsumexp(logits, dim=-1)
    return nats + z_loss * (log_z.square() * (targets != IGNORE_INDEX)).sum(), nats


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """`_whole`, a chunk of rows at a time. The loss is a sum, so its gradient is known up to one scalar in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, cap, z_loss, rows):
        device = hidden.device.type
        matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        sum_dtype = torch.promote_types(matmul_dtype, torch.float32)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if need_bias else None
        loss, nats = hidden.new_zeros((), dtype=sum_dtype), hidden.new_zeros((), dtype=sum_dtype)
        with torch.autocast(device, enabled=False):
            w, b = weight.to(matmul_dtype), None if bias is None else bias.to(matmul_dtype)
            for start in range(0, hidden.size(0), rows):
                h, target = hidden[start : start + rows].to(matmul_dtype), targets[start : start + rows]
                chunk_nats, chunk_z, grad = _chunk(F.linear(h, w, b).to(sum_dtype), target, cap, z_loss)
                nats += chunk_nats
                loss += chunk_nats + z_loss * chunk_z
                if need_bias:
                    grad_bias += grad.sum(0)
                grad = grad.to(matmul_dtype)
                if need_hidden:
                    grad_hidden[start : start + rows] = grad @ w
                if need_weight:
                    grad_weight += grad.t() @ h
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype))
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx, grad_loss, _):
        gradients = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *gradients, None, None, None, None


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


def validation_scores(objective, validation, batch_size, place, is_final=False):
    """{'val_loss', 'perplexity', 'bits_per_byte', ...} of an objective on a fixed ValidationSet.

    Loss is in nats per supervised token. `is_final` asks for the scores of a run's end too.
    """
    batches = validation.batches(batch_size, place.data_rank, place.data_size)
    sums = summed(objective, (objective.prepare(batch, "validation") for batch in batches), validation, place)
    return objective.scores(sums) | objective.more_scores(validation, batch_size, place, is_final)


def summed(objective, batches, validation, place):
    """{name: float, or list where it is a vector} that the objective returns, and 'bytes' of text behind supervised
    targets, over batches and ranks.

    Sums and counts are carried; whoever wants a mean divides once.
    """
    total, was_training = 0, objective.training
    objective.eval()
    with torch.no_grad(), place.autocast():
        for batch in batches:
            n_bytes = validation.target_bytes(batch["targets"]) or 0
            sums = objective({name: tensor.to(place.device) for name, tensor in batch.items()})
            sums = {name: value for name, value in sums.items() if name not in ("loss", "counts")}
            sums["bytes"] = torch.tensor(n_bytes)
            dtype = torch.float32 if place.device.type == "mps" else torch.float64
            total = total + torch.cat([value.to(place.device, dtype).flatten() for value in sums.values()])
    objective.train(was_training)
    parts = sum_over_ranks(total, place).split([value.numel() for value in sums.values()])
    return {name: part.view(sums[name].shape).tolist() for name, part in zip(sums, parts, strict=True)}


def perplexity(nats):
    """exp of a mean loss in nats, infinite losses aside."""
    return math.exp(min(nats, 700.0))
