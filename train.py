"""Train one architecture.

    python train.py                                                     # a 1M-parameter model, minutes on a laptop
    python train.py config/arch_llama.py --max_iters=500                # another architecture, the same tokens
    python train.py config/arch_gpt2.py config/size_124M.py config/data_openwebtext.py
    torchrun --nproc_per_node=8 train.py config/arch_llama.py config/size_124M.py --gradient_accumulation_steps=40

    python train.py --init_from=resume --run_name=NAME                  # continue where a run stopped
    python train.py --init_from=hf:FOLDER --dataset=shakespeare         # start from a Hugging Face model
    python train.py --help                                              # every setting

It leaves runs/<run_name>/ behind: config.json, metrics.jsonl, training_log.json, summary.json, metrics.csv, a plot,
TensorBoard files and checkpoints. `python compare_architectures.py --latest 2` compares the last two runs and
`python sample.py --run_name=NAME` writes text.
"""

import contextlib
import math
import sys
import time
from pathlib import Path

T_START = time.perf_counter()

import torch  # noqa: E402

import configurator  # noqa: E402
import eval_probes  # noqa: E402, F401  (fills its registry, so that probes' options are settings)
import kernels  # noqa: E402
import model_interop as interop  # noqa: E402
import model_matching as matching  # noqa: E402
import training_checkpoint as checkpoint  # noqa: E402
import training_logger as logging  # noqa: E402
import training_parallel as parallel  # noqa: E402
import training_plan as plan_ahead  # noqa: E402
import training_ranks as ranks  # noqa: E402
import training_run_record as run_record  # noqa: E402
from model_builder import parameter_plan  # noqa: E402
from model_checks import notes  # noqa: E402
from model_config import IGNORE_INDEX  # noqa: E402
from model_flops import flops_per_token, hardware_peak, mfu  # noqa: E402
from training_data import BatchStream, Prefetcher, ValidationSet, check_split, load_dataset, windows_of  # noqa: E402
from training_ledger import Ledger, StepMeter  # noqa: E402
from training_objectives import OBJECTIVE_REGISTRY, added, validation_scores  # noqa: E402
from training_optim import OPTIMIZER_REGISTRY, build_schedule, clip_gradients, set_learning_rate  # noqa: E402
from training_place import DTYPES, check_agreement, find_place, joined, memory_errors, peak_memory_bytes  # noqa: E402
from training_recompute import checkpoint_activations  # noqa: E402
from training_report import startup_report  # noqa: E402
from training_weights import blocks_in_memory  # noqa: E402
from user_errors import UserError, exit_on_user_error  # noqa: E402


@exit_on_user_error
def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        return print(configurator.help_text(__doc__))
    with memory_errors(), contextlib.ExitStack() as closing:  # however a run ends, what it opened is closed
        train(arguments, closing)


