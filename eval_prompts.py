"""Short questions that a language model answers by writing on: read from a file, scored two ways.

    prompts = load_prompts('eval/prompts_tinystories.json')
    results = run_prompts(model, tokenizer, prompts, Decoding())      # [PromptResult], in the order of the file

One prompt of the file, of which only the last three names are required:

    {"id": "habitat-03", "category": "habitats", "difficulty": "easy", "score": 1, "match": "contains",
     "wrong_answers": ["tree"], "prompt": "The fish lives in the", "answers": ["water", "sea"]}

Written: the model goes on from the prompt, and the points are given when the text matches an answer. Chosen: each
answer is scored by its log-probability per byte after the prompt, and the best one has to beat every wrong answer.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eval_matching import MATCHES, TooSlowError, is_match, tedious, trouble_with
from model_builder import NotFiniteError
from user_errors import UserError, did_you_mean

MAX_BATCH = 32  # sequences of one length that a forward pass takes


# ---- prompt files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One entry of a prompt file."""

    id: str
    prompt: str
    answers: tuple  # any of them earns the points
    category: str = "all"
    difficulty: str = "all"
    score: float = 1.0  # points for a right answer
    match: str = "contains"
    wrong_answers: tuple = ()  # what the best answer must be likelier than, per byte
    examples: tuple = ()  # of a regex: texts that match it, whose likelihood is taken
    case_sensitive: bool = False
    join: str = " "  # between the prompt and an answer whose likelihood is taken
    stop: str = ""  # what is written is cut before this text

    @property
    def candidates(self):
        """The right answers that a likelihood can be taken of."""
        return self.examples if self.match == "regex" else self.answers

    @property
    def chance(self):
        """Probability that a choice at random is right, or None where there is nothing to choose between."""
        n, wrong = len(self.candidates), len(self.wrong_answers)
        return n / (n + wrong) if n and wrong else None

    def shortened(self, text):
        """What counts of a text that a model wrote."""
        return text.partition(self.stop)[0] if self.stop else text

    def passes(self, text):
        """Whether the text, written on from the prompt, matches one of the answers.

        Raises:
            TooSlowError: a regex that does not come to an end on it.
        """
        written = self.shortened(text).strip()
        return any(is_match(self.match, answer, written, self.case_sensitive) for answer in self.answers)


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and what names them."""

    path: Path
    sha256: str
    prompts: tuple


TEXT, TEXTS = (str, "a text"), (list, "a list of texts")
TYPES = {
    "id": TEXT, "prompt": TEXT, "answers": TEXTS, "category": TEXT, "difficulty": TEXT, "match": TEXT,
    "score": ((int, float), "a number"), "wrong_answers": TEXTS, "examples": TEXTS,
    "case_sensitive": (bool, "true or false"), "join": TEXT, "stop": TEXT,
}  # fmt: skip


def load_prompts(path):
    """The PromptFile at `path`: {"prompts": [...]}, with "defaults": {...} for what all entries share.

    Raises:
        UserError: a file that cannot be read, or an entry that is not a prompt; it is named.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        content = json.loads(raw.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"--prompts={path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompts={path} is not JSON ({error})") from None
    entries = content.get("prompts") if isinstance(content, dict) else None
    defaults = content.get("defaults", {}) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not isinstance(defaults, dict):
        raise UserError(f'--prompts={path} holds no prompts; it must be {{"prompts": [{{"id": ..., ...}}, ...]}}')
    prompts = [prompt_of(entry, defaults, f"{path}: entry {number}") for number, entry in enumerate(entries, 1)]
    twice = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if twice:
        raise UserError(f"{path}: prompt '{twice[0]}' is there twice; give each an id of its own")
    return PromptFile(path, hashlib.sha256(raw).hexdigest(), tuple(prompts))


