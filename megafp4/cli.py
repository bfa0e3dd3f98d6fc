"""The command line: ``megafp4 train gpt-tiny --recipe mxfp4``.

Every field of the configuration is an option, so a run needs no code; what a field means is written
once, beside the field, and becomes its help. Errors that a user can act on are one line and exit
code 2. Commands import what they need when they run, which keeps ``--help`` quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megafp4 import __version__, settings
from megafp4.config import RunConfig
from megafp4.errors import CommunicationError, ConfigError, MegaFP4Error, unknown_name
from megafp4.launch import USER_ERROR, find_job, is_out_of_memory, refuse, say_who_fails
from megafp4.models.presets import get_preset, preset_names, preset_summary

Arguments = TypeVar("Arguments")
Options = TypeVar("Options", "TrainArguments", "CompareArguments")
Fields = Annotated[RunConfig, tyro.conf.arg(name="")]
Preset = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
Name = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True)
class TrainArguments:
    """Train one model; the same command continues an interrupted run, bit for bit."""

    preset: Preset = None
    """Where to start from, directly after ``train``: see ``megafp4 presets``."""
    config: Path | None = None
    """TOML or JSON file with further fields; options given here override it."""
    quiet: bool = False
    """Print nothing but errors."""
    run: Fields = field(default_factory=RunConfig)


@dataclass(frozen=True)
class CompareArguments:
    """Train one model under several recipes, from the same weights on the same batches."""

    preset: Preset = None
    """Where to start from, directly after ``compare``: see ``megafp4 presets``."""
    recipes: str = "bf16,mxfp4,mxfp4-rtn,fp4,dqt8,bitnet"
    """Recipes, separated by commas; bf16 is what the others are measured against."""
    jobs: int = 2
    """Runs at a time."""
    config: Path | None = None
    """TOML or JSON file with further fields; options given here override it."""
    run: Fields = field(default_factory=RunConfig)


@dataclass(frozen=True)
class ReportArguments:
    """Print the table and write report.html and plots of a run or a comparison."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Run folder, or folder of run folders."""


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes, or explain one GEMM by GEMM."""

    name: Name = None
    """Explain this recipe."""


@dataclass(frozen=True)
class FormatsArguments:
    """List the number formats."""


@dataclass(frozen=True)
class PresetsArguments:
    """List the presets, or print one as a configuration file."""

    name: Name = None
    """Print this preset as JSON."""


@dataclass(frozen=True)
class CorpusArguments:
    """Write the documentation and sources of this Python as token files."""

    out: Path = Path("data/python")
    """Folder for the token files."""
    tokenizer: str = "bytes"
    """``bytes``, ``gpt2``, or a path to a tokenizer."""
    max_bytes: int = 4_000_000
    """Most text to take, in bytes."""
    valid_fraction: float = 0.05
    """Share of the text for validation."""
    seed: int = 1234
    """Decides which documents are for validation."""


@dataclass(frozen=True)
class PreprocessArguments:
    """Tokenize text into a Megatron .bin/.idx pair."""

    input: tuple[str, ...]
    """Files (.txt, .jsonl, both also .gz, .parquet), folders of them, saved Hugging Face data."""
    output: str
    """Prefix of the .bin/.idx pair."""
    tokenizer: str = "bytes"
    """``bytes``, ``gpt2``, or a path to a tokenizer."""
    key: str = "text"
    """JSON field or column that holds the text."""
    append_eod: bool = True
    """End each document with the end-of-document id."""
    separator: str | None = None
    """Cuts .txt files into documents; None makes each file one document."""
    split: str = "train"
    """Part of a saved Hugging Face DatasetDict."""
    overwrite: bool = False
    """Replace a pair of this name."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that tokenize."""
    progress: bool = True
    """Show a progress bar."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None means the process's own.

    Returns:
        The process's exit code: 0, 2 for a request that cannot be met, 128 + signal if stopped.
    """
    try:
        try:
            return _dispatch(list(sys.argv[1:] if argv is None else argv))
        except MegaFP4Error as error:
            return refuse(" ".join(str(error).split()), own=isinstance(error, CommunicationError))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                say_who_fails()
                raise
            return refuse("memory ran out: lower train.micro_batch or model.seq_len, or the model")
        except Exception:
            say_who_fails()
            raise
        except KeyboardInterrupt:  # outside the training loop, which ends between two steps
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except SystemExit as stop:  # tyro printed help, or an error of its own
            return stop.code if isinstance(stop.code, int) else 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, head or a pager, has enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def train(arguments: list[str]) -> int:
    """Train one model."""
    given, config = _configured("train", TrainArguments, arguments)
    from megafp4.train.build import build, check, make_mesh
    from megafp4.train.folder import finished_summary
    from megafp4.train.loop import train as run_training

    job = find_job()

    def say(text: str) -> None:
        if job.speaks and not given.quiet:
            print(text, flush=True)

    job.use_device(config.device)
    check(config, job.world_size)
    if (summary := finished_summary(config)) is not None:
        say(f"{config.out} is finished after {summary['steps']} steps: choose another --out")
        return 0
    job.join(config.device)
    progress = run_training(build(config, make_mesh(config), quiet=given.quiet))
    job.leave()
    if progress.stopped_by is not None:
        say(f"stopped after step {progress.done}: the same command continues")
        return 128 + progress.stopped_by
    say(f"finished: everything about the run is in {config.out}")
    return 0


