"""Download a model from the Hugging Face Hub: weights, config and tokenizer, no code.

    tune download Qwen/Qwen3-0.6B                      into the shared cache, where `model.path: Qwen/Qwen3-0.6B` looks
    tune download Qwen/Qwen3-0.6B models/qwen3         as plain files in a folder
    tune download org/name --revision v2               a branch, a tag or a commit; also org/name@v2

Room, rights and the revision are checked before the first byte. A download that broke off goes on where it stopped.
Environment: HF_TOKEN (gated and private repositories), HF_HOME (place of the cache), HF_ENDPOINT (a mirror).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli.arguments import Parser
from ftlib.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`tune download ID [DIR] [--revision R]`"""
    parser = Parser("download", __doc__)
    parser.add_argument("id", metavar="ID", help="org/name or org/name@revision")
    parser.add_argument("dir", metavar="DIR", nargs="?", help="a folder; default: Hugging Face's cache")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit; default: main")
    args = parser.parse(argv)
    repo, _, revision = args.id.partition("@")
    if args.revision and revision and args.revision != revision:
        raise UserError(f"tune download: two revisions, {revision} and {args.revision}", fix="name one")
    revision = args.revision or revision
    folder = Path(os.path.expanduser(args.dir)) if args.dir else None
    if folder and folder.is_file():
        raise UserError(f"{folder} is a file", fix="name a folder")
    from ftlib.models import hub, remote

    name = f"{repo}@{revision}" if revision else repo
    if not hub.HUB_ID.fullmatch(name) or name.startswith("."):
        raise UserError(f"{name}: is no Hub id", fix="it has the form org/name or org/name@revision")
    found = remote.fetch(name, folder)
    total = sum(file.stat().st_size for file in found.rglob("*") if file.is_file() and ".cache" not in file.parts)
    print(f"{name}: {remote.size(total)} in {found}")
    print(f"use it as  model.path={folder or name}")
    return 0
