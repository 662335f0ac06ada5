"""Write text with a trained model.

    python sample.py --run_name=NAME                                           # what the run's latest checkpoint writes
    python sample.py --run_name=NAME --start="def main(" --num_samples=3
    python sample.py --run_name=NAME --start=FILE:prompt.txt --temperature=0.8 --top_k=50 --step=5000

It prints, and leaves nothing behind.
"""

import argparse
import sys
from pathlib import Path

import torch

import configurator
import training_checkpoint as checkpoint
from model_builder import ConfigurableGPT
from training_place import place_of_reader
from training_report import printable
from training_tokenizers import load_tokenizer
from user_errors import Parser, UserError, exit_on_user_error


@exit_on_user_error
def main(arguments):
    args = parse(arguments)
    folder = Path(args.runs_dir) / args.run_name
    settings = configurator.load_run(folder)
    if not settings.model.causal:
        raise UserError(
            f"run '{folder.name}' has causal=False and objective='{settings.train.objective}': it fills gaps and "
            "cannot write on from a prompt; score it with "
            f"train.py --init_from=resume --run_name={folder.name} --eval_only"
        )
    saved_at = checkpoint.find_checkpoint(folder, args.step)
    checkpoint.read_metadata(saved_at)
    place = place_of_reader(settings.train, args.device)
    tokenizer = load_tokenizer(folder)
    model = ConfigurableGPT(settings.model)
    checkpoint.load_model(model, saved_at)
    model.to(place.device).eval()

    ids = tokenizer.encode(prompt_of(args.start))
    if len(ids) == 0:
        raise UserError("--start is empty; give at least one character to go on from")
    prompt = torch.tensor([list(ids)], device=place.device)
    generator = torch.Generator(device=place.device).manual_seed(args.seed)
    for index in range(args.num_samples):
        with place.autocast():
            out = model.generate(prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)
        if index:
            print("-" * 15)
        print(printable(tokenizer.decode(out[0].tolist())), flush=True)


def parse(arguments):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run_name", required=True, help="folder under runs_dir")
    parser.add_argument("--runs_dir", default="runs")
    parser.add_argument("--step", type=int, help="which checkpoint; the latest by default")
    parser.add_argument("--start", default="\n", help="text to go on from, or FILE:path")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top_k", type=int, default=200, help="draw from the likeliest k tokens alone")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that make up this probability")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(arguments)
    name = Path(args.run_name).name
    if not name or name != args.run_name:
        hint = f", such as {name}" if name else ""
        raise UserError(f"--run_name={args.run_name} must be the name of a folder in --runs_dir={args.runs_dir}{hint}")
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        if not getattr(args, name) >= least:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {least}")
    if args.seed >= 2**63:
        raise UserError(f"--seed={args.seed} must be below 2**63")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p} must lie in (0, 1]")
    return args


def prompt_of(start):
    """The text given, or that of FILE:path."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--start={start} cannot be read: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
