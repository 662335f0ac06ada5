"""Other people's programs beside ours, each at the shape of one of our models: same widths, depth, vocabulary, loss.

    peer = find_peers("transformers,nanogpt:../nanoGPT")[0]
    if peer.matches(model):               # the program has such an architecture
        beside = peer.counterpart(model)  # a PeerModel

A peer trains as its own users train it: its own modules and, where it brings one, its own optimizer.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from model_config import IGNORE_INDEX
from user_errors import UserError, did_you_mean


@dataclass(frozen=True)
class PeerModel:
    """A peer at one of our shapes."""

    name: str  # such as 'transformers Llama'
    version: str
    module: nn.Module  # batch -> sums, as an objective of ours does
    generate: Any  # (idx (1, T), n) -> idx (1, T + n), the likeliest token each time
    optimizer: Any = None  # (train config, device) -> torch optimizer; None is AdamW as ours is


class PeerObjective(nn.Module):
    """Next-token cross-entropy, summed: `loss_of(model, inputs, targets)` is its mean, as the program gives it."""

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, batch):
        tokens = (batch["targets"] != IGNORE_INDEX).sum()
        nats = self.loss_of(self.model, batch["inputs"], batch["targets"]) * tokens
        return {"loss": nats, "nats": nats.detach(), "tokens": tokens}


def cross_entropy(logits, targets):
    """Mean over targets, from logits (B, T, V) in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)


def find_peers(text):
    """Peers from 'transformers,mambapy,nanogpt:PATH'.

    Raises:
        UserError: a name that is no peer, a package that is not installed, a path that is no checkout.
    """
    peers = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, path = word.partition(":")
        if name not in PEERS:
            raise UserError(
                f"--peers={text}: '{name}' is no peer{did_you_mean(name, PEERS)} (known: {', '.join(PEERS)})"
            )
        if any(type(peer) is PEERS[name] for peer in peers):
            raise UserError(f"--peers={text} names '{name}' twice")
        peers.append(PEERS[name](path))
        peers[-1].text = word
    return peers


def _import(package, path, *modules):
    """Modules of an installed package, or a sentence that says how to install it."""
    if path:
        raise UserError(f"--peers={package}:{path}: {package} is an installed package and takes no path")
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise UserError(f"--peers={package} needs the package ({error}): pip install {package}") from None


def _kind(model):
    """(mixers, position encoding, FFNs) that say which architecture this is."""
    blocks = model.config.blocks()
    return ({mixer for mixer, _ in blocks}, model.config.position_encoding, {ffn for _, ffn in blocks})


def _is_whole(model):
    """Whether the inner width is a whole multiple of the outer one, as peers have it."""
    options = getattr(model.blocks[0].mixer, "options", None)
    return getattr(options, "expand", 1) % 1 == 0


# ---- transformers ----------------------------------------------------------------------------------------------------


class Transformers:
    """Hugging Face's classes, with random weights."""

    name = "transformers"

    def __init__(self, path=""):
        (self.package,) = _import(self.name, path, "transformers")
        self.package.logging.set_verbosity_error()  # it advises CUDA packages, at length

    def matches(self, model):
        return self._shape_of(model) is not None

    def _shape_of(self, model):
        fitting = [row[-1] for row in TRANSFORMERS_TABLE if _kind(model) == ({row[0]}, row[1], {row[2]})]
        return fitting[0] if fitting and _is_whole(model) else None

    def counterpart(self, model):
        kind, values = self._shape_of(model)(model.config, model.blocks[0])
        shape = dict(vocab_size=model.head.out_features, tie_word_embeddings=model.config.weight_tying,
                     bos_token_id=0, eos_token_id=None, pad_token_id=None)  # fmt: skip
        config = getattr(self.package, f"{kind}Config")(**shape, **values)
        class_ = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
        peer = getattr(self.package, class_)(config)

        def loss_of(peer, inputs, targets):
            return cross_entropy(peer(input_ids=inputs, use_cache=False).logits, targets)

        def generate(idx, n):
            was_training = peer.training
            peer.eval()
            out = peer.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n,
                                do_sample=False, use_cache=True, pad_token_id=0)  # fmt: skip
            peer.train(was_training)
            return out

        name = f"transformers {kind}"
        return PeerModel(name, self.package.__version__, PeerObjective(peer, loss_of), generate)


def _gpt2(config, block):
    o = dict(n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head)
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    return "GPT2", {**o, **dropouts, "n_inner": block.ffn.hidden, "activation_function": activation}


def _llama_shape(config, block):
    return dict(
        hidden_size=config.n_embd, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=block.mixer.n_kv_head, max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps, intermediate_size=block.ffn.hidden,
    )  # fmt: skip


def _llama(config, block):
    return "Llama", {**_llama_shape(config, block), "attention_bias": config.bias, "mlp_bias": config.bias}


def _mixtral(config, block):
    o = config.options_for(type(block.ffn))
    experts = dict(num_local_experts=o.n_experts, num_experts_per_tok=o.experts_per_token, output_router_logits=False)
    return "Mixtral", {**_llama_shape(config, block), **experts, "sliding_window": None}