def prompt_of(entry, defaults, where):
    """A checked Prompt from an entry of the file; `where` names it until its id is known."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {json.dumps(entry)[:60]} and must be an object with id, prompt and answers")
    if isinstance(entry.get("id"), str) and entry["id"]:
        where = f"{where.rpartition(':')[0]}: prompt '{entry['id']}'"
    values = {**defaults, **entry}
    for name, value in values.items():
        if name not in TYPES:
            raise UserError(f"{where} has an unknown field '{name}'{did_you_mean(name, TYPES)}")
        kind, words = TYPES[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{where} has {name}={json.dumps(value)[:60]}, which must be {words}")
        if isinstance(value, list):
            wrong = [text for text in value if not isinstance(text, str) or not text.strip()]
            if wrong:
                raise UserError(
                    f"{where} has {json.dumps(wrong[0])[:60]} among its {name}; each must be a text, not empty"
                )
            values[name] = tuple(value)
    for name in ("id", "prompt", "answers"):
        if not values.get(name):
            raise UserError(f"{where} has no {name}")
    prompt = Prompt(**values)
    check_prompt(prompt, where)
    return prompt


def check_prompt(prompt, where):
    """Refuse what could never be scored."""
    if prompt.match not in MATCHES:
        known = f"; take one of {', '.join(MATCHES)}"
        raise UserError(f"{where} has match='{prompt.match}'{did_you_mean(prompt.match, MATCHES) or known}")
    if not 0 <= prompt.score < math.inf:
        raise UserError(f"{where} has score={prompt.score}, which must be 0 or more")
    if prompt.match == "regex":
        check_patterns(prompt, where)
    try:
        for text in prompt.candidates:
            if not prompt.passes(text):
                raise UserError(f"{where} would not take its own answer {text!r} for right; see its match and stop")
        for text in prompt.wrong_answers:
            if prompt.passes(text):
                raise UserError(f"{where} would take its wrong answer {text!r} for right")
    except TooSlowError as error:
        raise UserError(f"{where}: {error}") from None


def check_patterns(prompt, where):
    """Refuse a regex that does not compile, or does not come to an end on a long text of what its entry has."""
    for pattern in prompt.answers:
        message = trouble_with(pattern)
        if message:
            raise UserError(f"{where} has the regex {pattern!r}, which does not compile ({message})")
        try:
            for text in (*prompt.candidates, *prompt.wrong_answers, "a"):
                is_match("regex", pattern, tedious(text), prompt.case_sensitive)
        except TooSlowError as error:
            raise UserError(f"{where}: {error}") from None


# ---- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """How a model writes on: greedily at temperature 0, else `num_samples` times from a seed.

    What is written is cut at `max_new_bytes` rather than at tokens: tokenizers get the same room for an answer.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_samples: int = 1
    max_new_bytes: int = 64
    seed: int = 1337


@dataclass
class PromptResult:
    """What a model made of one prompt."""

    prompt: Prompt
    written: list = field(default_factory=list)  # one text a sample
    passed: float = 0.0  # share of the samples that match
    nats_per_byte: dict = field(default_factory=dict)  # {answer, right or wrong: its log-probability per byte}
    note: str = ""  # why it could not be asked, or judged, as it stands
    is_cut: bool = False  # the start of the prompt was cut off

    @property
    def points(self):
        return self.passed * self.prompt.score

    @property
    def best_right(self):
        """Log-probability per byte of the likeliest right answer, or None."""
        return max((self.nats_per_byte[text] for text in self.prompt.candidates if text in self.nats_per_byte),
                   default=None)  # fmt: skip

    @property
    def is_chosen(self):
        """Whether the best right answer beats every wrong one; None where there is no choice."""
        if self.prompt.chance is None:
            return None
        wrong = [self.nats_per_byte.get(text, -math.inf) for text in self.prompt.wrong_answers]
        return self.best_right is not None and self.best_right > max(wrong)


