"""Print the script that completes `tune` in a shell: verbs, recipes, configs and the keys of a recipe's config.

    eval "$(tune completion bash)"                                in ~/.bashrc
    eval "$(tune completion zsh)"                                 in ~/.zshrc, after compinit
    tune completion fish > ~/.config/fish/completions/tune.fish
"""

import argparse
from collections.abc import Sequence

from ftlib import cli
from ftlib.cli import assets
from ftlib.cli.arguments import Parser
from ftlib.errors import UserError

# Each asks `tune completion words …` with the words before the cursor, the last of them unfinished.
SHELLS = {
    "bash": """_tune() {
  local IFS=$'\\n' line="${COMP_LINE:0:$COMP_POINT}" words
  IFS=$' \\t\\n' read -r -a words <<< "$line"
  [[ "$line" == *' ' ]] && words+=("")
  local current="${words[${#words[@]}-1]}" before="${COMP_WORDS[COMP_CWORD]}"
  COMPREPLY=($(command tune completion words "${words[@]:1}" 2>/dev/null))
  [[ "$current" == *=* ]] && COMPREPLY=("${COMPREPLY[@]#${current%=*}=}")
  [[ ${#COMPREPLY[@]} -eq 0 ]] && COMPREPLY=($(compgen -f -- "$before"))
  [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
}
complete -o filenames -F _tune tune""",
    "zsh": """_tune() {
  local -a found
  found=("${(@f)$(command tune completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  found=(${found:#})
  if (( $#found )); then compadd -S '' -- $found; else _files; fi
}
compdef _tune tune""",
    "fish": """function __tune_words
  set -l words (commandline -opc) (commandline -ct)
  command tune completion words $words[2..-1] 2>/dev/null
end
complete -c tune -a '(__tune_words)'""",
}
WITH_RECIPE = ("run", "validate", "preview", "prepare")


def main(argv: Sequence[str]) -> int:
    """`tune completion bash|zsh|fish`"""
    if argv and argv[0] == "words":
        print("\n".join(complete(list(argv[1:]) or [""])))
        return 0
    parser = Parser("completion", __doc__)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    print(SHELLS[parser.parse(argv).shell])
    return 0


def complete(words: list[str]) -> list[str]:
    """What may stand in place of the last, unfinished word of `tune WORDS`. Empty: any file."""
    *before, current = words
    if not before:
        found = list(cli.VERBS)
    elif current.startswith("--"):
        found = _options(before[0])
    elif before[-1] == "--config":
        found = list(assets.shipped("configs"))
    elif before[0] in WITH_RECIPE:
        recipes = [word for word in before[1:] if word.endswith(".py") or assets.find_shipped("recipes", word)]
        found = _keys(recipes[0]) if recipes else list(assets.shipped("recipes"))
    elif before[0] == "cp" and len(before) == 1:
        found = [*assets.shipped("recipes"), *assets.shipped("configs")]
    elif before == ["help"]:
        found = [*cli.VERBS, "config", "schema"]
    elif before[0] == "help" and before[1] in ("config", "schema") and len(before) == 2:
        found = list(assets.shipped("recipes"))
    elif before == ["completion"]:
        found = list(SHELLS)
    else:
        found = []
    return [word for word in found if word.startswith(current)]


def _options(verb: str) -> list[str]:
    """The options of a verb, from its own parser."""
    if verb in WITH_RECIPE:
        return ["--config", "--help", "--nproc-per-node"][: 3 if verb == "run" else 2]
    if verb not in cli.VERBS:
        return []
    found: list[str] = []

    def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
        found.extend(name for action in parser._actions for name in action.option_strings if name.startswith("--"))
        raise UserError("its options are known")

    usual, Parser.parse = Parser.parse, parse
    try:
        cli.module(verb).main([])
    except UserError:
        pass
    finally:
        Parser.parse = usual
    return found


def _keys(recipe_name: str) -> list[str]:
    from ftlib.cli import recipe
    from ftlib.config import describe

    try:
        docs = describe(recipe.load(recipe.find(recipe_name)).Config)
    except Exception:  # an unfinished recipe completes nothing
        return []
    return ["--config", *(f"{doc.key.replace('[]', '[0]')}=" for doc in docs)]
