"""The whole model: nanoGPT's interface, blocks against equations, transformers as oracle, generation, refusals."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model_interop as interop
from mixer_attention import MIXER_REGISTRY, Mixer
from model_builder import (
    Block,
    ConfigurableGPT,
    on_meta,
    parameter_plan,
    sample_token,
    soft_cap,
)
from model_checks import check_parts, notes, unused_options
from model_components import POSITION_ENCODING_REGISTRY, ALiBi, LearnedAbsolute, RoPE
from model_config import IGNORE_INDEX, ModelArchitectureConfig
from model_helpers import scrambled
from model_interop_rules import HF_CLASS_REGISTRY
from training_config import TrainConfig
from training_objectives import MaskedLM
from user_errors import UserError

EXACT = {"rtol": 1e-10, "atol": 1e-10}
V = 29


def tokens(b=2, t=16, seed=4):
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(seed))


# ---- nanoGPT's interface --------------------------------------------------------------------------------------------


def test_forward_returns_logits_and_loss_as_in_nanogpt(tiny):
    model, idx, targets = scrambled(ConfigurableGPT(tiny())), tokens(), tokens(seed=5)
    logits, nothing = model(idx)
    assert logits.shape == (2, 16, V) and nothing is None
    logits, loss = model(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(-1, V), targets.view(-1)))
    by_hand = -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss, by_hand)


def test_targets_that_are_not_supervised_do_not_count(tiny):
    model, idx, targets = scrambled(ConfigurableGPT(tiny())), tokens(), tokens(seed=5)
    targets[:, :10] = IGNORE_INDEX
    logits, loss = model(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 10:].reshape(-1, V), targets[:, 10:].reshape(-1)))


def test_the_loss_at_the_start_is_that_of_knowing_nothing(tiny):
    _, loss = ConfigurableGPT(tiny(vocab_size=500))(tokens(), tokens(seed=5))
    assert loss.item() == pytest.approx(torch.tensor(500.0).log().item(), rel=0.02)


@pytest.mark.parametrize("preset, size, parameters", [
    ("gpt2", "124M", 124_439_808),  # tied, with 1,024 positions
    ("gpt2", "350M", 354_823_168),
    ("gpt2_postnorm", "124M", 124_438_272),  # no final norm
    # 50,257 x 768 twice, 12 x (4 x 768^2 + 3 x 768 x 2048 + 2 x 768), 768
    ("llama", "124M", 2 * 50257 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768),
])  # fmt: skip
def test_parameters_of_known_models(preset, size, parameters):
    with on_meta():
        model = ConfigurableGPT(ModelArchitectureConfig.from_preset(preset, model_size=size, block_size=1024))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_the_tied_head_is_the_embedding(tiny, tied):
    model = ConfigurableGPT(tiny(weight_tying=tied))
    assert (model.head.weight is model.token_embedding.weight) == tied
    names = [spec.name for spec in parameter_plan(model)]
    assert ("head.weight" in names) != tied
    model(tokens(), tokens(seed=5))[1].backward()
    rows_with_gradient = model.token_embedding.weight.grad.any(dim=1)
    assert rows_with_gradient.all() == tied  # through the head every row learns, through the lookup those that occur


def test_a_vocabulary_that_nobody_gave_is_gpt2s(tiny):
    with on_meta():
        assert ConfigurableGPT(tiny(vocab_size=None)).head.out_features == 50257


def test_dropout_acts_in_training_alone(tiny):
    model, idx = scrambled(ConfigurableGPT(tiny(dropout=0.3))), tokens()
    without = scrambled(ConfigurableGPT(tiny()))
    assert torch.equal(model.eval()(idx)[0], without(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_dropout_falls_on_the_embedding_and_both_branches(tiny, monkeypatch):
    # nanoGPT's four places: embedding, attention weights (inside the kernel), and the two branches.
    dropped = []
    real = F.dropout
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, p=0.5, training=True, inplace=False:
                        dropped.append((tuple(x.shape), p, training)) or real(x, p, training, inplace))  # fmt: skip
    ConfigurableGPT(tiny(dropout=0.3, n_layer=1))(tokens())
    assert dropped == [((2, 16, 16), 0.3, True)] * 3


# ---- blocks against their equations ---------------------------------------------------------------------------------

S = (2 * 2) ** -0.5  # 1 / sqrt(2 n_layer) of two layers

BLOCKS = {  # (config changes, the block written out; m: mixer, f: FFN, n1 n2: norms before, o1 o2: norms after)
    "pre": ({}, lambda x, m, f, n1, n2, o1, o2: (h := x + m(n1(x))) + f(n2(h))),
    "post": ({"norm_position": "post"}, lambda x, m, f, n1, n2, o1, o2: n2((h := n1(x + m(x))) + f(h))),
    "output": ({"norm_position": "output"}, lambda x, m, f, n1, n2, o1, o2: (h := x + n1(m(x))) + n2(f(h))),
    "sandwich": ({"norm_position": "sandwich"}, lambda x, m, f, n1, n2, o1, o2: (h := x + o1(m(n1(x)))) + o2(f(n2(h)))),
    "parallel": ({"parallel_blocks": True}, lambda x, m, f, n1, n2, o1, o2: x + m(n1(x)) + f(n1(x))),
    "parallel-sandwich": ({"parallel_blocks": True, "norm_position": "sandwich"},
                          lambda x, m, f, n1, n2, o1, o2: x + o1(m(n1(x))) + o2(f(n1(x)))),
    "depth": ({"residual_scaling": "depth"}, lambda x, m, f, n1, n2, o1, o2: (h := x + S * m(n1(x))) + S * f(n2(h))),
    "depth-post": ({"residual_scaling": "depth", "norm_position": "post"},
                   lambda x, m, f, n1, n2, o1, o2: n2((h := n1(x + S * m(x))) + S * f(h))),
    "depth-sandwich": ({"residual_scaling": "depth", "norm_position": "sandwich"},
                       lambda x, m, f, n1, n2, o1, o2: (h := x + S * o1(m(n1(x)))) + S * o2(f(n2(h)))),
    "depth-parallel": ({"residual_scaling": "depth", "parallel_blocks": True},
                       lambda x, m, f, n1, n2, o1, o2: x + S * m(n1(x)) + S * f(n1(x))),
    "no-ffn": ({"block_pattern": "attention/none"}, lambda x, m, f, n1, n2, o1, o2: x + m(n1(x))),
    "no-ffn-post": ({"block_pattern": "attention/none", "norm_position": "post"},
                    lambda x, m, f, n1, n2, o1, o2: n1(x + m(x))),
    "no-ffn-sandwich": ({"block_pattern": "attention/none", "norm_position": "sandwich"},
                        lambda x, m, f, n1, n2, o1, o2: x + o1(m(n1(x)))),
    "no-ffn-parallel": ({"block_pattern": "attention/none", "parallel_blocks": True},
                        lambda x, m, f, n1, n2, o1, o2: x + m(n1(x))),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_equation(tiny, name):
    changes, written_out = BLOCKS[name]
    block = scrambled(Block(tiny(**changes), 0)).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    parts = (block.mixer, block.ffn, block.mixer_norm, block.ffn_norm, block.mixer_out_norm, block.ffn_out_norm)
    torch.testing.assert_close(block(x), written_out(x, *parts), **EXACT)
    used = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    assert {id(parameter) for parameter in block.parameters()} == used, "a parameter that no equation has"


def test_mixers_side_by_side_are_added(tiny):
    block = scrambled(Block(tiny(block_pattern="attention+mamba/none"), 0)).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    h, (attention, mamba) = block.mixer_norm(x), block.mixer.mixers
    assert type(attention).__name__ == "Attention" and type(mamba).__name__ == "Mamba"
    torch.testing.assert_close(block(x), x + attention(h) + mamba(h), **EXACT)
    assert block.mixer.state_bytes(9) == attention.state_bytes(9) + mamba.state_bytes(9)
    assert block.mixer.mixing_flops(9) == attention.mixing_flops(9) + mamba.mixing_flops(9)


def test_learned_scaling_is_a_gain_per_channel(tiny):
    block = scrambled(Block(tiny(residual_scaling="learned"), 0)).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    h = x + block.mixer_scale.gain * block.mixer(block.mixer_norm(x))
    torch.testing.assert_close(block(x), h + block.ffn_scale.gain * block.ffn(block.ffn_norm(h)), **EXACT)
    assert block.mixer_scale.gain.shape == (16,)


@pytest.mark.parametrize("changes", [
    {}, {"norm_position": "post"}, {"logit_soft_cap": 1.5}, {"position_encoding": "none", "weight_tying": False},
], ids=["pre", "post", "cap", "no-positions"])  # fmt: skip
def test_the_model_is_embedding_blocks_norm_head(tiny, changes):
    model, idx = scrambled(ConfigurableGPT(tiny(**changes))).double(), tokens()
    x = model.token_embedding.weight[idx]
    if model.config.position_encoding == "learned_absolute":
        x = x + model.position_embedding.table.weight[:16]
    for block in model.blocks:
        x = block(x)
    if changes.get("norm_position") != "post":
        x = model.final_norm(x)
    logits = x @ model.head.weight.T
    if "logit_soft_cap" in changes:
        assert logits.abs().max() > 3
        logits = 1.5 * torch.tanh(logits / 1.5)
    else:
        assert model.config.logit_soft_cap == 0
    torch.testing.assert_close(model(idx)[0], logits, **EXACT)


def test_soft_cap_bounds_and_leaves_small_logits_alone():
    logits = torch.tensor([-1e3, -0.01, 0.0, 0.01, 1e3])
    torch.testing.assert_close(soft_cap(logits, 30.0), torch.tensor([-30.0, -0.01, 0.0, 0.01, 30.0]))
    assert soft_cap(logits, 0.0) is logits


def test_a_pattern_builds_each_layer_as_it_says(tiny):
    model = ConfigurableGPT(tiny(n_layer=4, block_pattern="attention/swiglu,attention/none,attention"))
    assert [type(block.ffn).__name__ for block in model.blocks] == ["SwiGLU", "NoneType", "StandardFFN", "SwiGLU"]


# ---- transformers as oracle -----------------------------------------------------------------------------------------


def test_the_masked_lm_loss_of_bert_equals_transformers(transformers):
    """Through the objective, which sees the hidden places alone; logits are held in test_model_interop.py."""
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, type_vocab_size=2, attn_implementation="eager", pad_token_id=None,
    )  # fmt: skip
    oracle = scrambled(transformers.BertForMaskedLM(config)).double().eval()
    ours = interop.from_hf(oracle)
    places = torch.tensor([[1, 4, 13], [0, 7, 8]])
    labels = torch.full((2, 16), IGNORE_INDEX).scatter(1, places, tokens().gather(1, places))
    batch = {"inputs": tokens().scatter(1, places, V - 1), "targets": tokens().gather(1, places), "places": places}
    theirs = oracle(batch["inputs"], labels=labels).loss
    sums = MaskedLM(ours, TrainConfig())(batch)
    torch.testing.assert_close(sums["loss"] / sums["tokens"], theirs, rtol=1e-9, atol=1e-9)
    theirs.backward(), (sums["loss"] / sums["tokens"]).backward()
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    gradients["bert.embeddings.token_type_embeddings.weight"].zero_()  # its values are added to ours, not its gradient
    wanted = interop.to_ours(HF_CLASS_REGISTRY["BertForMaskedLM"], gradients, ours)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-9)


# ---- generation -----------------------------------------------------------------------------------------------------

GENERATORS = {
    "gpt2": {"arch_preset": "gpt2"},
    "llama": {"arch_preset": "llama", "n_kv_head": 2},
    "alibi": {"position_encoding": "alibi"},
    "window": {"sliding_window": 3, "position_encoding": "rope"},
}
PROMPTS = {"one": 1, "short": 5, "full": 16, "over": 40}  # block_size is 16


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", GENERATORS)
def test_generation_with_a_cache_equals_without(tiny, name, prompt):
    model, idx = scrambled(ConfigurableGPT(tiny(**GENERATORS[name]))).double(), tokens(2, PROMPTS[prompt])
    for settings in ({"temperature": 0}, {"temperature": 1.3}, {"temperature": 0.9, "top_k": 5, "top_p": 0.8}):
        texts = [
            model.generate(idx, 45, **settings, use_cache=cached, generator=torch.Generator().manual_seed(6))
            for cached in (True, False)
        ]
        assert torch.equal(*texts), settings
        assert texts[0].shape == (2, PROMPTS[prompt] + 45) and torch.equal(texts[0][:, : PROMPTS[prompt]], idx)
        assert texts[0][:, PROMPTS[prompt] :].unique().numel() > 2, "a text of one token proves little"


def test_greedy_generation_takes_the_likeliest_token_each_time(tiny):
    model, idx = scrambled(ConfigurableGPT(tiny())), tokens(2, 4)
    text = model.generate(idx, 12, temperature=0)
    with torch.no_grad():
        likeliest = model(text[:, :-1])[0].argmax(-1)
    assert torch.equal(text[:, 4:], likeliest[:, 3:])


def test_generation_ends_where_it_is_told_to(tiny):
    model, idx = scrambled(ConfigurableGPT(tiny())), tokens(2, 4)
    text = model.generate(idx, 12, temperature=0)
    assert torch.equal(model.generate(idx, 12, temperature=0, stop=lambda out: out.size(1) == 9), text[:, :9])
    assert torch.equal(model.generate(idx, 12, temperature=0, stop=lambda out: False), text)


def test_a_full_context_forgets_its_older_half(tiny):
    model, idx = scrambled(ConfigurableGPT(tiny())), tokens(1, 16)
    text = model.generate(idx, 2, temperature=0)
    with torch.no_grad():
        assert text[0, 16] == model(idx)[0][0, -1].argmax()
        assert text[0, 17] == model(text[:, 9:17])[0][0, -1].argmax()


def test_a_long_prompt_is_read_from_its_end(tiny):
    model, idx = scrambled(ConfigurableGPT(tiny())), tokens(1, 40)
    assert torch.equal(model.generate(idx, 8, temperature=0)[:, 24:], model.generate(idx[:, 24:], 8, temperature=0))


def test_context_limit_is_block_size_but_for_states_of_one_size(tiny):
    assert ConfigurableGPT(tiny(arch_preset="llama")).context_limit() == 16
    assert ConfigurableGPT(tiny(arch_preset="gpt2", sliding_window=3)).context_limit() == 16  # its table ends
    assert ConfigurableGPT(tiny(position_encoding="rope", sliding_window=3)).context_limit() is None
    mixed = tiny(position_encoding="rope", sliding_window=99)
    assert ConfigurableGPT(mixed).context_limit() == 16


def test_generation_leaves_the_model_as_it_was(tiny):
    model = ConfigurableGPT(tiny(dropout=0.5))
    text = model.generate(tokens(1, 4), 5, temperature=0)
    assert model.training and not text.requires_grad
    assert torch.equal(model.generate(tokens(1, 4), 5, temperature=0), text), "dropout was on"
    model.eval().generate(tokens(1, 4), 1)
    assert not model.training


def test_too_long_a_text_is_refused_where_positions_end(tiny):
    with pytest.raises(UserError, match=r"17 tokens do not fit position_encoding='learned_absolute' of block_size=16"):
        ConfigurableGPT(tiny())(tokens(1, 17))
    assert ConfigurableGPT(tiny(position_encoding="rope"))(tokens(1, 17))[0].shape == (1, 17, V)


# -- drawing a token

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.06, 0.04]]))


def frequencies(n=20_000, **settings):
    draws = sample_token(LOGITS.repeat(n, 1), **settings, generator=torch.Generator().manual_seed(7))
    assert draws.shape == (n, 1)
    return torch.bincount(draws[:, 0], minlength=5) / n


@pytest.mark.parametrize("settings, expected", [
    ({}, [0.5, 0.25, 0.15, 0.06, 0.04]),
    ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.0036, 0.0016]),  # squared
    ({"top_k": 2}, [2, 1, 0, 0, 0]),
    ({"top_k": 1}, [1, 0, 0, 0, 0]),
    ({"top_k": 99}, [0.5, 0.25, 0.15, 0.06, 0.04]),
    ({"top_p": 1.0}, [0.5, 0.25, 0.15, 0.06, 0.04]),
    ({"top_p": 0.7}, [2, 1, 0, 0, 0]),  # the fewest that make up 0.7
    ({"top_p": 0.8}, [0.5, 0.25, 0.15, 0, 0]),
    ({"top_p": 0.3}, [1, 0, 0, 0, 0]),
    ({"top_p": 0.0}, [1, 0, 0, 0, 0]),  # the likeliest always stays
    ({"top_k": 3, "top_p": 0.8}, [2, 1, 0, 0, 0]),  # after top_k the first two are 0.83
    ({"temperature": 0}, [1, 0, 0, 0, 0]),
], ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else "")  # fmt: skip
def test_tokens_are_drawn_as_often_as_they_should(settings, expected):
    expected = torch.tensor(expected) / sum(expected)
    drawn = frequencies(**settings)
    assert torch.equal(drawn > 0, expected > 0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.015)


def test_each_row_is_cut_by_itself():
    logits = torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 5.0]])
    for settings in ({"top_k": 1}, {"top_p": 0.1}, {"temperature": 0}):
        assert sample_token(logits, **settings).tolist() == [[0], [2]]


# ---- what goes together ---------------------------------------------------------------------------------------------


class Shift(Mixer):
    """The token before, times a matrix: a mixer without attention, for the tests below."""

    residual_out = ("out.weight",)

    def __init__(self, config, layer_index):
        super().__init__()
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, positions=None, document_ids=None):
        return self.out(F.pad(x, (0, 0, 1, 0))[:, :-1])

    def mixing_flops(self, T):
        return 0

    def state_bytes(self, T, dtype=torch.float32):
        return self.out.in_features * dtype.itemsize

    def init_state(self, batch, device=None, dtype=None):
        return torch.zeros(batch, 1, self.out.in_features, device=device, dtype=dtype)

    def step(self, x, state):
        x = torch.cat((state, x), dim=1)
        return self.out(x[:, :-1]), x[:, -1:]


@pytest.fixture
def shift():
    MIXER_REGISTRY["shift"] = Shift


def test_a_mixer_of_ones_own_trains_and_generates_for_ever(tiny, shift):
    model = scrambled(ConfigurableGPT(tiny(block_pattern="shift", position_encoding="none"))).double()
    assert model.context_limit() is None
    model(tokens(), tokens(seed=5))[1].backward()
    text = model.generate(tokens(1, 3), 60, temperature=0)
    assert torch.equal(text, model.generate(tokens(1, 3), 60, temperature=0, use_cache=False))


@pytest.mark.parametrize("changes, words", [
    ({"block_pattern": "shift", "position_encoding": "rope"}, ["position_encoding='rope'", "block_pattern='shift'"]),
    ({"block_pattern": "shift", "position_encoding": "alibi"}, ["position_encoding='alibi'", "block_pattern='shift'"]),
    ({"block_pattern": "attention,shift", "causal": False}, ["causal=False", "'shift'", "block_pattern='attention,s"]),
    ({"block_pattern": "attention+shift", "causal": False}, ["causal=False", "'shift'", "block_pattern='attention+s"]),
    ({"block_pattern": "shift", "sliding_window": 4}, ["sliding_window=4", "'attention'", "block_pattern='shift'"]),
    ({"hybrid_local_window": 8}, ["hybrid_local_window=8", "'local_attention'", "block_pattern='attention'"]),
], ids=["rope", "alibi", "both-ways", "both-ways-side-by-side", "window", "local-window"])  # fmt: skip
def test_parts_that_do_not_go_together_are_refused_with_both_settings(tiny, shift, changes, words):
    with pytest.raises(UserError) as refusal:
        ConfigurableGPT(tiny(**changes))
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_device_that_a_mixer_cannot_train_on_is_refused(tiny):
    ConfigurableGPT(tiny()).check_device(torch.device("cpu"))
    with pytest.raises(UserError, match=r"attention_backend='flex'.* cpu"):
        ConfigurableGPT(tiny(attention_backend="flex")).check_device(torch.device("cpu"))


def test_one_mixer_that_honours_the_positions_is_enough(tiny, shift):
    check_parts(tiny(block_pattern="attention,shift", position_encoding="rope"))
    check_parts(tiny(block_pattern="shift", position_encoding="learned_absolute"))


def test_a_position_encoding_of_ones_own_works_by_assignment(tiny):
    # DESIGN 3: POSITION_ENCODING_REGISTRY['alibi'] = ALiBi works, and so does any other name.
    class Steep(ALiBi):
        def slopes(self):
            return [1.0, 1.0, 1.0, 1.0]

    class Slow(RoPE):
        def frequencies(self, device):
            return super().frequencies(device) / 2

    class Doubled(LearnedAbsolute):
        def embed(self, positions):
            return 2 * self.table(positions)

    for name, part in {"steep": Steep, "slow": Slow, "doubled": Doubled}.items():
        POSITION_ENCODING_REGISTRY[name] = part
    idx, logits = tokens(), {}
    for name in ("steep", "alibi", "slow", "rope", "doubled", "learned_absolute", "none"):
        model = scrambled(ConfigurableGPT(tiny(position_encoding=name))).double()
        logits[name] = model(idx)[0]
        with torch.no_grad():
            torch.testing.assert_close(model.step(idx, model.init_state(2))[0], logits[name], **EXACT)
    for one, other in (("steep", "alibi"), ("slow", "rope"), ("doubled", "learned_absolute"), ("slow", "none")):
        assert not torch.allclose(logits[one], logits[other])


@pytest.mark.parametrize("changes, words", [
    ({"position_encoding": "none", "rope_theta": 5e5}, "rope_theta=500000.0 is read by no chosen part"),
    ({"block_pattern": "gla,attention,gla/swiglu"}, "n_layer=2 is shorter than block_pattern, and leaves out gla/sw"),
    ({"sliding_window": 16}, "sliding_window=16 is no shorter than block_size=16"),
    ({"block_pattern": "local_attention"}, "hybrid_local_window=256 is no shorter than block_size=16"),
    ({"position_encoding": "rope", "rope_scaling_factor": 4.0}, "rope_scaling_factor=4.0 does nothing at rope_s"),
    ({"qk_norm_scope": "projection"}, "qk_norm_scope='projection' does nothing at qk_norm=False"),
    ({"n_kv_head": 2, "queries_per_kv_head": 4}, "n_kv_head=2 takes the place of queries_per_kv_head=4"),
], ids=str)  # fmt: skip
def test_what_a_setting_does_not_do_is_noted(tiny, changes, words):
    config = tiny(**{"block_size": 16, "position_encoding": "none", **changes})
    assert [note for note in notes(config) if words in note], notes(config)
    assert notes(tiny(block_size=16, sliding_window=8)) == []


def test_options_that_no_chosen_part_reads_are_noticed(tiny):
    config = tiny(position_encoding="alibi", rope_theta=5e5, n_kv_head=2, ffn_multiplier=2.0)
    assert unused_options(config) == {"rope_theta": 5e5}
    assert unused_options(tiny(block_pattern="attention/none", ffn_multiplier=2.0)) == {"ffn_multiplier": 2.0}
    assert unused_options(tiny(position_encoding="rope", rope_theta=5e5)) == {}
