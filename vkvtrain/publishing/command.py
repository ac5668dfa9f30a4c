"""`vkvtrain publish`: from a training run to a directory or a Hub repository."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from huggingface_hub.utils import validate_repo_id

from vkvtrain.identity import adapter_hash
from vkvtrain.publishing.export import export
from vkvtrain.publishing.hub import PushError, push
from vkvtrain.publishing.measured import RESULTS, Evaluation, check_weights, find_results, read_results
from vkvtrain.publishing.run import read_run


@dataclass
class PublishArguments:
    """Publish a finished run: adapter or merged weights, eviction setting, tokenizer, model card and decoding code.

    The card shows what was measured, so a run needs an evaluation: `results.json` in the run's directory or beside it,
    or --results. --push uploads what was written; a new repository is private until --public.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Output directory of a finished run."""
    to: Path | None = None
    """Directory to write. Default with --push: RUN/published."""
    push: str | None = None
    """Repository to upload to, `user/name`; log in first with `hf auth login`, or set HF_TOKEN."""
    public: bool = False
    """Make the repository public once everything is there."""
    merge: bool = False
    """Publish whole weights with the adapter merged into them, instead of the adapter."""
    results: Path | None = None
    """Evaluation of the run and its controls: the output of `vkvtrain ablate`, or a results.json as `make demo` writes
    it. Default: RUN/results.json, or the one beside RUN."""
    results_model: str | None = None
    """What the results call this run. Default: found by its weights, in a results.json the name of its directory."""
    not_evaluated: bool = False
    """Publish without an evaluation; the card then says so."""
    base_name: str | None = None
    """Hub name of the base model, where the run loaded it from a directory."""
    license: str | None = None
    """Licence of what is published. Default: the base model's, from its card."""
    overwrite: bool = False
    """Replace an earlier publication in the directory."""


def evaluation_of(arguments: PublishArguments) -> Evaluation | None:
    """The evaluation to publish; raises ValueError where there is none and none was waived."""
    path = arguments.results or find_results(arguments.run)
    if arguments.not_evaluated:
        if arguments.results is not None:
            raise ValueError("--results and --not-evaluated exclude each other: leave one out")
        return None
    if path is None:
        raise ValueError(
            f"{str(arguments.run)!r} has no evaluation ({RESULTS} in it or beside it): give one with --results, or "
            "pass --not-evaluated, which the card will then say"
        )
    if path.is_dir():
        from vkvtrain.publishing.sweep import read_sweep

        return read_sweep(path, arguments.run, arguments.results_model)
    evaluation = read_results(path, arguments.results_model or arguments.run.resolve().name)
    known = check_weights(evaluation, path, adapter_hash(arguments.run))
    if not known and path.stat().st_mtime < (arguments.run / "adapter_model.safetensors").stat().st_mtime:
        print(f"note: {path} is older than the adapter: is it an evaluation of this one?", file=sys.stderr)
    return evaluation


def run(arguments: PublishArguments) -> None:
    """Check, write, and push if asked to.

    Raises:
        ValueError: one sentence that names the setting and the fix, before a model is loaded where that is possible.
        PushError: the Hub refused, or could not be reached.
    """
    if arguments.to is None and arguments.push is None:
        raise ValueError("nothing to do: give --to DIRECTORY, --push user/name, or both")
    if arguments.public and arguments.push is None:
        raise ValueError("--public is about --push: give --push user/name")
    if arguments.push is not None:
        validate_repo_id(arguments.push)
    finished = read_run(arguments.run, arguments.base_name, arguments.license, arguments.merge)
    evaluation = evaluation_of(arguments)
    directory = arguments.to or arguments.run / "published"
    overwrite = arguments.overwrite or arguments.to is None
    name = arguments.push or directory.resolve().name
    compared = export(finished, evaluation, directory, name, merge=arguments.merge, overwrite=overwrite)
    print(f"written: {directory} ({compared})")
    if arguments.push is not None:
        url = push(directory, arguments.push, public=arguments.public)
        print(f"pushed: {url}" + ("" if arguments.public else " (as private as it was; a new repository is private)"))


def main(rest: list[str]) -> None:
    """The command line of `vkvtrain publish`."""
    try:
        run(tyro.cli(PublishArguments, args=rest, prog="vkvtrain publish", config=(tyro.conf.FlagCreatePairsOff,)))
    except PushError as error:
        sys.exit(f"vkvtrain publish: {error}")
