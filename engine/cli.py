"""The command line: the daemon's options, and `wangpd models`, which lists the catalogue and fetches weights."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from engine.api.config import Config
from engine.api.openapi import version
from engine.api.views import selected
from engine.catalog import weights
from engine.catalog.abilities import TASKS
from engine.catalog.download import Download, messages
from engine.catalog.models import Catalog, Model, UnknownModel

CONFIG_HELP = "configuration; else ./wangpd.toml, then /etc/wangpd/wangpd.toml"


class CommandLine(argparse.ArgumentParser):
    """Reports a wrong command line in one sentence, as the configuration does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wangpd: command line: {message}; wangpd --help lists the options\n")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options. Exits with code 2 if there is no such flag or value."""
    if arguments[:1] == ["models"]:
        parser = CommandLine("wangpd models", description="The models, or with download, the weights of one.")
        parser.add_argument("--config", type=Path, help=CONFIG_HELP)
        parser.add_argument("--family", help="only models of this family")
        tasks = f"only models for it: {', '.join(TASKS)}"
        parser.add_argument("--task", choices=list(TASKS), metavar="TASK", help=tasks)
        parser.add_argument("--installed", action="store_true", help="only models whose weights are here")
        actions = parser.add_subparsers(dest="action", metavar="download", help="fetches the weights of a model")
        fetching = actions.add_parser("download", description="Fetch what is missing; goes on where it stopped.")
        fetching.add_argument("model_id", metavar="ID", help="id of the model")
        parser.set_defaults(command="models", check_config=False)
        return parser.parse_args(arguments[1:])
    parser = CommandLine("wangpd", description="Video from prompts: the WanGP HTTP API over diffusers.")
    parser.add_argument("--config", type=Path, help=CONFIG_HELP)
    parser.add_argument("--host", action="append", help="address to listen on; several with commas, or --host again")
    parser.add_argument("--port", type=int, help="port to listen on")
    parser.add_argument("--save-path", help="folder of the finished files")
    parser.add_argument("--state-path", help="folder of the queue's journal")
    parser.add_argument("--api", action="store_true", help="accepted, and changes nothing: the API is always there")
    parser.add_argument("--api-only", action="store_true", default=None, help="likewise: there is nothing else")
    parser.add_argument("--check-config", action="store_true", help="check the configuration and exit")
    parser.add_argument("--version", action="version", version=f"wangpd {version()}")
    parser.epilog = "wangpd models lists the models, wangpd models download ID fetches one; see wangpd models --help"
    parser.set_defaults(command=None)
    return parser.parse_args(arguments)


def run_command(options: argparse.Namespace, config: Config, models: Catalog) -> int:
    """Run `wangpd models …`; the exit code: 0, 1 if a download failed, 2 for an unknown model, 130 after Ctrl-C."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `wangpd models | head` is not an error
    if not options.action:
        _print_table(selected(models, options.family, options.task), config, options.installed)
        return 0
    try:
        model = models.get(options.model_id)
    except UnknownModel:
        print(f"wangpd: there is no model '{options.model_id}'; see: wangpd models", file=sys.stderr)
        return 2
    if weights.locate(model, config.models_dir):
        print(f"wangpd: model '{model.id}' is installed already")
        return 0
    download = Download(model.id)
    try:
        asyncio.run(_print_progress(download, config))
    except KeyboardInterrupt:
        print("\nwangpd: stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if download.error:
        print(f"wangpd: {download.error['message']}", file=sys.stderr)
        return 1
    print(f"wangpd: model '{model.id}' is installed")
    return 0


def _print_table(models: Sequence[Model], config: Config, only_installed: bool) -> None:
    rows = [("id", "kind", "installed", "size", "licence")]
    for model in models:
        there = weights.locate(model, config.models_dir) is not None
        if there or not only_installed:
            size = f"{model.total_bf16_bytes / 1e9:.1f} GB" if model.repo else "in the package"
            rows.append((model.id, model.kind, "yes" if there else "no", size, model.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


async def _print_progress(download: Download, config: Config) -> None:
    shown = ""
    async for message in messages(download.model_id, config.models_dir, config.min_free_mb * 2**20):
        vars(download).update(message)
        done_gb, total_gb = download.done_bytes / 1e9, (download.total_bytes or 0) / 1e9
        # Always as long as the one before, which it covers on a terminal.
        line = f"{download.percent:5.1f} %  {done_gb:8.3f} of {total_gb:.3f} GB  {download.file[-60:]:60}"
        if download.total_bytes is not None and line != shown:
            print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)
            shown = line
