"""Mixture of experts: the FFN `moe`, in which each token passes through a few of many networks.

    FFN_REGISTRY['moe'](config, layer_index)        # (B, T, C) -> (B, T, C)

A router scores the experts for each token, the best `experts_per_token` are computed, and their outputs are added with
the router's weights (Shazeer et al. 2017; Fedus et al. 2021, Switch; Jiang et al. 2024, Mixtral; DeepSeek-AI 2024,
DeepSeek-V3). `Experts.combine` is the plain path; `kernels/grouped.py` has the fast ones.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model_components import ACTIVATION_REGISTRY, FFN, FFN_REGISTRY, GatedFFN, WithFindings
from user_errors import UserError


class Experts(nn.Module):
    """`n` FFNs of one shape, without biases, their weights side by side as nn.Linear has them: (n, out, in).

    Args:
        width, hidden: C and H.
        is_gated: `up` is then gate and up in one, (n, 2H, C).
        activation: of the gate, or of the hidden units.
        active_fraction: share of the experts that a token passes through; parameters and FLOPs are counted by it.
    """

    linear_weights = ("up", "down")
    residual_out = ("down",)
    split_experts = ("up", "down")

    def __init__(self, n, width, hidden, is_gated, activation, active_fraction):
        super().__init__()
        self.is_gated, self.activation, self.active_fraction = is_gated, activation, active_fraction
        self.up = nn.Parameter(torch.empty(n, 2 * hidden if is_gated else hidden, width))
        self.down = nn.Parameter(torch.empty(n, width, hidden))

    def activate(self, h):
        """(..., 2H) or (..., H), what `up` gives -> (..., H), what `down` takes."""
        if not self.is_gated:
            return self.activation(h)
        gate, up = h.chunk(2, dim=-1)
        return self.activation(gate) * up

    def forward(self, x, chosen, weights):
        """x (N, C), chosen (N, k) int64, weights (N, k) -> (N, C): the weighted sum of each token's k experts."""
        return self.combine(x, chosen, weights, self.up, self.down)

    def combine(self, x, chosen, weights, ups, downs):
        """`forward` with the weights of these experts, which may be some of all: `chosen` numbers them from 0."""
        y = torch.zeros_like(x)
        for expert, (up, down) in enumerate(zip(ups.unbind(0), downs.unbind(0), strict=True)):
            token, choice = torch.where(chosen == expert)
            h = F.linear(self.activate(F.linear(x[token], up)), down)
            y = y.index_add(0, token, (h * weights[token, choice, None]).to(y.dtype))
        return y

    def check_split(self, n):
        """Refuse `expert_parallel=n` where the ranks would not have equally many."""
        if self.up.size(0) % n:
            raise UserError(f"expert_parallel={n} does not divide n_experts={self.up.size(0)}; change one of them")

    def extra_repr(self):
        return f"{self.up.size(0)} experts, {self.down.size(1)} -> {self.down.size(2)}"


