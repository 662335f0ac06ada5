"""What evaluate.py may ask of a checkpoint: prompts, or where its loss comes from. Each knows its files and its table.

A task has `material(run_folder, settings)`, what it needs beside the model; `ask(model, material, progress)`; and, of
what that returned, `record` (for evals.jsonl), `notes`, `panels` (for the figure), `cells` (for the table) and `write`
(the CSV files).
"""

import csv
import json
import math
from dataclasses import asdict

from eval_loss import measure_loss, multiples_for
from eval_prompts import breakdown, run_prompts, totals
from training_data import load_dataset
from training_tokenizers import load_tokenizer
from user_errors import UserError


class PromptTask:
    """Short questions that the model answers by writing on."""

    title = "Prompts"
    columns = ("score", "passed", "chosen", "nats/byte")
    panels_of = "share of points, or of prompts"

    def __init__(self, prompts, decoding):
        self.prompts, self.decoding = prompts, decoding

    def material(self, run_folder, settings):
        return load_tokenizer(run_folder)

    def ask(self, model, tokenizer, progress):
        """[PromptResult] in the order of the file."""
        return run_prompts(model, tokenizer, self.prompts.prompts, self.decoding, progress)

    def record(self, results):
        return {
            "kind": "prompts",
            "prompt_file": {"name": self.prompts.path.name, "sha256": self.prompts.sha256},
            "decoding": asdict(self.decoding),
            **totals(results),
            "categories": breakdown(results, "category"),
            "difficulties": breakdown(results, "difficulty"),
        }

    def notes(self, results):
        """A line for each reason for which prompts could not be asked as they stand."""
        reasons = [result.note for result in results if result.note]
        counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
        return [f"{n} of {len(results)} prompts: {reason}" for reason, n in counts.items()]

    def panels(self, results):
        """{panel: {group: number}}, for the figure."""
        return {
            f"by {name}, {how}": {key: numbers[column] for key, numbers in breakdown(results, name).items()}
            for how, column in (("written", "score"), ("chosen", "chosen")) for name in ("category", "difficulty")
        }  # fmt: skip

    def cells(self, results):
        numbers = totals(results)
        interval = f"[{percent(numbers['passed_low'])}, {percent(numbers['passed_high'])}]"
        nats = numbers["answer_nats_per_byte"]
        return [
            percent(numbers["score"]),
            f"{percent(numbers['passed'])} {interval}",
            f"{percent(numbers['chosen'])} ({percent(numbers['chosen_by_chance'])})",
            "-" if nats is None else f"{nats:.3f}",
        ]

    def heading(self):
        prompts, decoding = self.prompts, self.decoding
        how = "greedily" if not decoding.temperature else (
            f"{decoding.num_samples} x at temperature {decoding.temperature:g}, seed {decoding.seed}"
        )  # fmt: skip
        named = f"{prompts.path.as_posix()} (sha256 {prompts.sha256[:12]})"
        return (
            f"{len(prompts.prompts)} prompts of {named}, continued {how}.\n"
            "score: share of the points. passed: share of the prompts, and its 95% interval over prompts.\n"
            "chosen: how often the best answer is likelier per byte than every wrong one (by chance).\n"
            "nats/byte: what the best answer costs."
        )

    def write(self, evaluated, folder):
        """The CSV files, whose names it returns. `evaluated`: [(columns that name a checkpoint, results)]."""
        tables = {
            "eval_results.csv": [{**place, **result_row(each)} for place, results in evaluated for each in results],
            "summary_table.csv": [{**place, **totals(results)} for place, results in evaluated],
        }
        for name in ("category", "difficulty"):
            tables[f"{name}_breakdown.csv"] = [
                {**place, name: key, **numbers}
                for place, results in evaluated for key, numbers in breakdown(results, name).items()
            ]  # fmt: skip
        return write_tables(tables, folder)


class LossTask:
    """The validation loss by context length, position, recall and frequency."""

    title = "Loss"
    panels_of = "nats per token"
    columns = ("loss", "2x", "4x", "8x", "seen", "new", "rare")

    def __init__(self, n_tokens):
        self.n_tokens = n_tokens

    def material(self, run_folder, settings):
        """The run's dataset, held to the fingerprint that the run was trained on."""
        dataset = load_dataset(settings.train)
        if dataset.has_outcomes:
            raise UserError(
                f"run '{run_folder.name}' was trained on records ({dataset.folder}), which cannot be cut into other "
                "contexts; its own evaluations have its scores: compare_architectures.py shows them"
            )
        record = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
        if record.get("dataset", {}).get("fingerprint") != dataset.fingerprint:
            raise UserError(
                f"run '{run_folder.name}' was trained on other tokens than {dataset.folder} has; restore those"
            )
        return dataset

    def ask(self, model, dataset, progress):
        """({(part, group): Tally}, why not all contexts were read)."""
        return measure_loss(model, dataset, self.n_tokens, progress), multiples_for(model, dataset)[1]

    def record(self, results):
        parts = {}
        for (part, group), tally in results[0].items():
            loss = tally.loss if math.isfinite(tally.loss) else None
            parts.setdefault(part, {})[group] = {"loss": loss, "targets": tally.targets}
        return {"kind": "loss", "loss_tokens": self.n_tokens, "parts": parts}

    def panels(self, results):
        """{part: {group: loss}}, for the figure."""
        parts = self.record(results)["parts"]
        return {name: {group: each["loss"] for group, each in parts[name].items()} for name in parts if name != "whole"}

    def notes(self, results):
        return [f"longer contexts were left out: {results[1]}"] if results[1] else []

    def cells(self, results):
        groups, _ = results
        wanted = [("whole", "all"), *(("context", f"{k}x") for k in (2, 4, 8)), ("recall", "seen"), ("recall", "new")]
        rare = [key for key in groups if key[0] == "frequency"][-1]
        return [f"{groups[key].loss:.4f}" if key in groups else "-" for key in [*wanted, rare]]

    def heading(self):
        return (
            f"Nats per token over about {self.n_tokens:,} validation tokens.\n"
            "loss: at the training context. 2x, 4x, 8x: of the same targets with that many times the context.\n"
            "seen, new: targets that stood after the same token earlier in the window, and the others.\n"
            "rare: the targets whose tokens are rarest in training."
        )

    def write(self, evaluated, folder):
        rows = [
            {**place, "part": part, "group": group, "targets": tally.targets, "loss": tally.loss,
             "bits_per_byte": tally.bits_per_byte}
            for place, (groups, _) in evaluated for (part, group), tally in groups.items()
        ]  # fmt: skip
        return write_tables({"loss_breakdown.csv": rows}, folder)


def percent(share):
    return "-" if share is None else f"{100 * share:.1f}%"


def result_row(result):
    prompt = result.prompt
    return {
        "id": prompt.id,
        "category": prompt.category,
        "difficulty": prompt.difficulty,
        "match": prompt.match,
        "prompt": prompt.prompt,
        "answers": json.dumps(prompt.answers, ensure_ascii=False),
        "written": result.written[0] if len(result.written) == 1 else json.dumps(result.written, ensure_ascii=False),
        "passed": result.passed,
        "points": result.points,
        "max_points": prompt.score,
        "is_chosen": None if result.is_chosen is None else int(result.is_chosen),
        "log_probability_per_byte": json.dumps(result.nats_per_byte, ensure_ascii=False),
        "note": result.note,
    }


def write_tables(tables, folder):
    for name, rows in tables.items():
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return list(tables)
