"""`ConfigurableGPT`: a language model assembled by name from the registries.

    model = ConfigurableGPT(ModelArchitectureConfig.from_preset('llama', vocab_size=256))
    logits, loss = model(idx, targets)              # as in nanoGPT
    text = model.generate(idx, max_new_tokens=100)  # with a KV cache or a recurrent state

Importing this module fills the registries. It is the only one that imports `mixer_*.py`.
"""

import contextlib
import importlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixer_attention import MIXER_REGISTRY, Mixer
from model_checks import check_parts
from model_components import (
    FFN_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    HeadTransform,
    ResidualScale,
    WithFindings,
)
from model_config import GPT2_VOCAB_SIZE, IGNORE_INDEX
from model_parameters import initialise, parameter_plan  # noqa: F401  (the table is asked for here)
from user_errors import UserError

importlib.import_module("model_moe")  # registers itself
# A new mixer_*.py registers itself by lying beside this file: adding a part edits no list.
for _path in sorted(Path(__file__).parent.glob("mixer_*.py")):
    importlib.import_module(_path.stem)


class NotFiniteError(UserError):
    """A model whose logits are NaN or infinite was asked for text or for its likelihood."""

    def __init__(self):
        super().__init__(
            "the model's logits are not finite, so it can write and score nothing: its training diverged, or half "
            "precision overflows; take an earlier checkpoint"
        )