@FFN_REGISTRY("moe")
class MoE(FFN, WithFindings):
    """sum over the chosen experts e of weight_e * expert_e(x), plus the shared experts (DeepSeekMoE, eq. 3 to 5).

    Scores are softmax or sigmoid of a linear router in float32; the `experts_per_token` best are chosen, and their
    scores are the weights, divided by their sum where `normalize_router_weights` says so (Mixtral: softmax over the
    chosen). Experts and router have no biases, whatever `bias` is for the rest.

    Balance, over the N tokens of a micro-batch, with f_e the share of tokens that chose e and P_e its mean score
    (sigmoid scores divided by their sum):
    - load_balance_loss * E * sum_e f_e P_e in each layer (Switch, eq. 4 to 6; f sums to k, as in Mixtral's code);
    - router_z_loss * mean of logsumexp(logits)^2 in each layer (ST-MoE, eq. 5);
    - router_bias_rate: a bias joins the scores for choosing alone, and after each optimizer step moves by the rate
      times sign(mean load - load), over all tokens of the step (Wang et al. 2024, algorithm 1; DeepSeek-V3, 2.1.2).

    Capacity: with capacity_factor f > 0, training gives each expert ceil(f T k / E) places in each sequence of T
    tokens. Places are taken in order of position, a token's best choice first, so that no token sees a later one;
    GShard fills the first choices of all tokens before any second, which looks ahead. A choice that finds no place has
    the weight 0; it is computed all the same, so that shapes stay. Documents packed into a sequence share its places.
    Evaluation and generation drop nothing: there a prefix has to read the same alone as in a longer text.
    """

    residual_out = ()  # the experts and the shared ones say it themselves
    shapes_depend_on_data = True

    class Options(FFN.Options):
        ffn_multiplier: float = 8 / 3  # hidden width of an expert over n_embd
        n_experts: int = 8  # experts of each moe layer, beside the shared ones
        experts_per_token: int = 2  # experts that each token passes through
        n_shared_experts: int = 0  # experts that every token passes through (DeepSeekMoE)
        expert_hidden: int | None = None  # hidden width of one expert; None is ffn_hidden or ffn_multiplier's
        expert_type: str = "swiglu"  # what an expert is: swiglu, geglu, or standard with the activation
        router_score: str = "softmax"  # softmax (Switch, Mixtral) or sigmoid (DeepSeek-V3)
        normalize_router_weights: bool = True  # divide the chosen experts' weights by their sum
        load_balance_loss: float = 0.01  # weight of the loss that evens the load; 0 is none
        router_z_loss: float = 0.0  # weight of the mean of logsumexp(router logits)^2 (ST-MoE has 0.001)
        router_bias_rate: float = 0.0  # balance by a bias on the choice that moves this much a step; 0 is off
        capacity_factor: float = 0.0  # places per expert over an even share, in training; 0 drops no token

    def __init__(self, config, layer_index):
        super().__init__(config, layer_index)
        self.options = o = config.options_for(type(self))
        check_options(o)
        self.mixes_tokens = o.capacity_factor > 0  # tokens of a sequence then compete for places
        self.hidden = o.expert_hidden or self.hidden
        kind = FFN_REGISTRY[o.expert_type]
        is_gated = issubclass(kind, GatedFFN)
        activation = kind.gate_activation if is_gated else ACTIVATION_REGISTRY[config.activation]
        fraction = o.experts_per_token / o.n_experts
        self.router = nn.Linear(config.n_embd, o.n_experts, bias=False)
        self.experts = Experts(o.n_experts, config.n_embd, self.hidden, is_gated, activation, fraction)
        self.shared = None
        if o.n_shared_experts:  # side by side they are one network, n times as wide
            self.shared = kind(config.replace(ffn_hidden=o.n_shared_experts * self.hidden), layer_index)
        self.register_buffer("choice_bias", torch.zeros(o.n_experts) if o.router_bias_rate else None)
        self.own_init = ("choice_bias",) if o.router_bias_rate else ()

    @staticmethod
    def label(config):
        """Such as 'MoE8x2', or 'MoE64x6+2' with shared experts."""
        o = config.options_for(MoE)
        shared = f"+{o.n_shared_experts}" if o.n_shared_experts else ""
        return f"MoE{o.n_experts}x{o.experts_per_token}{shared}"

    def describe(self):
        o = self.options
        shared = f" + {o.n_shared_experts} shared" if o.n_shared_experts else ""
        return f"{o.experts_per_token} of {o.n_experts}{shared} {o.expert_type}, hidden {self.hidden}"

    def init_own_parameters(self, generator):
        self.choice_bias.zero_()

    def forward(self, x):
        logits = self.route(x)
        scores = torch.softmax(logits, dim=-1) if self.options.router_score == "softmax" else torch.sigmoid(logits)
        chosen, weights = self.choose(scores)
        loads = loads_of(chosen, self.options.n_experts)
        dropped = torch.zeros_like(loads[:1])
        if self.options.capacity_factor and self.training:
            has_place = self.has_place(chosen, x.size(-2))
            weights, dropped = weights * has_place, (~has_place).sum()[None]
        if torch.is_grad_enabled():
            self.find(self.auxiliary_loss(logits, scores, loads), torch.cat((loads, dropped)))
        y = self.experts(x.flatten(0, -2), chosen, weights.to(x.dtype)).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def route(self, x):
        """(B, T, C) -> router logits (N, E), in float32 at least: half precision has too few digits to rank experts."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.flatten(0, -2).to(self.router.weight.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def choose(self, scores):
        """scores (N, E) -> the experts of each token, best first, and their weights: (N, k) int64, (N, k)."""
        o = self.options
        ranked = scores if self.choice_bias is None else scores.detach() + self.choice_bias
        chosen = ranked.topk(o.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) if o.normalize_router_weights else weights

    def has_place(self, chosen, T):
        """Experts of each token (N, k) -> bool (N, k): whether fewer than the capacity came before, in the sequence."""
        n_experts, k = self.options.n_experts, chosen.size(-1)
        capacity = math.ceil(self.options.capacity_factor * T * k / n_experts)
        in_order = F.one_hot(chosen.view(-1, T * k), n_experts)  # (B, T k, E), by position, then by rank
        before = (in_order.cumsum(1) - in_order).gather(-1, chosen.view(-1, T * k, 1))
        return (before < capacity).view_as(chosen)

    def auxiliary_loss(self, logits, scores, loads):
        """What balancing adds to the loss per token: a scalar."""
        o, loss = self.options, logits.new_zeros(())
        if o.load_balance_loss:
            shares = scores if o.router_score == "softmax" else scores / scores.sum(-1, keepdim=True)
            f = loads.to(scores.dtype) / scores.size(0)
            loss = loss + o.load_balance_loss * o.n_experts * (f * shares.mean(0)).sum()
        if o.router_z_loss:
            loss = loss + o.router_z_loss * torch.logsumexp(logits, dim=-1).square().mean()
        return loss

    @torch.no_grad()
    def after_step(self, counts):
        if self.choice_bias is not None:
            loads = counts[:-1].to(self.choice_bias.dtype)
            self.choice_bias += self.options.router_bias_rate * torch.sign(loads.mean() - loads)

    def report(self, counts):
        *loads, dropped = counts.tolist()
        shares = [load / sum(loads) for load in loads]
        entropy = -sum(share * math.log(share) for share in shares if share)
        return {
            "expert_load": shares,
            "expert_max_load": max(shares) * len(shares),  # 1 is even
            "expert_entropy": entropy / math.log(max(2, len(shares))),  # 1 is even
            "dropped_tokens": dropped / sum(loads),  # choices without a place, over all choices
        }


def loads_of(chosen, n_experts):
    """Experts of each token (N, k) -> how many tokens chose each (E,) int64; sums of a fixed shape, so it compiles."""
    return (chosen.flatten()[:, None] == torch.arange(n_experts, device=chosen.device)).sum(0)


def check_options(o):
    """Refuse what no mixture can be.

    Raises:
        UserError: in a sentence naming the settings.
    """
    for name in ("n_experts", "experts_per_token") + (("expert_hidden",) if o.expert_hidden is not None else ()):
        if getattr(o, name) < 1:
            raise UserError(f"{name}={getattr(o, name)} must be at least 1")
    for name in ("n_shared_experts", "load_balance_loss", "router_z_loss", "router_bias_rate", "capacity_factor"):
        if not getattr(o, name) >= 0:
            raise UserError(f"{name}={getattr(o, name)} must not be below 0")
    if o.experts_per_token > o.n_experts:
        raise UserError(f"experts_per_token={o.experts_per_token} is more than there are: n_experts={o.n_experts}")
    if o.experts_per_token == 1 and o.normalize_router_weights:
        raise UserError(
            "experts_per_token=1 with normalize_router_weights=True gives every expert the weight 1 and the router no "
            "gradient; set normalize_router_weights=False"
        )
    for name, allowed in (("router_score", ("softmax", "sigmoid")), ("expert_type", ("swiglu", "geglu", "standard"))):
        if getattr(o, name) not in allowed:
            raise UserError(f"{name}={getattr(o, name)!r} must be {', '.join(allowed[:-1])} or {allowed[-1]}")
