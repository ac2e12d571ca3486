"""`minfer pull`, `rm` and `show`: models as things that are fetched, kept and looked at.

A download goes through the hub's client, with its progress bars (speed, time left). A connection that breaks is taken up again at the
byte where it broke; a command that was stopped goes on with the file that it was at, from that file's start, since the client keeps no
part of one. Afterwards every file is read once and compared with the hash under which the hub gave it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from minfer.cli.command import command
from minfer.cli.terminal import Terminal, human_bytes
from minfer.errors import ConfigError, ModelLoadError

Name = Annotated[str, typer.Argument(help="Short name or hub id (org/name, org/name:file.gguf).", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]


@command()
def pull(terminal: Terminal, model: Name, revision: Revision = None) -> None:
    """Download a model, or go on with a download, and check every file's hash."""
    from minfer.loader import downloaded, resolve_model

    downloaded.repository_of(model)
    source = resolve_model(model, revision=revision)
    if source.path is None:
        raise ModelLoadError(f"{model!r} has no files to download")
    folder = source.path if source.path.is_dir() else source.path.parent
    with terminal.busy("checking hashes"):
        checked = list(downloaded.check(folder))
    damaged = [file for file, good in checked if good is False]
    for file in damaged:
        downloaded.drop(file)
    if damaged:
        what = ", ".join(str(file.relative_to(folder)) for file in damaged)
        raise ModelLoadError(f"{what} of {model} did not have the hash it was sent under, and was removed; run `minfer pull {model}` again")
    size = sum(file.stat().st_size for file, _ in checked)
    verified = sum(good is True for _, good in checked)
    if terminal.json:
        terminal.result({"model": model, "location": str(source.path), "files": len(checked), "verified": verified, "size_bytes": size})
    else:
        terminal.note(f"{model}: {len(checked)} files, {human_bytes(size)}, {verified} hashes checked")
        print(source.path)


@command()
def rm(terminal: Terminal, model: Name, yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False) -> None:
    """Delete a downloaded model. Files that you put somewhere yourself are never touched."""
    from minfer.loader import downloaded

    repo, file = downloaded.repository_of(model)
    what = f"{repo}:{file}" if file else repo
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"deleting {what} needs --yes where nobody can be asked")
        typer.confirm(f"Delete {what} from the cache?", abort=True, err=True)
    removed, size = downloaded.remove(model)
    if terminal.json:
        terminal.result({"removed": removed, "freed_bytes": size})
    else:
        terminal.note(f"deleted {removed}, {human_bytes(size)}")


@command()
def show(
    terminal: Terminal,
    model: Annotated[str, typer.Argument(help="Short name, hub id, folder or .gguf file.", show_default=False)],
    template: Annotated[bool, typer.Option("--template", help="Print the chat template and nothing else.")] = False,
) -> None:
    """Show where a model comes from and what it is: source, revision, quantisation, context, licence, chat template."""
    values = describe(model)
    if terminal.json:
        terminal.result(values)
        return
    if template:
        if values["chat_template"] is None:
            raise ModelLoadError(f"{model} has no chat template")
        print(values["chat_template"])
        return
    chat = values["chat_template"]
    rows = [
        ("model", values["model"]),
        ("source", values["repository"] or values["location"]),
        ("revision", values["revision"] or "unknown"),
        ("location", values["location"]),
        ("format", f"{values['format']}, {human_bytes(values['size_bytes'])}"),
        ("quantisation", values["quantization"] or "none"),
        ("architecture", values["architecture"]),
        ("parameters", f"{values['parameters'] / 1e6:,.1f} M"),
        ("context", f"{values['context']:,} tokens"),
        ("licence", values["licence"] or "not said in its files"),
        ("chat", "no template" if chat is None else f"template of {len(chat):,} characters, tools: {'yes' if values['tools'] else 'no'}"),
        ("ends with", ", ".join(values["eos_tokens"]) or "nothing"),
    ]
    terminal.table(rows)


def describe(model: str) -> dict[str, Any]:
    """Everything that `--json` prints, from what is on this machine; nothing is downloaded."""
    from minfer.cli.inspect_model import is_on_disk
    from minfer.loader import downloaded, open_checkpoint, resolve_model
    from minfer.loader.checkpoint import TOKENIZER_FILES
    from minfer.tokenizer import Tokenizer

    if not is_on_disk(model):
        raise ModelLoadError(f"{model!r} is not on this machine; `minfer pull {model}` gets it, `minfer fit {model}` tells whether it fits")
    checkpoint = open_checkpoint(resolve_model(model))
    config, summary, source = checkpoint.config, checkpoint.describe(), checkpoint.source
    path = source.path or Path(model)
    snapshot = path if path.is_dir() else path.parent
    from_hub = snapshot.parent.name == "snapshots"
    origin = checkpoint.tokenizer_source
    metadata = {} if origin is None or isinstance(origin, Path) else origin
    tokenizer = None
    if origin is not None and (not isinstance(origin, Path) or any((origin / file).is_file() for file in TOKENIZER_FILES)):
        tokenizer = Tokenizer.from_folder(origin) if isinstance(origin, Path) else Tokenizer.from_gguf_metadata(origin)
    return {
        "model": model,
        "repository": downloaded.repository_of(model)[0] if from_hub else None,
        "revision": snapshot.name if from_hub else None,
        "location": str(path),
        "format": summary.format,
        "size_bytes": summary.num_bytes,
        "quantization": summary.quantization,
        "architecture": config.architecture,
        "parameters": config.num_parameters,
        "context": config.max_position_embeddings,
        "licence": metadata.get("general.license"),
        "chat_template": None if tokenizer is None else tokenizer.chat_template,
        "tools": tokenizer is not None and tokenizer.tool_template is not None,
        "eos_tokens": [] if tokenizer is None else [tokenizer.token_text(token) for token in tokenizer.eos_token_ids],
    }