def train(arguments, closing):
    # ---- settings, and where to run ----------------------------------------------------------------------------------
    settings, first_weights = interop.starting_point(configurator.read_settings(arguments))
    config = settings.train
    if config.dry_run:
        return print(plan_ahead.dry_run(settings))
    is_resumed = config.init_from == "resume"
    place = find_place(config)
    closing.enter_context(joined(place))
    check_agreement(settings, place)
    torch.manual_seed(config.seed)  # for what a part may draw by itself: weights and data have seeds of their own

    # ---- data: the same tokens in the same order for every architecture ----------------------------------------------
    check_split(config.sequences_per_step, config.batch_size, place.data_size)
    dataset = load_dataset(config, may_prepare=place.local_rank == 0, quiet=not place.is_main)
    OBJECTIVE_REGISTRY[config.objective].check_dataset(dataset)
    extra_tokens = OBJECTIVE_REGISTRY[config.objective].extra_tokens(config)
    settings = configurator.with_vocabulary(settings, dataset.vocab_size + extra_tokens)
    dataset.check_vocab(settings.model.vocab_size, extra_tokens)
    if config.match and not is_resumed:  # a resumed run keeps the shape that it was given
        settings = matching.with_matched_shape(settings)
    block_size = settings.model.block_size
    stream = BatchStream(dataset, block_size, config.sequences_per_step, config.seed)
    validation = ValidationSet(dataset, block_size, windows_of(config.eval_iters, block_size))
    total_steps = config.total_steps(stream.tokens_per_step, stream.steps_per_epoch)
    total_tokens = config.total_tokens(stream.tokens_per_step, stream.tokens_per_epoch)
    counts = checkpoint.token_schedule(config, stream.tokens_per_epoch, total_tokens)
    due = checkpoint.scheduled_steps(counts, stream.tokens_per_step, total_steps)  # {step: scheduled tokens}

    # ---- model, objective, optimizer ---------------------------------------------------------------------------------
    model = parallel.build(settings, OBJECTIVE_REGISTRY[config.objective].heads, place)
    plan = parameter_plan(model)
    objective = OBJECTIVE_REGISTRY[config.objective](model, config)
    flops = flops_per_token(model, head_fraction=objective.head_fraction)
    ledger = Ledger(stream.tokens_per_step, flops.training, stream.initial_hash)
    meter = StepMeter(place.device)
    model.check_device(place.device)
    with blocks_in_memory(model, config.seed, place.device):
        will_compile = parallel.wants_compile(config, place)
        chosen_kernels = kernels.choose(model, place.device, config.kernel_backend, DTYPES[place.dtype], will_compile)
    optimizers = OPTIMIZER_REGISTRY[config.optimizer](plan, dict(model.named_parameters()), config, place.device)
    schedule = build_schedule(config, total_steps)
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == "float16")

    # ---- the run folder, new or taken up again -----------------------------------------------------------------------
    if is_resumed:
        folder = Path(config.runs_dir) / config.run_name
        saved_at, saved = checkpoint.taken_up(folder, config.resume_step, model, place)
        if saved["stream"] != stream.initial_hash:
            raise UserError(f"run '{folder.name}' was trained on other tokens than {dataset.folder} has; restore those")
        scaler.load_state_dict(saved["scaler"])
        ledger.restore(saved["ledger"], logging.read_metrics(folder / "metrics.jsonl"))
        if ledger.step >= total_steps and not (config.eval_only or config.auto_resume):
            length = f"step {ledger.step} of {total_steps}; to go on, raise --{config.length_setting}"
            raise UserError(f"run '{folder.name}' is at {length}")
    else:
        folder = ranks.from_main(lambda: logging.new_run_folder(settings, dataset.name), place)
    is_begun = folder.exists()

    # ---- split, recompute, compile, shard ----------------------------------------------------------------------------
    parallel.split_weights(model, place)
    checkpoint_activations(model, config)
    module, compiled = objective, "off"
    if will_compile:
        example = objective.prepare(stream.batches(0, 0, 1, config.batch_size)[0], config.seed)
        module, compiled = parallel.compile_module(objective, example, place, parallel.is_split(config, place))
    module = parallel.wrap(objective, module, place, config)
    parallel.fill(model, None if is_resumed else first_weights, place, config)
    optimizers = parallel.distributed_optimizers(optimizers, model, place, config)
    if is_resumed:
        checkpoint.restore(model, optimizers, saved, saved_at)
    ranks.wait_for_all(place)  # all have read the run folder: from here on rank 0 writes to it

    # ---- say what is about to happen ---------------------------------------------------------------------------------
    peak = hardware_peak(place.device, place.precision)
    resolved = {
        "device": str(place.device), "device_name": place.device_name(), "world_size": place.world_size,
        "parallel": parallel.mode(config, place), "dtype": place.dtype, "tf32": place.tf32, "compile": compiled,
        "threads": torch.get_num_threads(),
        "kernels": chosen_kernels, "kernels_not_taken": chosen_kernels.not_taken, "max_iters": total_steps,
        "scoring": objective.scoring(), "tokens_per_epoch": stream.tokens_per_epoch,
        "tokens_per_step": stream.tokens_per_step, "peak_flops_per_second": peak.flops_per_second,
        "peak_source": peak.source, "checkpoint_schedule": counts,
        "matching": matching.record(settings.model, config.match, config.match_to) if config.match else None,
    }  # fmt: skip
    log = logging.SilentLogger()
    if place.is_main and config.eval_only:
        log = logging.ConsoleLogger(total_steps)
    elif place.is_main:
        if is_begun:
            checkpoint.set_aside(folder, ledger.step)
            logging.rewind_metrics(folder, ledger.step)
        record = run_record.config_record(settings, folder.name, model, flops, dataset, validation, resolved, arguments)
        record["initial_weights"] = first_weights.record
        log = logging.RunLogger(folder, settings, record, dataset, total_steps, is_begun)

    stop = closing.enter_context(checkpoint.StopSignals(wanted=not config.eval_only))  # until all is closed

    @closing.push
    def finish(kind, error, trace):
        """However the run ended: close its files, and let summary.json say how."""
        if kind is not None:
            ledger.status = "interrupted" if kind is KeyboardInterrupt else "failed"
        log.finish(ledger.summary() | logging.size_and_speed(model, ledger, peak, place), flops, config.plot)

    log.say(startup_report(model, flops, peak, place, settings, dataset, resolved, notes(settings.model)))
    log.say(f"{'folder':<12} {folder}, ready after {time.perf_counter() - T_START:.1f} s\n")

    def save():
        """Write the checkpoint of this step, unless it exists."""
        ledger.add_joules(ranks.gather(meter.take_joules(), place))
        state = {
            "ledger": ledger.state(), "scaler": scaler.state_dict(), "stream": stream.initial_hash,
            "random_states": ranks.gather(checkpoint.random_state(place.device), place)[:: place.tensor_parallel],
        }  # fmt: skip
        metadata = run_record.metadata_record(settings, folder.name, ledger, stream, due.get(ledger.step))
        writer.save(model, optimizers, state, metadata, prune)

    def prune():
        """Leave the latest checkpoints, the best and the scheduled ones."""
        saved_steps = {step for step, _ in checkpoint.list_checkpoints(folder)}
        checkpoint.prune(folder, config.keep_checkpoints, {ledger.best(saved_steps).get("step"), *due})

    def evaluate():
        """Score the fixed validation windows and keep the result."""
        t0, is_final = time.perf_counter(), config.eval_only or ledger.step == total_steps
        scores = validation_scores(objective, validation, config.batch_size, place, is_final)
        seconds = time.perf_counter() - t0
        ledger.eval_seconds += seconds
        ledger.add_joules(ranks.gather(meter.take_joules(), place))
        row = {"kind": "eval", "step": ledger.step, **ledger.at_evaluation(), **scores, "seconds": seconds,
               "tokens_scheduled": due.get(ledger.step)}  # fmt: skip
        ledger.evaluations.append(row)
        log.evaluation(row, is_best=ledger.best() is row)

    if config.eval_only:
        return evaluate()
    writer = closing.enter_context(checkpoint.WRITERS[config.checkpoint_format](folder, place))

    # ---- the loop ----------------------------------------------------------------------------------------------------
    to_evaluate, to_save = checkpoint.steps_due(config, due, total_steps)
    parameters = list(model.parameters())
    torch.manual_seed(config.seed + place.data_rank)  # for dropout: the same masks whatever was drawn until here
    if is_resumed:
        if place.data_rank < len(saved["random_states"]):
            checkpoint.restore_random_state(saved["random_states"][place.data_rank], place.device)
        log.write_summary(ledger.summary())
        if ledger.step in to_evaluate and not ledger.evaluated_at(ledger.step):
            evaluate()  # the run stopped between saving and evaluating
    loader = closing.enter_context(Prefetcher(
        stream, ledger.step, total_steps, config.batch_size, config.prefetch_batches, place.data_rank, place.data_size,
        place.device, prepare=lambda batch: objective.prepare(batch, config.seed),
    ))  # fmt: skip
    in_a_row, t_loop, first_step = 0, time.perf_counter(), ledger.step
    logged_at, since_log, waited, logged_counts = ledger.step, 0.0, 0.0, {}

    is_solved = bool(ledger.evaluations) and dataset.is_solved(ledger.evaluations[-1])
    while ledger.step < total_steps and not is_solved:
        meter.start()
        micro_batches, wait = loader.next()
        learning_rate = set_learning_rate(optimizers, schedule(ledger.step))

        # The loss of a step is one mean over its supervised tokens, however they are split into micro-batches and ranks
        n_tokens = sum((batch["targets"] != IGNORE_INDEX).sum() for batch in micro_batches)
        n_tokens = ranks.sum_over_ranks(n_tokens, place)
        nats, counts = 0.0, {}
        for index, batch in enumerate(micro_batches):
            with parallel.gradient_sync(module, index + 1 == len(micro_batches), config):
                with place.autocast():
                    sums = module(batch)
                scaler.scale(sums["loss"] * (place.data_size / n_tokens)).backward()  # DDP takes the mean over ranks
            nats, counts = nats + sums["nats"], added(counts, sums.get("counts", {}))
        loss = ranks.sum_over_ranks(nats, place) / n_tokens
        counts = ranks.sums_over_ranks(counts, place)

        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        stats = {}
        if config.layer_stats_interval and (ledger.step + 1) % config.layer_stats_interval == 0:
            stats = logging.layer_stats(model)
        grad_norm = clip_gradients(parameters, config.grad_clip)
        loss, grad_norm, n_tokens = ranks.to_host([loss, grad_norm, n_tokens], place)
        is_finite = math.isfinite(loss + grad_norm)
        if is_finite:
            for optimizer in optimizers:
                scaler.step(optimizer)
            model.after_step(counts)
        scaler.update()
        ledger.step += 1
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        # -- the ledger
        seconds = meter.stop()
        ledger.train_seconds += seconds
        ledger.tokens_supervised += round(n_tokens)
        ledger.stream_hash = stream.hash_after(ledger.step - 1, ledger.stream_hash)
        ledger.non_finite_steps += not is_finite
        in_a_row = 0 if is_finite else in_a_row + 1
        since_log, waited, logged_counts = since_log + seconds, waited + wait, added(logged_counts, counts)

        # -- log, save, evaluate: in this order, so that a crash in an evaluation loses nothing
        is_last = ledger.step == total_steps
        if is_last or stats or ledger.step % config.log_interval == 0 or ledger.step == first_step + 1:
            seconds = since_log / (ledger.step - logged_at)
            speed = stream.tokens_per_step / seconds
            row = {
                "kind": "train", "step": ledger.step, "tokens_processed": ledger.tokens_processed, "loss": loss,
                "learning_rate": learning_rate, "grad_norm": grad_norm, "seconds": seconds,
                "tokens_per_second": speed, "mfu": mfu(flops.training, speed, peak, place.world_size),
                "data_wait": waited / since_log, "train_seconds": ledger.train_seconds,
                "epoch": stream.epoch(ledger.step), "non_finite_steps": ledger.non_finite_steps,
                "peak_memory_bytes": peak_memory_bytes(place), **stats, **model.report(logged_counts),
            }  # fmt: skip
            if ledger.step > first_step + 1:
                ledger.speeds.append(speed)
            eta = (time.perf_counter() - t_loop) / (ledger.step - first_step) * (total_steps - ledger.step)
            log.train(row, eta)
            logged_at, since_log, waited, logged_counts = ledger.step, 0.0, 0.0, {}
        if in_a_row >= config.max_non_finite_steps:
            save()
            raise ledger.diverged(config, in_a_row, folder.name)
        if ledger.step in to_save:
            save()
        if not is_last and ranks.any_rank(stop.received, place):
            save()
            ledger.status = "interrupted"
            break
        if ledger.step in to_evaluate:
            evaluate()
            log.write_summary(ledger.summary())
            is_solved = dataset.is_solved(ledger.evaluations[-1])
            if is_solved and not is_last:
                log.say(f"solved at step {ledger.step} of {total_steps}: there is no more to learn")
                save()

    # ---- the end -----------------------------------------------------------------------------------------------------
    if ledger.status == "interrupted":
        how = f"--init_from=resume --run_name={folder.name}"
        return log.say(f"stopped by {stop.name or 'another rank'} at step {ledger.step}; continue with {how}")
    ledger.status = "finished"
    if config.sample_tokens:
        log.sample(model, dataset, config.sample_tokens, config.seed, place.device)


if __name__ == "__main__":
    main(sys.argv[1:])