def compare(arguments: list[str]) -> int:
    """Train one model under several recipes and compare the results."""
    given, config = _configured("compare", CompareArguments, arguments)
    if (job := find_job()).world_size > 1:
        raise ConfigError(f"compare was started on {job.world_size} ranks: start it once")
    if config.recipe != _base("compare", given.preset, given.config).recipe:
        raise ConfigError(
            f"compare was given --recipe {config.recipe}: list what to compare with --recipes"
        )
    import torch

    from megafp4.train.build import check, open_batches, token_files
    from megafp4.train.compare import check_comparison, run_compare

    recipes = [name.strip() for name in given.recipes.split(",") if name.strip()]
    check_comparison(config, recipes, given.jobs, Path(config.out))
    for name in recipes:
        check(dataclasses.replace(config, recipe=name))
    if not config.data.train:
        # Made once, here: the runs are processes of their own and must read the same tokens.
        shared = config.data.cache or str(Path(config.out, "data"))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=shared))
        token_files(config)
    # Unusable data ends the comparison here, once, and the runs find the order of samples built.
    open_batches(config, torch.device("cpu"))
    return run_compare(config, recipes, out=config.out, jobs=given.jobs)


def report(arguments: list[str]) -> int:
    """Print the table and write report.html and plots of a run or a comparison."""
    folder = _parse("report", ReportArguments, arguments).folder
    from megafp4 import report as reports

    page = reports.write_report(folder)
    console = Console(highlight=False)
    console.print(reports.to_rich(reports.table_rows(reports.load_runs(folder))))
    console.print(f"Report: {page}", soft_wrap=True)
    return 0


def recipes(arguments: list[str]) -> int:
    """List the recipes, or explain one GEMM by GEMM."""
    name = _parse("recipes", RecipesArguments, arguments).name
    from megafp4.recipes.describe import explain, recipe_table

    Console(highlight=False).print(recipe_table() if name is None else explain(name))
    return 0


def formats(arguments: list[str]) -> int:
    """List the number formats."""
    _parse("formats", FormatsArguments, arguments)
    from megafp4.numerics import formats as format_names
    from megafp4.numerics import get_format

    table = Table("Format", "Bits", "Largest code", "Scaling", "What it is", header_style="bold")
    for entry in map(get_format, format_names()):
        cells = str(entry.bits), f"{entry.max_value:g}", ", ".join(entry.scalings)
        table.add_row(entry.name, *cells, escape(entry.summary))
    Console(highlight=False).print(table)
    return 0