def run_prompts(model, tokenizer, prompts, decoding, progress=lambda done: None):
    """[PromptResult] of a causal model for each Prompt, in order.

    A prompt with a character that the tokenizer lacks counts as failed, with a note, so that every run is asked the
    same. Of a prompt longer than the context the start is cut off, with a note.

    Args:
        progress: called with the share of the prompts that is done.

    Raises:
        UserError: an answer that is as long as the context.
    """
    results = [PromptResult(prompt) for prompt in prompts]
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        for result in results:
            result.note = "failed, for the weights are not finite"
        return results
    asked, was_training = [row for result in results if (row := tokens_of(result, tokenizer))], model.training
    model.eval()
    with torch.inference_mode():
        score_answers(model, tokenizer, asked)
        done = 0
        for group, ids in groups_of(model, asked, decoding):
            try:
                write_on(model, tokenizer, group, ids, decoding)
            except NotFiniteError:
                for result in group:
                    result.note = "failed, for the logits are not finite"
            done += len(group)
            progress(done / len(asked))
    model.train(was_training)
    return results


def tokens_of(result, tokenizer):
    """(result, ids of the prompt, {answer: ids of what joins it and the answer}), right and wrong answers.

    Prompt and answer are encoded apart, because what a model writes goes on from the tokens of the prompt alone. None,
    and a note on the result, where the tokenizer lacks a character.
    """
    prompt = result.prompt
    texts = dict.fromkeys(prompt.candidates + prompt.wrong_answers)
    try:
        ids = {text: tokenizer.encode(prompt.join + text).tolist() for text in texts}
        return result, tokenizer.encode(prompt.prompt).tolist(), ids
    except UserError as error:
        result.note = f"failed, for {error}"
        return None


def check_prompts(model, tokenizer, prompts):
    """Refuse what `run_prompts` would; the model's weights are not read.

    Raises:
        UserError: an answer that is as long as the context.
    """
    asked = [row for prompt in prompts if (row := tokens_of(PromptResult(prompt), tokenizer))]
    check_lengths(asked, model.context_limit())


def check_lengths(asked, limit):
    for result, _, answers in asked:
        longest = max(map(len, answers.values()), default=0)
        if limit and longest >= limit:
            raise UserError(
                f"prompt '{result.prompt.id}' has an answer of {longest} tokens and the context is {limit}; "
                "shorten it, or train with a larger block_size"
            )


def score_answers(model, tokenizer, asked):
    """Fill `nats_per_byte`: sequences of one length share a forward pass, so that nothing is padded."""
    limit, by_length = model.context_limit(), defaultdict(list)
    check_lengths(asked, limit)
    for result, prompt_ids, answers in asked:
        for text, ids in answers.items():
            whole = prompt_ids + ids
            if limit and len(whole) > limit:
                whole = whole[-limit:]
                result.is_cut = True
                result.note = f"longer than the context of {limit} tokens, so its start was cut off"
            by_length[len(whole)].append((result, text, whole, len(ids)))
    for rows in by_length.values():
        for start in range(0, len(rows), MAX_BATCH):
            batch = rows[start : start + MAX_BATCH]
            scores = log_probabilities(model, [whole for _, _, whole, _ in batch], [n for _, _, _, n in batch])
            for (result, text, _, _), nats in zip(batch, scores, strict=True):
                if math.isfinite(nats):  # half precision may overflow
                    result.nats_per_byte[text] = nats / len((result.prompt.join + text).encode("utf-8"))


def log_probabilities(model, sequences, lengths):
    """[log p of the last `length` tokens given those before] in nats, of sequences that are equally long."""
    idx, longest = torch.tensor(sequences, device=model.head.weight.device), max(lengths)  # (B, T)
    logits = model.logits(model.hidden_states(idx[:, :-1])[:, -longest:]).float()  # those of the answers alone
    of_next = torch.log_softmax(logits, dim=-1).gather(-1, idx[:, -longest:, None]).squeeze(-1)  # (B, longest)
    return [row[-n:].sum().item() for row, n in zip(of_next.double(), lengths, strict=True)]


