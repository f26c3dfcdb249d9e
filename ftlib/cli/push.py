"""Upload an adapter or a model with a generated model card to the Hugging Face Hub.

    tune push output/run/final org/name [--private]
    tune push output/run/final org/name --dry-run         show the card and the files, upload nothing

Weights, config and tokenizer are sent, nothing else of the folder. A README.md in the folder is used as it is. The
repository is made if there is none. Environment: HF_TOKEN with the right to write, HF_ENDPOINT.
"""

import argparse
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from ftlib.cli.arguments import Parser
from ftlib.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`tune push FOLDER ID [--private] [--revision R] [--base ID] [--dry-run]`"""
    args = _parse(argv)
    folder = Path(os.path.expanduser(args.folder))
    from ftlib.cli import card
    from ftlib.models import remote
    from ftlib.models.remote import size

    files = _files(folder, remote.FILES)
    base = args.base or card.base_of(folder)
    config = card.adapter_config(folder, base)
    text = card.text(folder, args.id, base)
    total = sum(file.stat().st_size for file in files)
    if args.dry_run:
        print("\n".join([*(f"{file.name}  {size(file.stat().st_size)}" for file in files), "README.md:", text]))
        return 0
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise UserError("uploading needs a token with the right to write", fix=remote.LOGIN)
    api = HfApi(endpoint=remote.endpoint())
    name = f"{args.id}@{args.revision}" if args.revision else args.id
    made = ("README.md", "adapter_config.json")
    with remote.explained(name):
        api.create_repo(args.id, private=args.private, exist_ok=True)
        if args.revision:
            api.create_branch(args.id, branch=args.revision, exist_ok=True)
        commit = api.create_commit(
            args.id,
            [
                CommitOperationAdd("README.md", text.encode()),
                *([CommitOperationAdd("adapter_config.json", config)] if config else []),
                *(CommitOperationAdd(f.name, str(f)) for f in files if f.name not in made),
            ],
            commit_message=args.message,
            revision=args.revision,
        )
    print(f"{len(files)} files, {size(total)} -> {commit.commit_url}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("push", __doc__)
    parser.add_argument("folder", metavar="FOLDER", help="a run's final/, or what `tune merge` wrote")
    parser.add_argument("id", metavar="ID", help="org/name on the Hub")
    parser.add_argument("--private", action="store_true", help="if the repository has to be made, make it private")
    parser.add_argument("--revision", metavar="R", help="a branch; made if there is none")
    parser.add_argument("--message", default="Upload by tune push", help="of the commit")
    parser.add_argument("--base", metavar="ID", help="Hub id of the base model, for the card")
    parser.add_argument("--dry-run", action="store_true", help="upload nothing")
    args = parser.parse(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.id):
        raise UserError(f"{args.id}: is no Hub id", fix="it has the form org/name; a branch is --revision")
    return args


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """What is uploaded; UserError if the folder is neither an adapter nor a model."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", fix="name a run's final/, or what `tune merge` wrote")
    names = {file.name for file in folder.iterdir() if file.is_file()}
    weights = [name for name in names if name.endswith(".safetensors")]
    if ("adapter_config.json" not in names and "config.json" not in names) or not weights:
        inside = [p.name for p in sorted(folder.iterdir()) if (p / "config.json").exists() or p.name == "final"]
        raise UserError(
            f"{folder} is neither an adapter nor a model: config and .safetensors are missing",
            fix=f"name {folder / inside[0]}" if inside else "a checkpoint becomes a model with `tune merge`",
        )
    wanted = [name for name in names if any(fnmatch(name, pattern) for pattern in (*patterns, "README.md"))]
    return [folder / name for name in sorted(wanted)]