def presets(arguments: list[str]) -> int:
    """List the presets, or print one as a configuration file."""
    name = _parse("presets", PresetsArguments, arguments).name
    if name is not None:
        print(json.dumps(settings.to_table(get_preset(name)), indent=2))
        return 0
    from megafp4.models import parameter_count

    table = Table("Preset", "Parameters", "Tokens", "What it is", header_style="bold")
    for preset in preset_names():
        run = get_preset(preset)
        tokens = run.train.steps * run.train.global_batch * run.model.seq_len
        sizes = map(_short, (parameter_count(run.model), tokens))
        table.add_row(preset, *sizes, escape(preset_summary(preset)))
    Console(highlight=False).print(table)
    return 0


def data(arguments: list[str]) -> int:
    """Make token files: ``data corpus`` from this Python, ``data preprocess`` from your text."""
    names = ("corpus", "preprocess")
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: megafp4 data {corpus,preprocess} ...   (each lists its options with --help)")
        return 0
    if not arguments or arguments[0] not in names:
        raise unknown_name("data command", " ".join(arguments[:1]), names)
    if arguments[0] == "corpus":
        wanted = dataclasses.asdict(_parse("data corpus", CorpusArguments, arguments[1:]))
        from megafp4.data.corpus import python_corpus

        found = python_corpus(wanted.pop("out"), **wanted)
        print(
            f"wrote {found.train_tokens:,} tokens for training, {found.valid_tokens:,} for "
            f"validation: train with --data.train {found.train} --data.valid {found.valid}"
        )
        return 0
    wanted = dataclasses.asdict(_parse("data preprocess", PreprocessArguments, arguments[1:]))
    from megafp4.data.preprocess import preprocess

    made = preprocess(wanted.pop("input"), wanted.pop("output"), **wanted)
    print(
        f"wrote {made.prefix}.bin and .idx: {made.documents:,} documents, {made.tokens:,} tokens, "
        f"{made.empty:,} empty documents left out"
    )
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "compare": compare,
    "report": report,
    "recipes": recipes,
    "formats": formats,
    "presets": presets,
    "data": data,
}


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: megafp4 COMMAND ...      (megafp4 COMMAND --help lists its options)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<8}  {(command.__doc__ or '').replace('``', '')}")
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        print(f"megafp4 {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise unknown_name("command", arguments[0], COMMANDS)
    return COMMANDS[arguments[0]](arguments[1:])


def _configured(
    command: str, kind: type[Options], arguments: list[str]
) -> tuple[Options, RunConfig]:
    """Read a command's options on top of its preset and its file, the later the stronger."""
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    base = _base(command, first, _file_of(arguments))
    given = _parse(command, kind, arguments, kind(run=base))
    if given.preset != first:
        raise ConfigError(
            f"preset {given.preset!r} stands behind options: put it directly after {command}"
        )
    if not {"-h", "--help"} & set(arguments) and first is None and given.config is None:
        raise ConfigError(
            f"{command} was given neither a preset nor a --config file: name a preset, one of "
            f"{', '.join(preset_names())}"
        )
    return given, given.run


def _file_of(arguments: list[str]) -> Path | None:
    """Find ``--config FILE`` before parsing, which starts from what the file says."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, found, value = argument.partition("=")
        if name == "--config" and (found or following):
            return Path(value if found else following)
    return None


def _base(command: str, preset: str | None, file: Path | None) -> RunConfig:
    base = RunConfig() if preset is None else get_preset(preset)
    if command == "compare":
        base = dataclasses.replace(base, out=f"runs/compare-{base.name}")
    return base if file is None else settings.override(base, settings.read_table(file), str(file))


def _parse(
    command: str, kind: type[Arguments], arguments: list[str], default: Arguments | None = None
) -> Arguments:
    """Parse with tyro, letting our own errors through.

    tyro shows what a field's check raises in a box of its own, chained to its exit. The sentence
    itself is what the user needs, so it is dug out and raised again.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    options |= {"args": arguments, "prog": f"megafp4 {command}"}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, MegaFP4Error):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        if stop.code in (None, 0):
            raise
    return tyro.cli(kind, **options)  # once more, showing the box


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