# ---- the network ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two slots, a mixer and an FFN, each a branch added to the residual stream.

    norm_position places the norms: 'pre' x + f(norm(x)), 'post' norm(x + f(x)), 'output' x + norm(f(x)) (OLMo 2),
    'sandwich' x + norm(f(norm(x))).
    """

    def __init__(self, config, layer_index):
        super().__init__()
        mixer, ffn = config.blocks()[layer_index]
        norm = NORM_REGISTRY[config.normalization]
        width, self.norm_position, self.parallel = config.n_embd, config.norm_position, config.parallel_blocks
        self.mixer = build_mixer(mixer, config, layer_index)
        self.ffn = FFN_REGISTRY[ffn](config, layer_index) if ffn != "none" else None
        self.carries = getattr(self.mixer, "carries", False)
        self.ffn_looks_back = getattr(self.ffn, "looks_back", False)
        self.mixer_norm = norm(width, config)
        self.ffn_norm = norm(width, config) if self.ffn is not None and not self.parallel else None
        sandwich = config.norm_position == "sandwich"
        self.mixer_out_norm = norm(width, config) if sandwich else None
        self.ffn_out_norm = norm(width, config) if sandwich and self.ffn is not None else None
        self.mixer_scale = ResidualScale(config)
        self.ffn_scale = ResidualScale(config) if self.ffn is not None else None
        self.dropout = config.dropout

    def forward(self, x, positions=None, document_ids=None, carried=None):
        """x (B, T, C) -> x; with `carried`, the dict that mixers hand on to later blocks -> (x, carried)."""
        handed_on = carried

        def mix(h):
            nonlocal handed_on
            if carried is None or not self.carries:
                return self.mixer(h, positions, document_ids)
            y, handed_on = self.mixer(h, positions, document_ids, carried)
            return y

        def feed(h):
            return self.ffn(h, document_ids) if self.ffn_looks_back else self.ffn(h)

        x = self._through(x, mix, feed)
        return x if carried is None else (x, handed_on)

    def step(self, x, state, carried=None):
        """x (B, S, C), the next tokens -> (x, state), with `carried` as in forward -> (x, state, carried)."""
        after, handed_on = {}, carried

        def mix(h):
            nonlocal handed_on
            if carried is None or not self.carries:
                y, after["mixer"] = self.mixer.step(h, state["mixer"])
            else:
                y, after["mixer"], handed_on = self.mixer.step(h, state["mixer"], carried)
            return y

        def feed(h):
            if not self.ffn_looks_back:
                return self.ffn(h)
            y, after["ffn"] = self.ffn.step(h, state["ffn"])
            return y

        x = self._through(x, mix, feed)
        return (x, after) if carried is None else (x, after, handed_on)

    def _with_state(self):
        """{slot: part} of the parts that keep a state."""
        return {"mixer": self.mixer} | ({"ffn": self.ffn} if self.ffn_looks_back else {})

    def init_state(self, batch, device=None, dtype=None):
        """{slot: its state before the first token}."""
        return {slot: part.init_state(batch, device, dtype) for slot, part in self._with_state().items()}

    def state_bytes(self, T, dtype=torch.float32):
        """Bytes that one sequence must keep to continue at context T."""
        return sum(part.state_bytes(T, dtype) for part in self._with_state().values())

    def _through(self, x, mix, feed):
        if self.parallel and self.ffn is not None:
            h = self.mixer_norm(x)
            return (
                x
                + self._branch(mix(h), self.mixer_out_norm, self.mixer_scale)
                + self._branch(feed(h), self.ffn_out_norm, self.ffn_scale)
            )
        x = self._residual(x, mix, self.mixer_norm, self.mixer_out_norm, self.mixer_scale)
        if self.ffn is not None:
            x = self._residual(x, feed, self.ffn_norm, self.ffn_out_norm, self.ffn_scale)
        return x

    def _residual(self, x, f, norm, out_norm, scale):
        if self.norm_position == "post":
            return norm(x + self._branch(f(x), out_norm, scale))
        if self.norm_position == "output":
            return x + self._branch(f(x), norm, scale)
        return x + self._branch(f(norm(x)), out_norm, scale)

    def _branch(self, y, out_norm, scale):
        y = F.dropout(y, self.dropout, self.training) if self.dropout else y
        return scale(y if out_norm is None else out_norm(y))


class ParallelMixers(Mixer):
    """Several mixers that read the same input and are added together: heads of two kinds in one layer.

    The sum is Falcon-H1's (Zuo et al. 2025, section 2.1) at multipliers of 1; Hymba (Dong et al. 2024) averages.
    """

    def __init__(self, mixers):
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.carries = any(mixer.carries for mixer in mixers)

    def forward(self, x, positions=None, document_ids=None, carried=None):
        y, handed_on = [], carried
        for mixer in self.mixers:
            if carried is None or not mixer.carries:
                y.append(mixer(x, positions, document_ids))
            else:
                of_this, handed_on = mixer(x, positions, document_ids, handed_on)
                y.append(of_this)
        return sum(y) if carried is None else (sum(y), handed_on)

    def describe(self):
        return " | ".join(filter(None, (mixer.describe() for mixer in self.mixers)))

    def check_device(self, device):
        for mixer in self.mixers:
            mixer.check_device(device)

    def init_state(self, batch, device=None, dtype=None):
        return [mixer.init_state(batch, device, dtype) for mixer in self.mixers]

    def step(self, x, state, carried=None):
        y, after, handed_on = [], [], carried
        for mixer, before in zip(self.mixers, state, strict=True):
            if carried is None or not mixer.carries:
                of_this, held = mixer.step(x, before)
            else:
                of_this, held, handed_on = mixer.step(x, before, handed_on)
            y.append(of_this)
            after.append(held)
        return (sum(y), after) if carried is None else (sum(y), after, handed_on)

    def mixing_flops(self, T):
        return sum(mixer.mixing_flops(T) for mixer in self.mixers)

    def elementwise_flops(self, T):
        return sum(mixer.elementwise_flops(T) for mixer in self.mixers)

    def state_bytes(self, T, dtype=torch.float32):
        return sum(mixer.state_bytes(T, dtype) for mixer in self.mixers)


def build_mixer(names, config, layer_index):
    """The mixer of one block: 'attention', or several side by side, 'mamba2+attention'."""
    mixers = [MIXER_REGISTRY[name](config, layer_index) for name in names.split("+")]
    return mixers[0] if len(mixers) == 1 else ParallelMixers(mixers)


class ConfigurableGPT(nn.Module):
    """Token embedding, blocks, final norm, output head.

    Args:
        config: ModelArchitectureConfig.
        seed: decides the initial weights, each a pure function of (seed, parameter name, shape).
        heads: {name: outputs} of what an objective reads beside the next token: `model.heads[name]`, a linear layer on
            the same hidden states. The weights of all else are as they are without.

    Raises:
        UserError: parts that do not go together, in a sentence naming both settings.
    """

    def __init__(self, config, seed=1337, heads=None):
        super().__init__()
        self.config = config
        check_parts(config)
        vocab_size = config.vocab_size or GPT2_VOCAB_SIZE
        encoding = POSITION_ENCODING_REGISTRY[config.position_encoding]
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding = encoding(config) if encoding.adds_to_embedding else None
        norm = NORM_REGISTRY[config.normalization]
        self.embedding_norm = norm(config.n_embd, config) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = norm(config.n_embd, config) if self._needs_final_norm else None
        self.head_transform = HeadTransform(config) if config.head_transform else None
        self.head = nn.Linear(config.n_embd, vocab_size, bias=config.head_transform)
        self.heads = nn.ModuleDict({name: nn.Linear(config.n_embd, n) for name, n in (heads or {}).items()})
        self._mixing_ffns = any(getattr(block.ffn, "mixes_tokens", False) for block in self.blocks)
        self._carries = any(block.carries for block in self.blocks)
        self._finding = [(name, part) for name, part in self.named_modules() if isinstance(part, WithFindings)]
        initialise(self, seed)

    @property
    def _needs_final_norm(self):
        return self.config.norm_position != "post"  # a post-norm block ends in a norm already

    def check_device(self, device):
        """Refuse a device that a mixer cannot train on, with a UserError."""
        for block in self.blocks:
            block.mixer.check_device(device)

    def hidden_states(self, idx, positions=None, document_ids=None, places=None):
        """idx (B, T) -> (B, T, C), what the head reads; with places (B, K) int64 into T, only there: (B, K, C)."""
        if self.position_embedding is not None and idx.size(1) > self.config.block_size:
            raise UserError(
                f"{idx.size(1)} tokens do not fit position_encoding='{self.config.position_encoding}' of "
                f"block_size={self.config.block_size}; shorten the text, or train with a larger block_size"
            )
        if document_ids is not None and self._mixing_ffns:
            raise UserError(
                "capacity_factor above 0 lets the documents of a sequence compete for the places of experts; "
                "use capacity_factor=0 with packed documents"
            )
        x = self.through_blocks(self._embed(idx, positions), positions, document_ids)
        return self._before_head(x if places is None else x.take_along_dim(places[:, :, None], dim=1))

    def through_blocks(self, x, positions=None, document_ids=None):
        """x (B, T, C) of the embeddings -> (B, T, C) after the last block."""
        carried = {} if self._carries else None
        for block in self.blocks:
            if carried is None:
                x = block(x, positions, document_ids)
            else:
                x, carried = block(x, positions, document_ids, carried)
        return x

    def _before_head(self, x):
        """(..., C) of the last block -> (..., C), what the head reads."""
        x = x if self.final_norm is None else self.final_norm(x)
        return x if self.head_transform is None else self.head_transform(x)

    def _embed(self, idx, positions):
        x = self.token_embedding(idx)  # (B, T, C)
        if self.position_embedding is not None:
            positions = torch.arange(idx.size(1), device=idx.device) if positions is None else positions
            x = x + self.position_embedding.embed(positions)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def logits(self, hidden):
        """(..., C) -> (..., V), soft-capped where the config says so."""
        return soft_cap(self.head(hidden), self.config.logit_soft_cap)

    def forward(self, idx, targets=None, positions=None, document_ids=None):
        """idx (B, T) -> (logits (B, T, V), loss).

        The loss is the mean cross-entropy over targets (B, T) that are not IGNORE_INDEX, None without targets.
        Training goes through `training_objectives`, which never holds all logits at a large vocabulary.
        """
        logits = self.logits(self.hidden_states(idx, positions, document_ids))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)
        return logits, loss

    # -- what parts find beside their output: losses of their own, counts (see `WithFindings`)

    def listen(self):
        """From here to `take_findings`, keep what parts find."""
        for _, part in self._finding:
            part.is_heard, part.found = True, None

    def take_findings(self):
        """(auxiliary loss per token, {part: its counts}) of the forward since `listen`; 0.0 and {} where none spoke."""
        loss, counts = 0.0, {}
        for name, part in self._finding:
            if part.found is not None:
                loss, counts[name] = loss + part.found[0], part.found[1]
            part.is_heard, part.found = False, None
        return loss, counts

    def after_step(self, counts):
        """Hand each part its counts of an optimizer step, summed over micro-batches and ranks."""
        for name, part in self._finding:
            if name in counts:
                part.after_step(counts[name])

    def report(self, counts):
        """Counts summed over any time -> {name: {part: number or list}}, for a logged row."""
        rows = {}
        for name, part in self._finding:
            for key, value in (part.report(counts[name]) if name in counts else {}).items():
                rows.setdefault(key, {})[name] = value
        return rows

    # -- one token at a time

    def init_state(self, batch, device=None, dtype=None):
        """The state before the first token: one entry per block, and how many tokens it has seen.

        Raises:
            UserError: a model that is not causal, here as in `step` and `generate`.
        """
        self._require_causal()
        device = device or self.head.weight.device
        dtype = dtype or self.head.weight.dtype
        return {"length": 0, "blocks": [block.init_state(batch, device, dtype) for block in self.blocks]}

    def step(self, idx, state):
        """idx (B, S), the next tokens -> (logits (B, S, V), state)."""
        self._require_causal()
        new = torch.arange(state["length"], state["length"] + idx.size(1), device=idx.device)
        x, states, carried = self._embed(idx, new), [], {} if self._carries else None
        for block, before in zip(self.blocks, state["blocks"], strict=True):
            if carried is None:
                x, after = block.step(x, before)
            else:
                x, after, carried = block.step(x, before, carried)
            states.append(after)
        return self.logits(self._before_head(x)), {"length": state["length"] + idx.size(1), "blocks": states}

    def _require_causal(self):
        if not self.config.causal:
            raise UserError("causal=False lets a token see those after it, so no text can be written token by token")

    def context_limit(self):
        """Tokens that generation may look back on: block_size, or None when every block's state has one size."""
        T = 4 * self.config.block_size
        grows = any(block.state_bytes(T) > block.state_bytes(T // 4) for block in self.blocks)
        return self.config.block_size if grows or self.position_embedding is not None else None

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, use_cache=True, stop=None
    ):
        """idx (B, T) -> (B, T + max_new_tokens), sampled token by token.

        When the context is full, its older half is forgotten and the rest read again, with a cache or without, so that
        both give the same tokens. temperature=0 takes the likeliest token. `stop` takes what is there after each token,
        (B, T + n), and ends it early where it says True.

        Raises:
            NotFiniteError: logits that are not finite, told at the end, so that a GPU is never waited for.
        """
        self._require_causal()
        was_training = self.training
        self.eval()
        limit = self.context_limit()
        context, state = idx[:, -limit:] if limit else idx, None
        is_finite = torch.ones((), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if limit and context.size(1) > limit:
                context, state = context[:, -max(1, limit // 2) :], None
            if not use_cache:
                logits = self.logits(self.hidden_states(context)[:, -1])
            elif state is None:
                logits, state = self.step(context, self.init_state(idx.size(0)))
            else:
                logits, state = self.step(context[:, -1:], state)
            logits = logits[:, -1] if logits.dim() == 3 else logits
            is_finite = is_finite & logits.isfinite().all()
            logits = logits.nan_to_num()  # on a GPU a draw from NaN ends the process
            token = sample_token(logits, temperature, top_k, top_p, generator)  # (B, 1)
            idx, context = torch.cat((idx, token), dim=1), torch.cat((context, token), dim=1)
            if stop is not None and stop(idx):
                break
        self.train(was_training)
        if not is_finite:
            raise NotFiniteError()
        return idx


def soft_cap(logits, cap):
    """cap * tanh(logits / cap) (Gemma 2, section 2); 0 leaves them alone."""
    return cap * torch.tanh(logits / cap) if cap else logits


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """(B, V) -> (B, 1): drawn from the softmax at `temperature`, cut to the top_k likeliest and to top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        past = ordered.cumsum(dim=-1) - ordered >= top_p
        past[:, 0] = False  # the likeliest token always stays
        probabilities = probabilities.scatter(-1, index, ordered.masked_fill(past, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)


@contextlib.contextmanager
def on_meta():
    """Build without memory, to count."""
    with torch.device("meta"):
        yield