def groups_of(model, asked, decoding):
    """([results], ids (B, T)): greedily all prompts of one length together, else the samples of one prompt."""
    device = model.head.weight.device
    if decoding.temperature > 0:
        for result, ids, _ in asked:
            yield [result], torch.tensor([ids] * decoding.num_samples, device=device)
        return
    by_length = defaultdict(list)
    for result, ids, _ in asked:
        by_length[len(ids)].append((result, ids))
    for rows in by_length.values():
        for start in range(0, len(rows), MAX_BATCH):
            batch = rows[start : start + MAX_BATCH]
            yield [result for result, _ in batch], torch.tensor([ids for _, ids in batch], device=device)


def write_on(model, tokenizer, results, idx, decoding):
    """Fill `written` and `passed`; a sampled prompt has a random stream of its own, from the seed and its id."""
    generator = torch.Generator(device=idx.device)
    name = f"{decoding.seed} {results[0].prompt.id}".encode()
    generator.manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
    sizes, end = tokenizer.token_bytes(), tokenizer.end_of_document_id

    def is_done(row):
        return end in row or sum(sizes[i] for i in row if i < len(sizes)) >= decoding.max_new_bytes

    def all_done(out):
        return all(is_done(row) for row in out[:, idx.size(1) :].tolist())

    out = model.generate(idx, decoding.max_new_bytes, decoding.temperature, decoding.top_k, decoding.top_p,
                         generator, stop=all_done)  # fmt: skip
    rows = out[:, idx.size(1) :].tolist()
    texts = [cut(tokenizer, row[: row.index(end)] if end in row else row, decoding.max_new_bytes) for row in rows]
    share = [texts] if len(results) == 1 else [[text] for text in texts]
    for result, written in zip(results, share, strict=True):
        result.written = [result.prompt.shortened(text) for text in written]
        try:
            result.passed = sum(result.prompt.passes(text) for text in written) / len(written)
        except TooSlowError as error:
            told = f"failed, for {error} (prompt '{result.prompt.id}')"
            result.note = f"{result.note}; {told}" if result.note else told


def cut(tokenizer, ids, n_bytes):
    """The text of the tokens, up to so many bytes, without a character that was cut in two."""
    return tokenizer.decode(ids).encode("utf-8")[:n_bytes].decode("utf-8", errors="ignore")


# ---- adding up -------------------------------------------------------------------------------------------------------


def totals(results):
    """{column: number} over some PromptResults; a share is None where nothing could be scored that way."""
    most, chosen = sum(result.prompt.score for result in results), [r for r in results if r.prompt.chance is not None]
    likely = [result.best_right for result in results if result.best_right is not None]
    share, points = mean([result.passed for result in results]), sum(result.points for result in results)
    low, high = wilson(share, len(results))
    return {
        "prompts": len(results),
        "points": points,
        "max_points": most,
        "score": points / most if most else None,
        "passed": share,
        "passed_low": low,
        "passed_high": high,
        "chosen": mean([result.is_chosen for result in chosen]),
        "chosen_by_chance": mean([result.prompt.chance for result in chosen]),
        "answer_nats_per_byte": mean([-value for value in likely]),
        "not_asked": sum(not result.written for result in results),
        "cut": sum(result.is_cut and bool(result.written) for result in results),
    }


def mean(values):
    return sum(values) / len(values) if values else None


def wilson(share, n, z=1.959964):
    """95% interval of a share of n prompts (Wilson 1927), over prompts like these rather than over runs."""
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def breakdown(results, name):
    """{category or difficulty: totals}, in the order in which they appear; name: 'category' or 'difficulty'."""
    groups = defaultdict(list)
    for result in results:
        groups[getattr(result.prompt, name)].append(result)
    return {key: totals(group) for key, group in groups.items()}