def _state_space(config, block):
    o = block.mixer.options
    return dict(
        hidden_size=config.n_embd, num_hidden_layers=config.n_layer, state_size=o.d_state, conv_kernel=o.d_conv,
        expand=int(o.expand), use_bias=config.bias, use_conv_bias=o.conv_bias, layer_norm_epsilon=config.norm_eps,
    )  # fmt: skip


def _mamba(config, block):
    return "Mamba", {**_state_space(config, block), "time_step_rank": block.mixer.dt_rank}


def _mamba2(config, block):
    m = block.mixer
    heads = dict(num_heads=m.n_heads, head_dim=m.headdim, n_groups=m.ngroups, chunk_size=m.options.chunk_size)
    return "Mamba2", {**_state_space(config, block), **heads}


TRANSFORMERS_TABLE = [  # mixer, position encoding, FFN in every block
    ("attention", "learned_absolute", "standard", _gpt2),
    ("attention", "rope", "swiglu", _llama),
    ("attention", "rope", "moe", _mixtral),
    ("mamba", "none", "none", _mamba),
    ("mamba2", "none", "none", _mamba2),
]


# ---- mambapy ---------------------------------------------------------------------------------------------------------


class MambaPy:
    """Mamba-1 in plain PyTorch with a parallel scan."""

    name = "mambapy"

    def __init__(self, path=""):
        (self.package,) = _import(self.name, path, "mambapy.mamba")
        self.version = importlib.metadata.version(self.name)

    def matches(self, model):
        return _kind(model) == ({"mamba"}, "none", {"none"}) and _is_whole(model)

    def counterpart(self, model):
        config, m = model.config, model.blocks[0].mixer
        o = m.options
        shape = self.package.MambaConfig(
            d_model=config.n_embd, n_layers=config.n_layer, d_state=o.d_state, expand_factor=int(o.expand),
            d_conv=o.d_conv, dt_rank=m.dt_rank, bias=config.bias, conv_bias=o.conv_bias, rms_norm_eps=config.norm_eps,
        )  # fmt: skip
        peer = MambaPyLM(self.package, shape, model.head.out_features, config.weight_tying)

        def loss_of(peer, inputs, targets):
            return cross_entropy(peer(inputs), targets)

        return PeerModel("mambapy Mamba", self.version, PeerObjective(peer, loss_of), peer.generate)


class MambaPyLM(nn.Module):
    """Its blocks and norm between an embedding and a head; its own `mambapy.lm` imports CUDA packages."""

    def __init__(self, package, shape, vocab_size, weight_tying):
        super().__init__()
        self.shape, self.blocks = shape, package.Mamba(shape)
        self.embedding, self.norm = nn.Embedding(vocab_size, shape.d_model), package.RMSNorm(shape.d_model)
        self.head = nn.Linear(shape.d_model, vocab_size, bias=False)
        if weight_tying:
            self.head.weight = self.embedding.weight

    def forward(self, idx):
        return self.head(self.norm(self.blocks(self.embedding(idx))))

    @torch.no_grad()
    def generate(self, idx, n):
        """A prompt is read token by token, as its own generate does."""
        inputs = torch.zeros(1, self.shape.d_inner, self.shape.d_conv - 1, device=idx.device)
        caches = [(None, inputs) for _ in range(self.shape.n_layers)]
        for t in range(idx.size(1) + n - 1):
            x, caches = self.blocks.step(self.embedding(idx[:, t]), caches)
            if t + 1 >= idx.size(1):
                idx = torch.cat((idx, self.head(self.norm(x)).argmax(-1, keepdim=True)), dim=1)
        return idx


# ---- nanoGPT ---------------------------------------------------------------------------------------------------------


class NanoGPT:
    """A checkout of nanoGPT, which is no package."""

    name = "nanogpt"

    def __init__(self, path=""):
        source = Path(path) / "model.py"
        if not path or not source.is_file():
            raise UserError(f"--peers=nanogpt:PATH needs the path of a nanoGPT checkout; {source} does not exist")
        spec = importlib.util.spec_from_file_location("nanogpt_model", source)
        self.package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.package)

    def matches(self, model):
        config = model.config
        if _kind(model) != ({"attention"}, "learned_absolute", {"standard"}):
            return False
        is_usual = config.weight_tying and config.activation == "gelu"
        return is_usual and model.blocks[0].mixer.n_kv_head == config.n_head

    def counterpart(self, model):
        config = model.config
        shape = self.package.GPTConfig(
            block_size=config.block_size, vocab_size=model.head.out_features, n_layer=config.n_layer,
            n_head=config.n_head, n_embd=config.n_embd, dropout=config.dropout, bias=config.bias,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
            peer = self.package.GPT(shape)

        def loss_of(peer, inputs, targets):
            return peer(inputs, targets)[1]

        def generate(idx, n):
            return peer.generate(idx, n, top_k=1)

        def optimizer(train, device):
            betas = (train.beta1, train.beta2)
            with contextlib.redirect_stdout(io.StringIO()):
                return peer.configure_optimizers(train.weight_decay, train.learning_rate, betas, device.type)

        return PeerModel("nanoGPT", "a checkout", PeerObjective(peer, loss_of), generate, optimizer)


PEERS = {peer.name: peer for peer in (Transformers, MambaPy, NanoGPT)}
